package fleet

import (
	"fmt"
	"slices"
)

// Placement is what [Place] returns. Each process is in one of both.
type Placement struct {
	To      map[string]string // process to host
	Refused map[string]string // process to why it was not placed, for people
}

// Place chooses a host for each process, never the one where it is, and never more
// on a host than that can take.
//
// It is balanced by time: the processes, those with most to send first, go each to the
// host whose link will have been busy for the shortest time with it; of equals the one that comes
// first in To wins. Where that leaves no room for a process, one that has been placed
// makes room if it can go elsewhere. At the end processes move away from the host that
// would be the last to finish, as long as that makes it earlier.
//
// It is a heuristic: to find out whether all fit is bin packing. A process that is
// refused might be placed by hand. f must be valid ([Fleet.Validate]); what is
// not is refused.
func Place(f Fleet) Placement {
	p := Placement{To: make(map[string]string, len(f.Processes)), Refused: map[string]string{}}
	x, err := f.hosts()
	if err != nil {
		for i := range f.Processes {
			p.Refused[f.Processes[i].ID] = err.Error()
		}
		return p
	}
	b := &placer{hosts: x, procs: f.Processes, room: x.room(), at: make([]int32, len(f.Processes)), to: make([][]int32, len(f.Processes)),
		busy: make([]float64, len(x.list)), has: make([][]int32, len(x.list)), effort: mostEffort}
	var order, over []int32
	seen := make(map[string]bool, len(f.Processes))
	for i := range f.Processes {
		q, unknown := &f.Processes[i], ""
		b.at[i] = nowhere
		if seen[q.ID] {
			continue
		}
		seen[q.ID] = true
		if b.to[i], unknown = x.resolve(q.To); unknown != "" {
			p.Refused[q.ID] = fmt.Sprintf("it may go to host %q, which is not listed", unknown)
			continue
		}
		order = append(order, int32(i))
	}
	slices.SortStableFunc(order, func(i, j int32) int {
		a, b := f.Processes[i].bytes(usualRate), f.Processes[j].bytes(usualRate)
		return sign(b - a)
	})
	for _, i := range order {
		if h := b.best(i); h != nowhere {
			b.put(i, h)
		} else if !b.squeeze(i) {
			over = append(over, i)
		}
	}
	b.improve()
	for _, i := range over { // what has moved may have made room
		if h := b.best(i); h != nowhere {
			b.put(i, h)
		}
	}
	for _, i := range over {
		if b.at[i] == nowhere {
			p.Refused[f.Processes[i].ID] = b.why(i)
		}
	}
	for i, h := range b.at {
		if h != nowhere {
			p.To[f.Processes[i].ID] = x.list[h].Name
		}
	}
	return p
}

func sign(v float64) int {
	switch {
	case v < 0:
		return -1
	case v > 0:
		return 1
	}
	return 0
}

const nowhere = -1

// mostEffort bounds how many pairs of a process and a host squeeze and improve look at,
// so that a fleet that does not fit is found out in the time of one that does.
const mostEffort = 20_000_000

// placer has what is placed so far. Processes and hosts are by number.
type placer struct {
	*hosts
	procs  []Process
	room   room
	at     []int32   // where a process goes
	to     [][]int32 // where it may go
	busy   []float64 // seconds that a host's link takes for what comes
	has    [][]int32 // processes that come to a host
	effort int
}

func (b *placer) put(i, h int32) {
	p := &b.procs[i]
	b.room.take(h, p.Memory)
	b.busy[h] += p.seconds(b.rate[h])
	b.has[h] = append(b.has[h], i)
	b.at[i] = h
}

func (b *placer) take(i int32) {
	p, h := &b.procs[i], b.at[i]
	b.room.give(h, p.Memory)
	b.busy[h] -= p.seconds(b.rate[h])
	b.has[h] = slices.DeleteFunc(b.has[h], func(o int32) bool { return o == i })
	b.at[i] = nowhere
}

// best returns the host with room where a process would have arrived first.
func (b *placer) best(i int32) int32 {
	p, best, least := &b.procs[i], int32(nowhere), 0.0
	for _, h := range b.to[i] {
		if !b.room.fits(h, p.Memory) || b.list[h].Name == p.Host || h == b.at[i] {
			continue
		}
		if t := b.busy[h] + p.seconds(b.rate[h]); best == nowhere || t < least {
			best, least = h, t
		}
	}
	b.effort -= len(b.to[i])
	return best
}

// squeeze places a process by moving another one to a host that has room for it.
func (b *placer) squeeze(i int32) bool {
	p := &b.procs[i]
	for _, h := range b.to[i] {
		if b.list[h].Name == p.Host {
			continue
		}
		for _, o := range b.has[h] {
			b.effort--
			q := &b.procs[o]
			full := b.room.processes[h] <= 0
			if b.effort < 0 {
				return false
			}
			if b.room.memory[h]+q.Memory < p.Memory || !full && q.Memory == 0 {
				continue
			}
			if g := b.best(o); g != nowhere {
				b.take(o)
				b.put(o, g)
				b.put(i, h)
				return true
			}
		}
	}
	return false
}

// improve moves processes away from the host that finishes last, to where each
// arrives earliest. It ends, as each move makes a host that is last less busy and no other
// one as busy as it was.
func (b *placer) improve() {
	for len(b.busy) > 0 && b.effort > 0 {
		var last int32
		for h := range b.busy {
			if b.busy[h] > b.busy[last] {
				last = int32(h)
			}
		}
		move, to, least := int32(nowhere), int32(nowhere), b.busy[last]*(1-1e-9) // rounding is no gain
		for _, i := range b.has[last] {
			h := b.best(i)
			if h == nowhere {
				continue
			}
			if t := b.busy[h] + b.procs[i].seconds(b.rate[h]); t < least {
				move, to, least = i, h, t
			}
		}
		if move == nowhere {
			return
		}
		b.take(move)
		b.put(move, to)
	}
}

// why says what keeps a process from all hosts that it may go to.
func (b *placer) why(i int32) string {
	p, others, room, freest := &b.procs[i], 0, 0, int32(nowhere)
	for _, h := range b.to[i] {
		if b.list[h].Name == p.Host {
			continue
		}
		others++
		if b.room.processes[h] > 0 {
			if room++; freest == nowhere || b.room.memory[h] > b.room.memory[freest] {
				freest = h
			}
		}
	}
	switch {
	case len(b.to[i]) == 0:
		return "there is no host that it may go to"
	case others == 0:
		return fmt.Sprintf("it may only go to %s, where it is", p.Host)
	case room == 0:
		return fmt.Sprintf("none of the %d hosts that it may go to takes another process", others)
	default:
		return fmt.Sprintf("it has %s, and of the %d hosts that it may go to %s has most room left, %s",
			size(p.Memory), others, b.list[freest].Name, size(b.room.memory[freest]))
	}
}
