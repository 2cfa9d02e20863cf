package fleet

import "fmt"

// Next returns the IDs of those that may begin now, best first. All of them may
// begin together, and with them nothing else may. It changes nothing.
func (s *Schedule) Next() []string {
	var picked []int32
	for s.limits.AtOnce == 0 || s.running < s.limits.AtOnce {
		best := candidate{job: nowhere}
		for n := range s.stands {
			d := &s.stands[n]
			if !s.open(d.group) || !s.lets(d.from) {
				continue
			}
			if d.stale {
				s.refresh(d)
			}
			if d.best.job != nowhere && (best.job == nowhere || s.before(d.best, best)) {
				best = d.best
			}
		}
		if best.job == nowhere {
			break
		}
		// As if it had begun: what comes after it must fit beside it.
		picked = append(picked, best.job)
		s.dequeue(best.job)
		s.count(best.job, 1)
	}
	ids := make([]string, len(picked))
	for n, i := range picked {
		s.enqueue(i)
		s.count(i, -1)
		ids[n] = s.jobs[i].process.ID
	}
	return ids
}

// Waits says for people why a process does not begin. It returns "" for one that
// may: if Next lacks it all the same, others come first.
func (s *Schedule) Waits(id string) string {
	i, ok := s.number[id]
	if !ok {
		return "it is no part of the schedule"
	}
	j, l := &s.jobs[i], &s.limits
	switch j.state {
	case runs:
		return "it has begun"
	case arrived:
		return "it is over"
	case leftOut:
		return "it was left out"
	}
	if why := s.groupWaits(j.group); why != "" {
		return why
	}
	if l.AtOnce > 0 && s.running >= l.AtOnce {
		return fmt.Sprintf("%s, of %d that may at one time", count(s.running, "migration runs", "migrations run"), l.AtOnce)
	}
	for _, h := range []int32{j.from, j.to} {
		if n := s.touches(h); l.PerHost > 0 && n >= l.PerHost {
			return fmt.Sprintf("%s to or from %s, of %d that may", count(n, "migration runs", "migrations run"), s.hosts.list[h].Name, l.PerHost)
		}
	}
	if n := s.link[[2]int32{j.from, j.to}]; l.PerLink > 0 && n >= l.PerLink {
		return fmt.Sprintf("%s from %s to %s, of %d that may", count(n, "migration runs", "migrations run"),
			j.process.Host, s.hosts.list[j.to].Name, l.PerLink)
	}
	return ""
}

// groupWaits says why nothing of a group may begin.
func (s *Schedule) groupWaits(n int32) string {
	if n == nowhere {
		return ""
	}
	g := &s.groups[n]
	for _, b := range g.before {
		switch o := &s.groups[b]; {
		case o.over:
		case o.left > 0:
			return fmt.Sprintf("group %s comes after group %s, of which %d of %d are not over", g.Name, o.Name, o.left, o.size)
		default:
			return fmt.Sprintf("group %s comes after group %s, and %s", g.Name, o.Name, s.groupWaits(b))
		}
	}
	if g.AtOnce > 0 && g.running >= g.AtOnce {
		return fmt.Sprintf("%s of group %s, of %d that may", count(g.running, "migration runs", "migrations run"), g.Name, g.AtOnce)
	}
	return ""
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
