package migrate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pageferry/pageferry/transport"
)

// scene is a world whose daemons the test itself starts and kills, step by step,
// in virtual time.
type scene struct {
	*world
	t    *testing.T
	dest *Destination
}

// stage runs f on a scene with a destination that listens.
func stage(t *testing.T, mode Mode, f func(t *testing.T, s *scene)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &scene{world: newWorld(1, mode), t: t}
		defer func() { // also after Fatal
			for _, l := range s.lives {
				l.crash()
			}
		}()
		s.startDest()
		f(t, s)
		s.stopDest()
		if t.Failed() {
			t.Logf("what happened:\n%s", s.dump())
		}
	})
}

func (s *scene) startDest() {
	l := s.start(RoleDestination)
	d, err := NewDestination(DestinationConfig{
		Host: &fakeHost{l}, Journals: &fakeJournals{l, s.disks[RoleDestination]}, Hello: Hello{PageSize: 4096, Host: "b"},
		KillPoint: l.point,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	context.AfterFunc(l.ctx, d.cancel)
	if err := d.Recover(l.ctx); err != nil {
		s.t.Fatal(err)
	}
	s.dest = d
	accept := make(chan *fakeLane, 8)
	s.mu.Lock()
	l.accept = accept
	s.mu.Unlock()
	go func() {
		for {
			select {
			case lane := <-accept:
				go func() { _ = d.Serve(l.ctx, lane, transport.Peer{Name: "a"}) }()
			case <-l.ctx.Done():
				return
			}
		}
	}()
}

func (s *scene) stopDest() {
	l := s.lives[RoleDestination]
	if !s.isDead(l) {
		if err := s.dest.Close(); err != nil {
			s.t.Error(err)
		}
	}
	l.cancel()
	synctest.Wait()
}

// outcome is what a source's goroutine came to.
type outcome struct {
	res Result
	err error
}

// begin starts f, a method of src; the channel is closed without a value if the
// daemon is killed.
func (s *scene) begin(l *life, f func(context.Context) (Result, error)) <-chan outcome {
	ch := make(chan outcome, 1)
	go func() {
		defer close(ch)
		res, err := f(l.ctx)
		l.here()
		ch <- outcome{res, err}
	}()
	return ch
}

func (s *scene) newLife() (*life, *Source) {
	l := s.start(RoleSource)
	return l, s.newSource(l)
}

func (s *scene) await(ch <-chan outcome) outcome {
	s.t.Helper()
	select {
	case o, ok := <-ch:
		if !ok {
			s.t.Fatalf("the source was killed\n%s", s.dump())
		}
		return o
	case <-time.After(time.Hour):
		s.t.Fatalf("no end\n%s", s.dump())
	}
	return outcome{}
}

func (s *scene) want(src, dst copyState) {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.src != src || s.dst != dst {
		s.t.Errorf("source's copy %v, destination's %v; want %v, %v", s.src, s.dst, src, dst)
	}
}

// until lets virtual time pass until the destination is st.
func (s *scene) until(st DestState) {
	s.t.Helper()
	for range 1000 {
		if a := s.dest.find(modelID); a != nil && a.State() == st {
			return
		}
		time.Sleep(time.Millisecond)
	}
	s.t.Fatalf("the destination is never %v\n%s", st, s.dump())
}

// at plans faults.
func (s *scene) at(what fault, points ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range points {
		s.plan = append(s.plan, planned{p, what})
	}
}

func (s *scene) block(on bool) {
	s.mu.Lock()
	s.blocked = on
	s.mu.Unlock()
	if on {
		s.breakLinks(false)
	}
}

// TestDestinationDies: before READY the migration is undone, from the commit on
// it is brought to its end.
func TestDestinationDies(t *testing.T) {
	for point, want := range map[string]Outcome{
		"destination/journal/prepared/after":   OutcomeAborted,
		"destination/engine/rebuild/after":     OutcomeAborted,
		"destination/journal/ready/before":     OutcomeAborted,
		"destination/recv/commit":              OutcomeDone,
		"destination/journal/committed/before": OutcomeDone,
		"destination/journal/committed/after":  OutcomeDone,
		"destination/engine/release/after":     OutcomeDone,
		"destination/send/running/before":      OutcomeDone,
		"destination/engine/resident/after":    OutcomeDone,
		"destination/journal/resident/after":   OutcomeDone,
		"destination/recv/done":                OutcomeDone,
	} {
		w := newWorld(1, ModePostCopy)
		w.plan = []planned{{point, faultCrash}}
		if res, err := w.run(t); res.Outcome != want {
			t.Errorf("killed at %s: %s (%v), want %s", point, res.Outcome, err, want)
		}
	}
}

// TestSourceDies is the same for the source: COMMIT in its journal decides.
func TestSourceDies(t *testing.T) {
	for point, want := range map[string]Outcome{
		"source/journal/preparing/after":  OutcomeAborted,
		"source/recv/accept":              OutcomeAborted,
		"source/engine/freeze/after":      OutcomeAborted,
		"source/engine/hold/after":        OutcomeAborted,
		"source/journal/committed/before": OutcomeAborted,
		"source/journal/committed/after":  OutcomeDone,
		"source/send/commit/before":       OutcomeDone,
		"source/recv/running":             OutcomeDone,
		"source/journal/resident/before":  OutcomeDone,
		"source/journal/resident/after":   OutcomeDone,
		"source/engine/kill/before":       OutcomeDone,
	} {
		w := newWorld(1, ModePostCopy)
		w.plan = []planned{{point, faultCrash}}
		if res, err := w.run(t); res.Outcome != want {
			t.Errorf("killed at %s: %s (%v), want %s", point, res.Outcome, err, want)
		}
	}
}

// TestLostJournal: the destination's journal is gone after the commit. Nothing
// is discarded, the source says so, and a person decides.
func TestLostJournal(t *testing.T) {
	for _, tc := range []struct {
		at       string
		dst      copyState
		resolve  func(*Source) func(context.Context) (Result, error)
		outcome  Outcome
		src      copyState
		overrule bool
	}{
		{"destination/recv/commit", copyHeld, func(s *Source) func(context.Context) (Result, error) { return s.ResolveAbort }, OutcomeAborted, copyRunning, false},
		{"destination/send/running/before", copyRunning, func(s *Source) func(context.Context) (Result, error) { return s.ResolveCommit }, OutcomeDone, copyDead, true},
	} {
		stage(t, ModeStop, func(t *testing.T, s *scene) {
			s.at(faultCrash, tc.at)
			l, src := s.newLife()
			ch := s.begin(l, src.Run)
			time.Sleep(time.Second)
			s.disks[RoleDestination] = newDisk(77)
			s.startDest()
			o := s.await(ch)
			if o.res.Outcome != OutcomeInDoubt || !errors.Is(o.err, ErrInDoubt) || o.res.Outcome.ExitCode() != 4 || o.res.Unsettled {
				t.Fatalf("%+v, %v", o.res, o.err)
			}
			s.want(copyHeld, tc.dst)
			// A daemon that comes back says the same.
			l.crash()
			l, src = s.newLife()
			if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeInDoubt {
				t.Fatalf("%+v, %v", o.res, o.err)
			}
			s.want(copyHeld, tc.dst)
			s.overruled = tc.overrule
			o = s.await(s.begin(l, tc.resolve(src)))
			if o.res.Outcome != tc.outcome {
				t.Fatalf("resolved: %+v, %v", o.res, o.err)
			}
			s.want(tc.src, tc.dst)
			if err := src.Settle(l.ctx); err != nil {
				t.Error(err)
			}
			if n := len(s.disks[RoleSource].last); n != 0 {
				t.Errorf("%d journals left", n)
			}
		})
	}
}

// TestResolveAbortThere: the source is away after its commit; the destination
// is told to give up; the source obeys when it is back.
func TestResolveAbortThere(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		s.at(faultCrash, "source/journal/committed/after")
		l, src := s.newLife()
		s.begin(l, src.Run)
		s.until(DestReady)
		time.Sleep(time.Minute)
		s.want(copyHeld, copyHeld)
		if err := s.dest.ResolveAbort(t.Context(), modelID); err != nil {
			t.Fatal(err)
		}
		s.want(copyHeld, copyNone)
		l, src = s.newLife()
		if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeAborted || o.res.Unsettled {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyRunning, copyNone)
	})
}

