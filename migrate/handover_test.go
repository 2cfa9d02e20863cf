package migrate

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/transport"
)

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
		<-s.begin(l, src.Run) // killed
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
