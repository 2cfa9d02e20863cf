package migrate

import (
	"errors"
	"testing"
	"time"
)

// TestCommitUnsure: the source's COMMIT fails, and is on the disk all the same.
// The next daemon would believe it, so the process may not run before a later
// record, or the destination's word, makes that harmless.
func TestCommitUnsure(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) { // neither can be had
		d := s.disks[RoleSource]
		d.lies, d.fails["committed"], d.fails["aborted"], d.fails["in-doubt"] = "committed", 1, 1000, 1000
		s.at(faultStall, "source/journal/committed/before")
		l, src := s.newLife()
		ch := s.begin(l, src.Run)
		time.Sleep(time.Second)
		s.block(true)
		time.Sleep(time.Minute)
		s.want(copyHeld, copyHeld)
		l.cancel()
		if o := s.await(ch); o.res.Outcome != OutcomeInDoubt || !errors.Is(o.err, ErrInDoubt) {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyHeld, copyHeld)
		l.crash()
		s.block(false)
		l, src = s.newLife()
		if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeDone {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyDead, copyRunning)
	})
	stage(t, ModeStop, func(t *testing.T, s *scene) { // the destination gives its copy up
		d := s.disks[RoleSource]
		d.lies, d.fails["committed"], d.fails["aborted"] = "committed", 1, 2
		l, src := s.newLife()
		o := s.await(s.begin(l, src.Run))
		if o.res.Outcome != OutcomeAborted {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyRunning, copyNone)
	})
	stage(t, ModeStop, func(t *testing.T, s *scene) { // a later record can be written
		d := s.disks[RoleSource]
		d.lies, d.fails["committed"] = "committed", 1
		s.at(faultCrash, "source/engine/thaw/before")
		l, src := s.newLife()
		<-s.begin(l, src.Run) // killed
		if got := d.last[modelID].State; got != "aborted" {
			t.Fatalf("%q is the last record before the thaw", got)
		}
		l, src = s.newLife()
		if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeAborted {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		if err := src.Settle(l.ctx); err != nil {
			t.Fatal(err)
		}
		s.want(copyRunning, copyNone)
	})
}

// TestCommitUnsureThere is the same at the destination: it aborts, and the
// source, although committed, takes its copy back.
func TestCommitUnsureThere(t *testing.T) {
	stage(t, ModePostCopy, func(t *testing.T, s *scene) {
		s.disks[RoleDestination].fails["committed"] = 2
		l, src := s.newLife()
		if o := s.await(s.begin(l, src.Run)); o.res.Outcome != OutcomeAborted || o.res.Unsettled {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyRunning, copyNone)
	})
	stage(t, ModePostCopy, func(t *testing.T, s *scene) { // nor can ABORTED
		d := s.disks[RoleDestination]
		d.fails["committed"], d.fails["aborted"] = 4, 2
		l, src := s.newLife()
		if o := s.await(s.begin(l, src.Run)); o.res.Outcome != OutcomeDone {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		s.want(copyDead, copyRunning)
	})
}

// TestSettledOnlyWhenForgotten: while the destination can neither remove its
// journal nor mark it, the source is not told that it is forgotten.
func TestSettledOnlyWhenForgotten(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		d := s.disks[RoleDestination]
		d.fails["remove"], d.fails["done"] = 2, 2
		l, src := s.newLife()
		o := s.await(s.begin(l, src.Run))
		if o.res.Outcome != OutcomeDone || !o.res.Unsettled {
			t.Fatalf("%+v, %v", o.res, o.err)
		}
		if err := src.Settle(l.ctx); err != nil {
			t.Fatal(err)
		}
		if n := len(d.last) + len(s.disks[RoleSource].last); n != 0 {
			t.Errorf("%d journals left", n)
		}
	})
}
