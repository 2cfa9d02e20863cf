package migrate

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

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

// TestResolveAbortOfWhatRuns: the destination is told to give up what runs there,
// and cannot end it at once. The source takes its copy back when it has ended,
// and not a moment before.
func TestResolveAbortOfWhatRuns(t *testing.T) {
	for _, again := range []string{"nothing happens", "the link breaks", "the daemon ends"} {
		stage(t, ModePostCopy, func(t *testing.T, s *scene) {
			stuck := func(what ...string) { s.mu.Lock(); s.stuck = what; s.mu.Unlock() }
			stuck("resident", "abort")
			l, src := s.newLife()
			ch := s.begin(l, src.Run)
			s.until(DestRunning)
			s.overruled = true
			if err := s.dest.ResolveAbort(t.Context(), modelID); err == nil {
				t.Fatal("it could not be ended, and nobody says so")
			}
			time.Sleep(time.Minute)
			s.want(copyHeld, copyRunning)
			switch again {
			case "the link breaks":
				s.breakLinks(false)
				time.Sleep(time.Minute)
				s.want(copyHeld, copyRunning)
			case "the daemon ends":
				s.lives[RoleDestination].crash()
				s.startDest()
				time.Sleep(time.Minute)
				s.want(copyHeld, copyRunning)
			}
			stuck()
			if err := s.dest.ResolveAbort(t.Context(), modelID); err != nil && again == "nothing happens" {
				t.Fatal(err)
			}
			if o := s.await(ch); o.res.Outcome != OutcomeAborted {
				t.Fatalf("%s: %+v, %v", again, o.res, o.err)
			}
			s.want(copyRunning, copyNone)
			if len(s.violations) > 0 {
				t.Errorf("%s: %v", again, s.violations)
			}
		})
	}
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
		time.Sleep(time.Second)
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

// TestCommittedAndAway: the destination died between its COMMIT and the release.
// A person takes the process back meanwhile: it obeys before it lets anything
// run. With nobody to hear it lets the process run, in the end.
func TestCommittedAndAway(t *testing.T) {
	for _, taken := range []bool{true, false} {
		stage(t, ModeStop, func(t *testing.T, s *scene) {
			s.at(faultCrash, "destination/journal/committed/after")
			l, src := s.newLife()
			ch := s.begin(l, src.Run)
			time.Sleep(time.Minute)
			s.want(copyHeld, copyHeld)
			if taken {
				if res, err := src.ResolveAbort(t.Context()); res.Outcome != OutcomeAborted || !res.Unsettled {
					t.Fatalf("%+v, %v", res, err)
				}
				s.await(ch)
				s.want(copyRunning, copyHeld)
				s.startDest()
				if err := src.Settle(l.ctx); err != nil {
					t.Fatal(err)
				}
				s.want(copyRunning, copyNone)
			} else {
				l.crash()
				s.startDest()
				time.Sleep(time.Second)
				s.want(copyHeld, copyHeld)
				time.Sleep(time.Minute)
				s.want(copyHeld, copyRunning)
				l, src = s.newLife()
				if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeDone {
					t.Fatalf("%+v, %v", o.res, o.err)
				}
				s.want(copyDead, copyRunning)
			}
			if len(s.violations) > 0 {
				t.Error(s.violations)
			}
		})
	}
}
