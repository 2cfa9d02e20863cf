package migrate

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pageferry/pageferry/transport"
)

func (w *world) start(r Role) *life {
	l := &life{w: w, role: r}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	w.mu.Lock()
	w.lives[r] = l
	w.logf("%s: started", r)
	w.mu.Unlock()
	return l
}

func (w *world) isDead(l *life) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return l.dead
}

// between is a random time, in the middle of which much may happen.
func (w *world) someTime() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return time.Duration(w.rng.IntN(int(20 * time.Second)))
}

// destination runs daemons, one after the other, until stop is closed.
func (w *world) destination(stop <-chan struct{}) {
	var serving chan *fakeLane
	for {
		l := w.start(RoleDestination)
		serving = make(chan *fakeLane, 64)
		done := make(chan struct{})
		go func() {
			defer close(done)
			d, err := NewDestination(DestinationConfig{
				Host: &fakeHost{l}, Journals: &fakeJournals{l, w.disks[RoleDestination]}, Hello: Hello{PageSize: 4096, Host: "b"},
				KillPoint: l.point,
			})
			if err != nil {
				panic(err)
			}
			// A daemon that dies closes nothing in good order.
			context.AfterFunc(l.ctx, d.cancel)
			defer d.cancel()
			if err := d.Recover(l.ctx); err != nil {
				panic(err)
			}
			w.mu.Lock()
			l.accept = serving
			w.mu.Unlock()
			for {
				select {
				case lane := <-serving:
					go func() { _ = d.Serve(l.ctx, lane, transport.Peer{Name: "a"}) }()
				case <-l.ctx.Done():
					d.mu.Lock()
					d.closed = true // nothing is counted in any more
					d.mu.Unlock()
					d.wg.Wait()
					return
				case <-stop:
					if err := d.Close(); err != nil {
						panic(err)
					}
					return
				}
			}
		}()
		<-done
		select {
		case <-stop:
			return
		default:
		}
		if !w.isDead(l) {
			panic("the destination ended by itself")
		}
		w.mu.Lock()
		wipe := w.wipe == RoleDestination && w.rng.IntN(2) == 0
		if wipe {
			w.logf("destination: the journal is lost")
			w.wipe, w.wiped = "", true
			w.disks[RoleDestination] = newDisk(77)
		}
		w.mu.Unlock()
		select {
		case <-time.After(w.someTime()):
		case <-stop:
			return
		}
	}
}

func (w *world) dial(l *life) (transport.Lane, transport.Peer, error) {
	l.here()
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.lives[RoleDestination]
	if d == nil || d.dead || d.accept == nil || w.blocked {
		return nil, transport.Peer{}, errors.New("connection refused")
	}
	if err := w.trouble("dial"); err != nil {
		return nil, transport.Peer{}, err
	}
	k := newLink(l, d)
	w.links = append(w.links, k)
	d.accept <- k.ends[1]
	return k.ends[0], transport.Peer{Name: "b"}, nil
}

func (w *world) newSource(l *life) *Source {
	s, err := NewSource(SourceConfig{
		ID: modelID, Process: &fakeProcess{l}, Lanes: &fakeLanes{l: l}, Journals: &fakeJournals{l, w.disks[RoleSource]},
		Dial:    func(ctx context.Context) (transport.Lane, transport.Peer, error) { return w.dial(l) },
		Address: "b:1", Hello: Hello{PageSize: 4096, Host: "a"}, Offer: Offer{Mode: w.mode, HostPID: 42}, Auto: w.auto,
		BeforeCommit: func(context.Context) error { return nil },
		AtSwitch:     func(context.Context) error { return nil },
		OnSourceExit: func(context.Context) error { return nil },
		KillPoint:    l.point,
	})
	if err != nil {
		panic(err)
	}
	return s
}

// source runs daemons until the migration has ended for it, and returns how.
func (w *world) source() (Result, error) { return w.sourceFrom(true) }

