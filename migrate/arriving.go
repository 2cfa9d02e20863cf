package migrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/pageferry/pageferry/transport"
)

// arriving is one migration at the destination.
type arriving struct {
	d   *Destination
	id  transport.MigrationID
	log *slog.Logger

	// Who it came from; set before others see it.
	peerName string
	peerInc  Incarnation

	// turn is held by whoever moves it on, across I/O; its waiters have a
	// context.
	turn chan struct{}

	mu       sync.Mutex // guards the next
	state    DestState
	conn     *control // the current connection, nil where there is none
	changed  chan struct{}
	progress Progress
	wire     rate
	pages    rate
	arrival  Arrival // set once, by who has the turn

	// The rest belongs to whoever has the turn.
	journal Journal
	rec     Record
	pid     int
	behind  bool               // an earlier daemon's, and takeUp has not worked yet
	heard   bool               // the source had its time, see releaseLater
	awaited context.CancelFunc // of the goroutine that waits for residency
	waiter  chan struct{}      // closed when it has ended
}

func newArriving(d *Destination, id transport.MigrationID) *arriving {
	return &arriving{
		d: d, id: id, log: d.log.With("migration", id, "role", RoleDestination),
		turn: make(chan struct{}, 1), changed: make(chan struct{}),
		progress: Progress{ID: id, Role: RoleDestination, State: DestEmpty.String()},
	}
}