// TestResolveCommitThere: the source died held, before its commit; all pages are
// at the destination, which is told to go on. The source obeys.
func TestResolveCommitThere(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		s.at(faultCrash, "source/engine/hold/after")
		l, src := s.newLife()
		s.begin(l, src.Run)
		s.until(DestReady)
		time.Sleep(time.Second)
		s.want(copyHeld, copyHeld)
		if err := s.dest.ResolveCommit(t.Context(), modelID); err != nil {
			t.Fatal(err)
		}
		s.want(copyHeld, copyRunning)
		l, src = s.newLife()
		if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeDone {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyDead, copyRunning)
	})
	stage(t, ModePostCopy, func(t *testing.T, s *scene) { // pages are missing
		s.at(faultCrash, "source/engine/hold/after")
		l, src := s.newLife()
		s.begin(l, src.Run)
		s.until(DestReady)
		if err := s.dest.ResolveCommit(t.Context(), modelID); err == nil || !strings.Contains(err.Error(), "0 of 4") {
			t.Fatal(err)
		}
		s.want(copyHeld, copyHeld)
	})
}

// TestResolveConflict: the source had aborted and runs on when the destination
// is told to go on. When they meet, the source's copy is frozen: one owner.
func TestResolveConflict(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		s.at(faultStall, "destination/send/ready/before")
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		s.until(DestReady)
		s.block(true)
		o := s.await(ch)
		if o.res.Outcome != OutcomeAborted || !o.res.Unsettled {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyRunning, copyHeld)
		if err := s.dest.ResolveCommit(t.Context(), modelID); err != nil {
			t.Fatal(err)
		}
		s.violations = nil // it is a person's doing
		s.block(false)
		if err := src.Settle(l.ctx); !errors.Is(err, ErrInDoubt) {
			t.Fatal(err)
		}
		s.want(copyHeld, copyRunning)
		if src.State() != SourceInDoubt {
			t.Errorf("state %v", src.State())
		}
	})
}

