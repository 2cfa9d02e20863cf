package fleet

import (
	"math"
	"slices"
)

// usualRate is taken where no rate is known: 10 Gbit/s.
const usualRate = 1.25e9

// each is how many seconds a migration takes beside its bytes: connections, looks,
// the switch. It keeps a thousand small processes from counting as nothing.
const each = 0.1

// hosts are numbered: a fleet has a million pairs of a process and a host that it may
// go to, too many to look names up each time.
type hosts struct {
	list   []Host
	number map[string]int32
	rate   []float64
	// lists are the last To that were resolved: a group's processes mostly have the
	// same one.
	lists []list
}

type list struct {
	names []string
	to    []int32
}

const mostLists = 8

func (f *Fleet) hosts() (*hosts, error) {
	x := &hosts{list: f.Hosts, number: make(map[string]int32, len(f.Hosts))}
	slowest := math.Inf(1)
	for i, h := range f.Hosts {
		switch _, twice := x.number[h.Name]; {
		case h.Name == "":
			return x, invalid("host %d of %d has no name", i+1, len(f.Hosts))
		case twice:
			return x, invalid("host %s is listed twice", h.Name)
		case h.Processes < 0:
			return x, invalid("host %s takes %d processes: must be 0, for no limit, or more", h.Name, h.Processes)
		case !amount(h.Rate):
			return x, invalid("host %s has a rate of %v bytes per second: must be 0, for not known, or more", h.Name, h.Rate)
		}
		x.number[h.Name] = int32(i)
		if h.Rate > 0 {
			slowest = min(slowest, h.Rate)
		}
	}
	if math.IsInf(slowest, 1) {
		slowest = usualRate
	}
	x.rate = make([]float64, len(f.Hosts))
	for i, h := range f.Hosts {
		if x.rate[i] = h.Rate; h.Rate == 0 {
			x.rate[i] = slowest
		}
	}
	return x, nil
}

// resolve returns the numbers of hosts, or the first that does not exist.
func (x *hosts) resolve(names []string) ([]int32, string) {
	if len(names) == 0 {
		return nil, ""
	}
	for _, l := range x.lists {
		if len(l.names) == len(names) && (&l.names[0] == &names[0] || slices.Equal(l.names, names)) {
			return l.to, ""
		}
	}
	to := make([]int32, len(names))
	for i, name := range names {
		n, ok := x.number[name]
		if !ok {
			return nil, name
		}
		to[i] = n
	}
	if len(x.lists) == mostLists {
		x.lists = slices.Delete(x.lists, 0, 1)
	}
	x.lists = append(x.lists, list{names, to})
	return to, ""
}

// bytes is how much a process will send over a link of that rate: its memory, and
// once more what it dirties meanwhile, which after that is not worth a round or
// little (rule 3 of package plan).
func (p *Process) bytes(rate float64) float64 {
	return float64(p.Memory) * (1 + min(1, p.DirtyRate/rate))
}

// seconds is how long its migration takes if it has a link of that rate for itself.
func (p *Process) seconds(rate float64) float64 { return each + p.bytes(rate)/rate }

// room is what hosts can still take.
type room struct {
	memory    []uint64
	processes []int
}

func (x *hosts) room() room {
	r := room{make([]uint64, len(x.list)), make([]int, len(x.list))}
	for i, h := range x.list {
		if r.memory[i], r.processes[i] = h.Memory, h.Processes; h.Memory == 0 {
			r.memory[i] = math.MaxUint64
		}
		if h.Processes == 0 {
			r.processes[i] = math.MaxInt
		}
	}
	return r
}

func (r *room) fits(h int32, memory uint64) bool { return r.memory[h] >= memory && r.processes[h] > 0 }

func (r *room) take(h int32, memory uint64) {
	r.memory[h] -= memory
	r.processes[h]--
}

func (r *room) give(h int32, memory uint64) {
	r.memory[h] += memory
	r.processes[h]++
}
