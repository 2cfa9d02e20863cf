package migrate

import (
	"testing"
	"time"
)

// TestCopyLost: the frozen copy ends while pages are missing. Both say that it is
// lost and forget it, whichever daemon is killed on the way; before the
// destination has said so, the source does not decide it.
func TestCopyLost(t *testing.T) {
	for _, point := range []string{
		"", "source/journal/lost/before", "source/journal/lost/after", "source/journal/remove/before",
		"destination/journal/lost/before", "destination/journal/lost/after", "destination/journal/remove/before",
		"destination/journal/remove/after",
	} {
		t.Run(point, func(t *testing.T) {
			stage(t, ModePostCopy, func(t *testing.T, s *scene) {
				l, src := s.newLife()
				ch := s.begin(l, src.Run)
				s.until(DestRunning)
				s.mu.Lock()
				s.missing = 1 << 20 // it takes its time
				s.mu.Unlock()
				s.breakLinks(false)
				s.block(true)
				s.mu.Lock()
				s.src, s.srcLost = copyDead, true
				s.mu.Unlock()
				time.Sleep(time.Minute)
				if st := src.State(); st == SourceLost {
					t.Error("decided although the destination may have all it needs")
				}
				if point != "" {
					s.at(faultCrash, point)
				}
				s.block(false)
				var o outcome
				for begun := time.Now(); o.res.Outcome == ""; {
					if time.Since(begun) > time.Hour {
						t.Fatal("no end")
					}
					select {
					case got, ok := <-ch:
						if o = got; !ok {
							l, src = s.newLife()
							ch = s.begin(l, src.Recover)
						}
					case <-time.After(time.Second):
						if s.isDead(s.lives[RoleDestination]) {
							s.startDest()
						}
					}
				}
				if o.res.Outcome != OutcomeLost {
					t.Fatalf("%+v, %v", o.res, o.err)
				}
				if s.isDead(s.lives[RoleDestination]) {
					s.startDest()
				}
				if err := src.Settle(t.Context()); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Minute)
				for r, d := range s.disks {
					for _, rec := range d.last {
						t.Errorf("left behind: journal of the %s, %s", r, rec.State)
					}
				}
			})
		})
	}
}
