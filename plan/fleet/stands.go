package fleet

import (
	"cmp"
	"slices"
)

// stand has what waits of one group to leave one host. What of it comes first is kept
// until something changes at one of the hosts, so that the end of one migration of ten thousand
// costs no look at all of them.
type stand struct {
	from, group int32
	lines       []line
	best        candidate
	stale       bool
}

// line has what waits of a stand to go to one host, best first: nothing but that order
// sets its jobs apart.
type line struct {
	to   int32
	jobs []int32
}

// candidate is a job that may begin, and how busy its ends are.
type candidate struct {
	job       int32
	busy, sum int
}

// before is the order of candidates.
func (s *Schedule) before(a, b candidate) bool {
	if a.busy != b.busy || a.sum != b.sum {
		return a.busy < b.busy || a.busy == b.busy && a.sum < b.sum
	}
	return s.compare(a.job, b.job) < 0
}

// compare is the order of jobs, the ends of their links aside.
func (s *Schedule) compare(a, b int32) int {
	return cmp.Or(cmp.Compare(s.jobs[a].rank, s.jobs[b].rank), cmp.Compare(a, b))
}

func (s *Schedule) stale(stands []int32) {
	for _, n := range stands {
		s.stands[n].stale = true
	}
}

// stand returns where a job waits, which is made for the first one.
func (s *Schedule) stand(j *job) *stand {
	key := [2]int32{j.from, j.group}
	n, ok := s.standAt[key]
	if !ok {
		n = int32(len(s.stands))
		s.stands = append(s.stands, stand{from: j.from, group: j.group})
		s.standAt[key] = n
		s.leaving[j.from] = append(s.leaving[j.from], n)
	}
	return &s.stands[n]
}

func (s *Schedule) enqueue(i int32) {
	j := &s.jobs[i]
	d := s.stand(j)
	n := slices.IndexFunc(d.lines, func(l line) bool { return l.to == j.to })
	if n < 0 {
		n = len(d.lines)
		d.lines = append(d.lines, line{to: j.to})
		s.coming[j.to] = append(s.coming[j.to], s.standAt[[2]int32{j.from, j.group}])
	}
	l := &d.lines[n]
	at, _ := slices.BinarySearchFunc(l.jobs, i, s.compare)
	l.jobs = slices.Insert(l.jobs, at, i)
	d.stale = true
	s.left++
}

func (s *Schedule) dequeue(i int32) {
	j := &s.jobs[i]
	d := s.stand(j)
	n := slices.IndexFunc(d.lines, func(l line) bool { return l.to == j.to })
	l := &d.lines[n]
	at, _ := slices.BinarySearchFunc(l.jobs, i, s.compare)
	l.jobs = slices.Delete(l.jobs, at, at+1)
	d.stale = true
	s.left--
}

// refresh finds the best of a stand. Its group and its own host are not asked.
func (s *Schedule) refresh(d *stand) {
	d.stale = false
	d.best = candidate{job: nowhere}
	for n := range d.lines {
		l := &d.lines[n]
		if len(l.jobs) == 0 || !s.takes(d.from, l.to) {
			continue
		}
		c := candidate{job: l.jobs[0]}
		if s.order == LPT {
			out, in := s.out[d.from], s.in[l.to]
			c.busy, c.sum = max(out, in), out+in
		}
		if d.best.job == nowhere || s.before(c, d.best) {
			d.best = c
		}
	}
}

// takes reports whether one more may go from one host to another one, as far as the latter
// and the way there go.
func (s *Schedule) takes(from, to int32) bool {
	l := &s.limits
	return (l.PerHost == 0 || s.touches(to) < l.PerHost) && (l.PerLink == 0 || s.link[[2]int32{from, to}] < l.PerLink)
}

// lets reports whether one more may leave a host, as far as that goes.
func (s *Schedule) lets(from int32) bool {
	return s.limits.PerHost == 0 || s.touches(from) < s.limits.PerHost
}

func (s *Schedule) touches(h int32) int { return s.out[h] + s.in[h] }

// open reports whether one more of a group may begin, as far as the group goes.
func (s *Schedule) open(g int32) bool {
	if g == nowhere {
		return true
	}
	x := &s.groups[g]
	return x.pending == 0 && (x.AtOnce == 0 || x.running < x.AtOnce)
}
