package rdma

import "time"

// spin is how long somebody polls before it sleeps, learned in the way of KVM's
// halt polling (Documentation/virt/kvm/halt-polling.rst): it grows while what was
// waited for comes soon after the polling ended, and shrinks when it comes so
// late that no polling would have helped.
type spin struct{ now, most time.Duration }

const leastSpin = 10 * time.Microsecond

// waited learns from a wait that polling did not end.
func (s *spin) waited(d time.Duration) {
	if d > s.most {
		s.now /= 2
	} else {
		s.now = min(s.most, max(2*s.now, leastSpin))
	}
}