// TestResolveHere: the link is down for good while the destination runs it; the
// source's person takes it back, and the destination obeys.
func TestResolveHere(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		s.until(DestRunning)
		s.block(true)
		time.Sleep(time.Minute)
		s.overruled = true
		res, err := src.ResolveAbort(t.Context())
		if res.Outcome != OutcomeAborted || !errors.Is(err, ErrResolved) || !res.Unsettled {
			t.Fatalf("%+v, %v", res, err)
		}
		if o := s.await(ch); o.res.Outcome != OutcomeAborted {
			t.Fatalf("Run: %+v, %v", o.res, o.err)
		}
		s.mu.Lock()
		if s.src != copyRunning {
			t.Errorf("source's copy is %v", s.src)
		}
		s.violations = nil
		s.mu.Unlock()
		s.block(false)
		if err := src.Settle(l.ctx); err != nil {
			t.Fatal(err)
		}
		s.want(copyRunning, copyNone)
		if n := len(s.disks[RoleSource].last) + len(s.disks[RoleDestination].last); n != 0 {
			t.Errorf("%d journals left", n)
		}
	})
}

func TestCancel(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		s.until(DestPrepared)
		if err := src.Cancel(); err != nil {
			t.Fatal(err)
		}
		if o := s.await(ch); o.res.Outcome != OutcomeAborted || !errors.Is(o.err, ErrCancelled) || o.res.Unsettled {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyRunning, copyNone)
	})
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		s.until(DestRunning)
		if err := src.Cancel(); !errors.Is(err, ErrCommitted) {
			t.Fatal(err)
		}
		s.await(ch)
		s.want(copyDead, copyRunning)
	})
}

