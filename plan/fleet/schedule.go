package fleet

import (
	"maps"
	"slices"
)

// Order is by what a [Schedule] chooses among those that may begin.
type Order string

const (
	// LPT is what NewSchedule takes: an end of a link that idles first, then the
	// longest processing time. See the package comment.
	LPT Order = "lpt"
	// Listed and Smallest are there to compare with: as in Fleet.Processes, and
	// the shortest first, as far as limits allow it.
	Listed   Order = "listed"
	Smallest Order = "smallest"
)

// Schedule says which migrations may begin, while the caller begins and ends them.
// It has no clock. A process waits, runs, and then is over or has been left out. It is not safe for
// concurrent use.
type Schedule struct {
	limits Limits
	order  Order
	hosts  *hosts
	jobs   []job
	number map[string]int32
	groups []group
	room   room // beside what goes there, or is to go

	running int
	left    int
	out, in []int // migrations that run, by host
	link    map[[2]int32]int

	stands  []stand
	standAt map[[2]int32]int32 // by host and group
	leaving [][]int32          // stands of a host
	coming  [][]int32          // stands with jobs to a host
}

type state uint8

const (
	waits   state = iota
	runs          // begun
	arrived       // over, done
	leftOut       // over, not done
)

type job struct {
	process  Process
	from, to int32
	group    int32 // none: nowhere
	state    state
	seconds  float64
	rank     float64 // the smaller the earlier
}

// NewSchedule begins a schedule of what is in to: processes of f, and the host to
// which each goes. Those that are not in it are no part of the schedule. What is to go to a host
// must fit there, all of it: place it before. f and to are copied as far as they are needed.
func NewSchedule(f Fleet, to map[string]string) (*Schedule, error) { return newSchedule(f, to, LPT) }

func newSchedule(f Fleet, to map[string]string, order Order) (*Schedule, error) {
	x, err := f.validate(false) // it is to that counts
	if err != nil {
		return nil, err
	}
	x.list = slices.Clone(x.list)
	n := len(f.Hosts)
	s := &Schedule{limits: f.Limits, order: order, hosts: x, number: make(map[string]int32, len(to)), room: x.room(),
		out: make([]int, n), in: make([]int, n), link: map[[2]int32]int{},
		standAt: map[[2]int32]int32{}, leaving: make([][]int32, n), coming: make([][]int32, n)}
	groups := s.addGroups(f.Groups)
	for i := range f.Processes {
		p := &f.Processes[i]
		host, ok := to[p.ID]
		if !ok {
			continue
		}
		j := job{process: *p, from: x.number[p.Host], group: nowhere}
		j.process.To = nil
		if g, ok := groups[p.Group]; ok {
			j.group = g
			s.groups[g].left++
			s.groups[g].size++
		}
		if err := s.aim(&j, host); err != nil {
			return nil, err
		}
		s.number[p.ID] = int32(len(s.jobs))
		s.jobs = append(s.jobs, j)
	}
	if len(s.jobs) < len(to) {
		for _, id := range slices.Sorted(maps.Keys(to)) {
			if _, ok := s.number[id]; !ok {
				return nil, invalid("process %s is to go to %s, but is not listed", id, to[id])
			}
		}
	}
	s.rankAll()
	for i := range s.jobs {
		s.enqueue(int32(i))
	}
	for g := range s.groups {
		s.settle(int32(g))
	}
	return s, nil
}

// aim reserves room for a job at its destination.
func (s *Schedule) aim(j *job, host string) error {
	p := &j.process
	h, ok := s.hosts.number[host]
	switch {
	case !ok:
		return invalid("process %s is to go to host %q, which is not listed", p.ID, host)
	case h == j.from:
		return invalid("process %s is to go to %s, where it is", p.ID, host)
	case s.room.processes[h] <= 0:
		return invalid("process %s is to go to %s, which takes %d processes, and as many are to go there already", p.ID, host, s.hosts.list[h].Processes)
	case s.room.memory[h] < p.Memory:
		return invalid("process %s has %s and is to go to %s, which has %s left of %s beside what else is to go there",
			p.ID, size(p.Memory), host, size(s.room.memory[h]), size(s.hosts.list[h].Memory))
	}
	s.room.take(h, p.Memory)
	j.to = h
	j.seconds = p.seconds(min(s.hosts.rate[j.from], s.hosts.rate[h]))
	return nil
}

// rankAll sets the ranks of all jobs.
func (s *Schedule) rankAll() {
	s.rankGroups()
	for i := range s.jobs {
		s.jobs[i].rank = s.rank(int32(i))
	}
}

func (s *Schedule) rank(i int32) float64 {
	j := &s.jobs[i]
	switch s.order {
	case Listed:
		return float64(i)
	case Smallest:
		return j.seconds
	}
	if j.group == nowhere {
		return -j.seconds
	}
	return -j.seconds - s.groups[j.group].tail
}

// Left returns how many have neither begun nor are over.
func (s *Schedule) Left() int { return s.left }

// Running returns how many have begun and are not over.
func (s *Schedule) Running() int { return s.running }

// Begin says that a migration runs, which is counted even where no limit allows
// it. Only what waits can begin, all else is ignored.
func (s *Schedule) Begin(id string) {
	i, ok := s.number[id]
	if !ok || s.jobs[i].state != waits {
		return
	}
	s.dequeue(i)
	s.jobs[i].state = runs
	s.count(i, 1)
}

// End says that a migration is over. Where done is false it is left out: its room at the destination is
// free again, and groups after its own need not wait for it. What waits may be ended, too, without having begun;
// what is over is ignored.
func (s *Schedule) End(id string, done bool) {
	i, ok := s.number[id]
	if !ok || s.jobs[i].state > runs {
		return
	}
	j := &s.jobs[i]
	if j.state == runs {
		s.count(i, -1)
	} else {
		s.dequeue(i)
	}
	if j.state = arrived; !done {
		j.state = leftOut
		s.room.give(j.to, j.process.Memory)
	}
	if j.group != nowhere {
		s.groups[j.group].left--
		s.settle(j.group)
	}
}

// Retry puts back what End has left out, to go to the same host or to another
// one. Groups after its own that have not begun wait for it again. The error says why it cannot: it was not left out, or
// has no room there.
func (s *Schedule) Retry(id, to string) error {
	i, ok := s.number[id]
	if !ok {
		return invalid("process %s is no part of the schedule", id)
	}
	j := &s.jobs[i]
	if j.state != leftOut {
		return invalid("process %s was not left out", id)
	}
	if err := s.aim(j, to); err != nil {
		return err
	}
	j.state, j.rank = waits, s.rank(i)
	s.enqueue(i)
	if j.group != nowhere {
		s.groups[j.group].left++
		s.settle(j.group)
	}
	return nil
}

// count adds a migration to what runs, or takes it away.
func (s *Schedule) count(i int32, n int) {
	j := &s.jobs[i]
	s.running += n
	s.out[j.from] += n
	s.in[j.to] += n
	if s.limits.PerLink > 0 {
		s.link[[2]int32{j.from, j.to}] += n
	}
	if j.group != nowhere {
		s.groups[j.group].running += n
	}
	s.stale(s.leaving[j.from])
	s.stale(s.coming[j.to])
	if s.limits.PerHost > 0 {
		s.stale(s.coming[j.from])
	}
}