// take waits for the turn. What was heard is obeyed where the turn is free, also
// when the connection that said it has ended since.
func (a *arriving) take(ctx context.Context) error {
	select {
	case a.turn <- struct{}{}:
		return nil
	default:
	}
	select {
	case a.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (a *arriving) give() { <-a.turn }

// State is where it stands.
func (a *arriving) State() DestState {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state
}

// look returns the state and a channel that is closed when it is another.
func (a *arriving) look() (DestState, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state, a.changed
}

func (a *arriving) theArrival() Arrival {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.arrival
}

func (a *arriving) setArrival(v Arrival) {
	a.mu.Lock()
	a.arrival = v
	a.mu.Unlock()
}

// setConn makes c the connection of the migration and ends the one before it.
func (a *arriving) setConn(c *control) {
	a.mu.Lock()
	old := a.conn
	a.conn = c
	a.mu.Unlock()
	if old != nil && old != c {
		old.fail(errors.New("migrate: the source has come on a newer connection"))
	}
}

func (a *arriving) offered(o Offer, c *control) {
	a.rec = Record{
		Migration: a.id, Role: RoleDestination, Started: time.Now(), Mode: o.Mode,
		PeerName: clip(c.peer.Name, MaxName), PeerAddress: c.peer.Address, PeerIncarnation: c.hello.Incarnation,
		SourcePID: o.HostPID, Comm: o.Comm,
	}
	a.peerName, a.peerInc = a.rec.PeerName, a.rec.PeerIncarnation
	a.progress.Started, a.progress.Comm = a.rec.Started, o.Comm
	a.progress.Peer, a.progress.BytesMemory = c.hello.Host, o.MemoryBytes
	a.progress.Mode, a.progress.Trap, a.progress.Keep, a.progress.SourcePID = o.Mode, o.Trap, o.Keep, o.HostPID
}

// owns reports whether c is from the host and the journal that it came from.
func (a *arriving) owns(c *control) bool {
	return a.peerName == clip(c.peer.Name, MaxName) && a.peerInc == c.hello.Incarnation
}

func (a *arriving) between(point string, f func() error) error {
	a.d.kill(point + "/before")
	if err := f(); err != nil {
		return err
	}
	a.d.kill(point + "/after")
	return nil
}

func (a *arriving) engine(name string, f func() error) error {
	if err := a.between("engine/"+name, f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// enter moves to next without a record.
func (a *arriving) enter(next DestState, reason string) error {
	a.mu.Lock()
	st, err := a.state.To(next)
	if a.state == DestLost && st == DestDone {
		// Settled, and lost all the same: that was told, and stays what is told.
		a.state = st
		close(a.changed)
		a.changed = make(chan struct{})
		a.mu.Unlock()
		return nil
	}
	a.progress.Reason = reason
	if err == nil && st != a.state {
		a.state = st
		a.progress.State = st.String()
		close(a.changed)
		a.changed = make(chan struct{})
	}
	a.mu.Unlock()
	if err != nil {
		a.log.Error("illegal transition", "err", err)
		return err
	}
	a.tell(reason)
	return nil
}

// record moves to next, durably: it is journalled first.
func (a *arriving) record(next DestState, reason string) error {
	if _, err := a.State().To(next); err != nil {
		a.log.Error("illegal transition", "err", err)
		return err
	}
	r := a.rec
	r.State, r.Time, r.DestPID = next.String(), time.Now(), a.pid
	if reason != "" {
		r.Reason = reason
	}
	if err := r.describe(a.theArrival(), a.journal == nil); err != nil {
		return err
	}
	err := a.between("journal/"+next.String(), func() error {
		if a.journal != nil {
			return a.journal.Append(r)
		}
		j, err := a.d.cfg.Journals.Create(r)
		a.journal = j
		return err
	})
	if err != nil {
		return fmt.Errorf("journal %v: %w", next, err)
	}
	a.rec = r
	return a.enter(next, reason)
}

// insist records until it is durable or ctx ends.
func (a *arriving) insist(ctx context.Context, next DestState, reason string) error {
	b := backoff{t: a.d.t}
	for {
		err := a.record(next, reason)
		if err == nil || errors.Is(err, ErrIllegal) {
			return err
		}
		a.log.Error("the journal cannot be written", "state", next, "err", err)
		a.tell(err.Error())
		if !b.wait(ctx) {
			return err
		}
	}
}

// undo calls f, each time with the time that one attempt has, until it works
// or there is nothing left to work on. It is not stopped by a context that has
// ended, but does not go on for ever.
func (a *arriving) undo(ctx context.Context, name string, f func(context.Context) error) error {
	b := backoff{t: a.d.t}
	free := context.WithoutCancel(ctx)
	var err error
	for range undoAttempts {
		one, stop := context.WithTimeout(free, a.d.t.Undo)
		err = a.engine(name, func() error { return f(one) })
		stop()
		if err == nil || errors.Is(err, ErrGone) {
			return err
		}
		a.log.Warn("failed, tried again", "what", name, "err", err)
		if !b.wait(free) {
			break
		}
	}
	return err
}

// abort gives the copy up: journalled first, then ended, then forgotten. With
// sure the journal must take it, because the source may believe otherwise.
// Caller has the turn.
func (a *arriving) abort(ctx context.Context, reason string, sure bool) error {
	if a.State() != DestAborted {
		if err := a.record(DestAborted, reason); err != nil {
			if sure {
				return err
			}
			// The source is not bound to us: the next start finds nothing to
			// adopt and comes to the same.
			a.log.Warn("abort not journalled", "err", err)
			if err := a.enter(DestAborted, reason); err != nil {
				return err
			}
		}
	}
	a.stopWaiting()
	if v := a.theArrival(); v != nil {
		if err := a.undo(ctx, "abort", v.Abort); err != nil && !errors.Is(err, ErrGone) {
			return fmt.Errorf("migration %v: the copy here is not cleared away yet: %w", a.id, err)
		}
		if err := v.Close(); err != nil {
			a.log.Warn("handles of an aborted arrival", "err", err)
		}
		a.setArrival(nil)
	}
	return a.forget(DestAborted)
}

// forget ends the journal, or at least makes it say that it may be removed by
// the next start. Caller has the turn.
func (a *arriving) forget(final DestState) error {
	if a.journal != nil {
		if err := a.between("journal/remove", a.journal.Remove); err != nil {
			a.log.Warn("journal not removed yet", "err", err)
			r := a.rec
			r.State, r.Time = final.String(), time.Now()
			if aerr := a.journal.Append(r); aerr != nil {
				return fmt.Errorf("migration %v: journal: %w", a.id, errors.Join(err, aerr))
			}
			if err := a.journal.Close(); err != nil {
				a.log.Warn("journal not closed", "err", err)
			}
		}
		a.journal = nil
	}
	a.d.drop(a)
	return nil
}

// letGo closes handles at the end of the daemon.
func (a *arriving) letGo() error {
	var err error
	if v := a.theArrival(); v != nil {
		err = v.Close()
	}
	if a.journal != nil {
		err = errors.Join(err, a.journal.Close())
	}
	return err
}

// refresh asks the arrival for its figures. Not in the way of a switch: it may
// have to ask another process.
func (a *arriving) refresh() ArrivalStats {
	v := a.theArrival()
	if v == nil {
		return a.snapshot().ArrivalStats
	}
	st := v.Stats()
	a.mu.Lock()
	a.progress.ArrivalStats = st
	a.mu.Unlock()
	return st
}

func (a *arriving) snapshot() Progress {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	p := &a.progress
	p.BytesWire = p.ArrivalStats.BytesWire
	p.Elapsed = now.Sub(p.Started)
	p.WireBytesPerSecond = a.wire.update(now, p.BytesWire)
	p.PagesPerSecond = a.pages.update(now, p.PagesResident)
	return *p
}

func (a *arriving) tell(trouble string) {
	a.mu.Lock()
	a.progress.Reason = trouble
	a.mu.Unlock()
	if a.d.cfg.OnProgress != nil {
		a.d.cfg.OnProgress(a.snapshot())
	}
}