// TestInterrupted: the end of the daemon's context aborts before the commit,
// and leaves the rest to the next one after it.
func TestInterrupted(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		s.until(DestPrepared)
		l.cancel()
		if o := s.await(ch); o.res.Outcome != OutcomeAborted {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyRunning, copyNone)
	})
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		s.until(DestRunning)
		l.cancel()
		if o := s.await(ch); o.res.Outcome != OutcomeInterrupted || !errors.Is(o.err, ErrInterrupted) {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyHeld, copyRunning)
		l, src = s.newLife()
		if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeDone {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
	})
}

// TestStall: a peer that says nothing is found in the time set for it, and the
// process runs on.
func TestStall(t *testing.T) {
	for _, point := range []string{"source/recv/accept", "source/send/state/after", "destination/engine/rebuild/before"} {
		stage(t, ModeStop, func(t *testing.T, s *scene) {
			s.at(faultStall, point)
			l, src := s.newLife()
			begun := time.Now()
			o := s.await(s.begin(l, src.Run))
			took := time.Since(begun)
			// Telling the other side has its own limit, with the process running.
			if limit := 5*time.Second + time.Second; o.res.Outcome != OutcomeAborted || took > limit {
				t.Errorf("at %s: %s after %v: %v", point, o.res.Outcome, took, o.err)
			}
			if s.src != copyRunning {
				t.Errorf("source's copy is %v", s.src)
			}
			if err := src.Settle(l.ctx); err != nil {
				t.Error(err)
			}
			s.want(copyRunning, copyNone)
		})
	}
}

func TestRefused(t *testing.T) {
	for name, change := range map[string]func(*SourceConfig){
		"page size":  func(c *SourceConfig) { c.Hello.PageSize = 65536 },
		"no journal": func(c *SourceConfig) { c.Journals = fullJournals{c.Journals} },
	} {
		stage(t, ModeStop, func(t *testing.T, s *scene) {
			l, src := s.newLife()
			change(&src.cfg)
			o := s.await(s.begin(l, src.Run))
			var r *Refusal
			if o.res.Outcome != OutcomeRefused || !errors.As(o.err, &r) || o.res.Outcome.ExitCode() != 3 {
				t.Errorf("%s: %+v, %v", name, o.res, o.err)
			}
			if s.srcRan != 0 {
				t.Errorf("%s: the process was touched", name)
			}
			if n := len(s.disks[RoleSource].last) + len(s.disks[RoleDestination].last); n != 0 {
				t.Errorf("%s: %d journals left", name, n)
			}
		})
	}
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		src.cfg.Hello.Version++
		o := s.await(s.begin(l, src.Run))
		if o.res.Outcome != OutcomeRefused || !strings.Contains(o.err.Error(), "protocol version") {
			t.Errorf("%+v, %v", o.res, o.err)
		}
	})
	stage(t, ModeStop, func(t *testing.T, s *scene) { // twice at once
		s.at(faultCrash, "source/journal/committed/after")
		l, src := s.newLife()
		s.begin(l, src.Run)
		s.until(DestReady)
		s.disks[RoleSource] = newDisk(3)
		l, src = s.newLife()
		o := s.await(s.begin(l, src.Run))
		if o.res.Outcome != OutcomeRefused || !strings.Contains(o.err.Error(), "known here already") {
			t.Errorf("%+v, %v", o.res, o.err)
		}
	})
}

type fullJournals struct{ Journals }

func (fullJournals) Create(Record) (Journal, error) { return nil, ErrNoSpace }

func TestInquire(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		l, src := s.newLife()
		hello, err := Inquire(l.ctx, src.cfg)
		if err != nil || hello.Host != "b" {
			t.Fatalf("%+v, %v", hello, err)
		}
		time.Sleep(time.Minute)
		s.want(copyRunning, copyNone)
		if s.arrival || len(s.disks[RoleDestination].last) != 0 {
			t.Error("an offer that was only asked about left something")
		}
	})
}

