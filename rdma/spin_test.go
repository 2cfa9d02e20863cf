package rdma

import (
	"testing"
	"time"
)

func TestSpin(t *testing.T) {
	s := spin{most: time.Millisecond}
	for range 20 {
		s.waited(300 * time.Microsecond)
	}
	if s.now < 300*time.Microsecond || s.now > s.most {
		t.Errorf("after short waits it polls for %v", s.now)
	}
	for range 20 {
		s.waited(time.Second)
	}
	if s.now > leastSpin {
		t.Errorf("after long waits it polls for %v", s.now)
	}
	s.waited(time.Microsecond)
	if s.now != leastSpin {
		t.Errorf("after one short wait it polls for %v", s.now)
	}
	none := spin{}
	none.waited(time.Microsecond)
	if none.now != 0 {
		t.Errorf("told not to, it polls for %v", none.now)
	}
}