func (w *world) sourceFrom(first bool) (res Result, err error) {
	for ; ; first = false {
		l := w.start(RoleSource)
		done := make(chan struct{})
		ended := false
		go func() {
			defer close(done)
			s := w.newSource(l)
			if first {
				res, err = s.Run(l.ctx)
			} else {
				res, err = s.Recover(l.ctx)
			}
			l.here()
			w.mu.Lock()
			w.logf("source: %s, %v, unsettled %v", res.Outcome, err, res.Unsettled)
			w.mu.Unlock()
			if errors.Is(err, ErrNoJournal) {
				ended = true // it ended, and was killed before it could say so
				return
			}
			for res.Unsettled {
				serr := s.Settle(l.ctx)
				l.here()
				if errors.Is(serr, ErrInDoubt) {
					res.Outcome = OutcomeInDoubt
				}
				break
			}
			ended = true
		}()
		<-done
		if ended {
			l.cancel()
			return res, err
		}
		if !w.isDead(l) {
			panic("the source ended by itself")
		}
		w.mu.Lock()
		if w.wipe == RoleSource && w.rng.IntN(2) == 0 {
			w.logf("source: the journal is lost")
			w.wipe, w.wiped = "", true
			w.disks[RoleSource] = newDisk(78)
		}
		w.mu.Unlock()
		time.Sleep(w.someTime())
	}
}

// run is one migration to its end.
func (w *world) run(t *testing.T) (res Result, err error) {
	t.Helper()
	defer func() {
		if t.Failed() {
			t.Logf("what happened:\n%s", w.dump())
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		begun := time.Now()
		stop := make(chan struct{})
		gone := make(chan struct{})
		go func() { defer close(gone); w.destination(stop) }()
		synctest.Wait() // it listens
		res, err = w.source()
		time.Sleep(2 * time.Minute) // the destination comes to its own end
		close(stop)
		<-gone
		// What could not be removed is, by daemons that start with nothing
		// going wrong any more.
		w.mu.Lock()
		w.chaos, w.plan = false, nil
		left := len(w.disks[RoleSource].last) + len(w.disks[RoleDestination].last)
		w.mu.Unlock()
		if left > 0 && !w.wiped {
			stop, gone = make(chan struct{}), make(chan struct{})
			go func() { defer close(gone); w.destination(stop) }()
			synctest.Wait()
			if len(w.disks[RoleSource].last) > 0 {
				w.sourceFrom(false)
			}
			time.Sleep(time.Minute)
			close(stop)
			<-gone
		}
		if d := time.Since(begun); d > time.Hour {
			t.Errorf("it took %v", d)
		}
	})
	w.judgeEnd(t, res)
	return res, err
}

// judgeEnd is the oracle after everything has come to rest.
func (w *world) judgeEnd(t *testing.T, res Result) {
	t.Helper()
	for _, v := range w.violations {
		t.Error(v)
	}
	owners := 0
	for _, c := range []copyState{w.src, w.dst} {
		if c == copyRunning {
			owners++
		}
	}
	if w.src == copyTraced {
		t.Error("the source's copy is still traced")
	}
	if w.wiped {
		if owners > 1 || (owners == 0 && (w.src != copyHeld)) {
			t.Errorf("a journal was lost: source's copy %v, destination's %v", w.src, w.dst)
		}
		return
	}
	if owners != 1 {
		t.Errorf("%d owners: source's copy %v, destination's %v, outcome %q", owners, w.src, w.dst, res.Outcome)
	}
	if w.dst == copyRunning && (w.src != copyDead || !w.finished) {
		t.Errorf("it runs at the destination, the source's copy is %v, finished %v", w.src, w.finished)
	}
	if w.arrival || w.lanes != nil || (w.src == copyRunning && w.dst != copyNone) {
		t.Errorf("left behind: arrival %v, lanes %v, destination's copy %v", w.arrival, w.lanes != nil, w.dst)
	}
	for r, d := range w.disks {
		for _, rec := range d.last {
			t.Errorf("left behind: journal of the %s, %s", r, rec.State)
		}
	}
	switch res.Outcome {
	case OutcomeDone:
		if w.dst != copyRunning {
			t.Error("done, and it does not run at the destination")
		}
	case OutcomeAborted, OutcomeRefused:
		if w.src != copyRunning {
			t.Errorf("%s, and it does not run at the source", res.Outcome)
		}
	case "": // said by a daemon that was killed
	default:
		t.Errorf("outcome %q of a world without lost journals", res.Outcome)
	}
}
