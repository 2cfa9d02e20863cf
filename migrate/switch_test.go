package migrate

import (
	"context"
	"errors"
	"testing"
)

// TestSwitchAfterTheDaemonDied: AtSwitch is called although the destination runs
// the process already, and once by each daemon, however often the link breaks.
func TestSwitchAfterTheDaemonDied(t *testing.T) {
	for _, point := range []string{"source/send/commit/after", "source/engine/at-switch/before"} {
		stage(t, ModePostCopy, func(t *testing.T, s *scene) {
			called := 0
			hook := func(context.Context) error {
				called++
				return errors.New("only logged")
			}
			s.at(faultCrash, point)
			l, src := s.newLife()
			src.cfg.AtSwitch = hook
			if _, ok := <-s.begin(l, src.Run); ok {
				t.Fatalf("not killed at %s", point)
			}
			s.until(DestRunning)
			if called != 0 {
				t.Fatalf("called before %s", point)
			}
			s.at(faultCut, "source/recv/running")
			l, src = s.newLife()
			src.cfg.AtSwitch = hook
			if o := s.await(s.begin(l, src.Recover)); o.res.Outcome != OutcomeDone {
				t.Errorf("%+v, %v", o.res, o.err)
			}
			if called != 1 {
				t.Errorf("killed at %s, called %d times", point, called)
			}
			s.want(copyDead, copyRunning)
		})
	}
}