// TestStranger: only the host that a migration came from may speak of it.
func TestStranger(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		s.at(faultCrash, "source/journal/committed/after")
		l, src := s.newLife()
		s.begin(l, src.Run)
		s.until(DestReady)
		l = s.start(RoleSource)
		for _, in := range []intent{intentAsk, intentAbort, intentCommit, intentDone} {
			k := newLink(l, s.lives[RoleDestination])
			go func() { _ = s.dest.Serve(t.Context(), k.ends[1], transport.Peer{Name: "mallory"}) }()
			c := newControl(k.ends[0], transport.Peer{}, time.Second, discard)
			if err := c.greet(t.Context(), Hello{Version: ProtocolVersion, PageSize: 4096, Incarnation: Incarnation{1}}, time.Second); err != nil {
				t.Fatal(err)
			}
			if err := c.send(resumeMsg{Migration: wireID(modelID), Intent: in, Resolved: true}); err != nil {
				t.Fatal(err)
			}
			r, err := c.recvIn(t.Context(), time.Second, "answer")
			if err != nil || r.msg.kind() != kindRefuse {
				t.Errorf("intent %d: %+v, %v", in, r.msg, err)
			}
			c.close()
		}
		s.want(copyHeld, copyHeld)
	})
}

// TestDamagedJournalIsNotUnknown: what cannot be read must not be taken for what
// was aborted.
func TestDamagedJournalIsNotUnknown(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		s.at(faultCrash, "destination/engine/fetch/after")
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		time.Sleep(time.Second)
		s.want(copyHeld, copyRunning)
		rec := *s.disks[RoleDestination].last[modelID]
		s.disks[RoleDestination].last[modelID].State = "gibberish"
		dl := s.start(RoleDestination)
		d, err := NewDestination(DestinationConfig{
			Host: &fakeHost{dl}, Journals: &fakeJournals{dl, s.disks[RoleDestination]}, Hello: Hello{PageSize: 4096, Host: "b"},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Recover(dl.ctx); err == nil {
			t.Error("a damaged journal was recovered")
		}
		for range 5 {
			k := newLink(l, dl)
			go func() { _ = d.Serve(dl.ctx, k.ends[1], transport.Peer{Name: "a"}) }()
			s.mu.Lock()
			dl.accept = make(chan *fakeLane, 1)
			s.mu.Unlock()
			c := newControl(k.ends[0], transport.Peer{}, time.Second, discard)
			if err := c.greet(t.Context(), src.cfg.Hello, time.Second); err != nil {
				t.Fatal(err)
			}
			if err := c.send(resumeMsg{Migration: wireID(modelID), Intent: intentCommit}); err != nil {
				t.Fatal(err)
			}
			r, err := c.recvIn(t.Context(), time.Second, "answer")
			if err != nil || r.msg.kind() != kindRetry {
				t.Fatalf("%+v, %v", r.msg, err)
			}
			c.close()
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		dl.crash()
		s.want(copyHeld, copyRunning)
		// Put right, it goes on.
		s.disks[RoleDestination].last[modelID] = &rec
		s.startDest()
		if o := s.await(ch); o.res.Outcome != OutcomeDone {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
	})
}

// TestProgress: who watches sees the states in order, and pages that grow.
func TestProgress(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		var states []string
		l, src := s.newLife()
		src.cfg.OnProgress = func(p Progress) {
			if n := len(states); n == 0 || states[n-1] != p.State {
				states = append(states, p.State)
			}
		}
		o := s.await(s.begin(l, src.Run))
		want := "[preparing isolated frozen held committed serving resident done]"
		if got := fmt.Sprint(states); got != want {
			t.Errorf("states %s, want %s", got, want)
		}
		if o.res.IDText != modelID.String() || o.res.StateText != "done" || len(o.res.Rounds) != 1 {
			t.Errorf("%+v", o.res)
		}
	})
}
