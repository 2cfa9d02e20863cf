package fleet

import (
	"fmt"
	"math/rand/v2"
	"testing"
)

// checker follows a schedule on its own books, which it draws from the fleet anew for
// each question. It shares nothing with what it checks.
type checker struct {
	f       Fleet
	to      map[string]string
	running map[string]bool
	done    map[string]bool
	out     map[string]bool // left out
}

func newChecker(f Fleet, to map[string]string) *checker {
	return &checker{f, to, map[string]bool{}, map[string]bool{}, map[string]bool{}}
}

func (c *checker) host(name string) Host {
	for _, h := range c.f.Hosts {
		if h.Name == name {
			return h
		}
	}
	panic("no host " + name)
}

// finished reports whether a group, and all that it comes after, is over.
func (c *checker) finished(name string) bool {
	for _, p := range c.f.Processes {
		if _, moves := c.to[p.ID]; moves && p.Group == name && !c.done[p.ID] && !c.out[p.ID] {
			return false
		}
	}
	for _, g := range c.f.Groups {
		if g.Name == name {
			for _, a := range g.After {
				if !c.finished(a) {
					return false
				}
			}
		}
	}
	return true
}

// broken returns what the migrations that run, and what they have brought, break, or "".
func (c *checker) broken() string {
	all, touch, link, group := 0, map[string]int{}, map[string]int{}, map[string]int{}
	for _, p := range c.f.Processes {
		if !c.running[p.ID] {
			continue
		}
		all++
		touch[p.Host]++
		touch[c.to[p.ID]]++
		link[p.Host+">"+c.to[p.ID]]++
		group[p.Group]++
	}
	l := c.f.Limits
	if l.AtOnce > 0 && all > l.AtOnce {
		return fmt.Sprintf("%d run at once", all)
	}
	for h, n := range touch {
		if l.PerHost > 0 && n > l.PerHost {
			return fmt.Sprintf("%d touch %s", n, h)
		}
	}
	for h, n := range link {
		if l.PerLink > 0 && n > l.PerLink {
			return fmt.Sprintf("%d on %s", n, h)
		}
	}
	for _, g := range c.f.Groups {
		if g.AtOnce > 0 && group[g.Name] > g.AtOnce {
			return fmt.Sprintf("%d of group %s", group[g.Name], g.Name)
		}
	}
	return c.overfull(func(id string) bool { return c.running[id] || c.done[id] })
}

// overfull returns which host has got more than it can take of those that count.
func (c *checker) overfull(counts func(id string) bool) string {
	memory, processes := map[string]uint64{}, map[string]int{}
	for _, p := range c.f.Processes {
		if to, ok := c.to[p.ID]; ok && counts(p.ID) {
			memory[to] += p.Memory
			processes[to]++
		}
	}
	for name := range processes {
		h := c.host(name)
		if h.Memory > 0 && memory[name] > h.Memory || h.Processes > 0 && processes[name] > h.Processes {
			return fmt.Sprintf("host %s has got %d bytes in %d processes", name, memory[name], processes[name])
		}
	}
	return ""
}

// early returns a group that is not over and should be before this process begins.
func (c *checker) early(id string) string {
	for _, p := range c.f.Processes {
		for _, g := range c.f.Groups {
			if p.ID != id || g.Name != p.Group {
				continue
			}
			for _, a := range g.After {
				if !c.finished(a) {
					return fmt.Sprintf("%s of group %s before group %s is over", id, g.Name, a)
				}
			}
		}
	}
	return ""
}

// may reports whether a process could begin now.
func (c *checker) may(id string) bool {
	c.running[id] = true
	ok := c.broken() == "" && c.early(id) == ""
	delete(c.running, id)
	return ok
}

func randomFleet(r *rand.Rand) Fleet {
	var f Fleet
	few := func(n int) int { return max(0, r.IntN(n+3)-2) } // 0 more often
	for i := range 1 + r.IntN(8) {
		h := Host{Name: fmt.Sprintf("h%d", i), Processes: few(6), Rate: float64(few(4)) * 1e6}
		if r.IntN(3) > 0 {
			h.Memory = 1 + r.Uint64N(400)<<20
		}
		f.Hosts = append(f.Hosts, h)
	}
	for i := range r.IntN(5) {
		g := Group{Name: fmt.Sprintf("g%d", i), AtOnce: few(3)}
		for j := range i {
			if r.IntN(3) == 0 {
				g.After = append(g.After, f.Groups[j].Name)
			}
		}
		f.Groups = append(f.Groups, g)
	}
	r.Shuffle(len(f.Groups), func(a, b int) { f.Groups[a], f.Groups[b] = f.Groups[b], f.Groups[a] })
	for i := range r.IntN(25) {
		p := Process{ID: fmt.Sprintf("p%d", i), Host: f.Hosts[r.IntN(len(f.Hosts))].Name, DirtyRate: float64(few(3)) * 5e5}
		if r.IntN(10) > 0 {
			p.Memory = r.Uint64N(200 << 20)
		}
		for _, h := range r.Perm(len(f.Hosts)) {
			if r.IntN(3) > 0 {
				p.To = append(p.To, f.Hosts[h].Name)
			}
		}
		if len(f.Groups) > 0 && r.IntN(4) > 0 {
			p.Group = f.Groups[r.IntN(len(f.Groups))].Name
		}
		f.Processes = append(f.Processes, p)
	}
	f.Limits = Limits{AtOnce: few(5), PerHost: few(4), PerLink: few(3)}
	if r.IntN(3) == 0 {
		f.Limits.Budget = 1e5 + 5e6*r.Float64()
	}
	return f
}

// Of random fleets each process is placed where it may go and there is room, or
// refused for a reason.
func checkPlacement(t *testing.T, f Fleet, p Placement) {
	t.Helper()
	for _, q := range f.Processes {
		to, placed := p.To[q.ID]
		why, refused := p.Refused[q.ID]
		switch {
		case placed == refused:
			t.Fatalf("%s: placed %v, refused %v", q.ID, placed, refused)
		case refused && why == "":
			t.Fatalf("%s is refused without a reason", q.ID)
		case placed && to == q.Host:
			t.Fatalf("%s stays on %s", q.ID, to)
		}
		for i := 0; placed && q.To[i] != to; i++ {
			if i == len(q.To)-1 {
				t.Fatalf("%s goes to %s, and may only go to %v", q.ID, to, q.To)
			}
		}
	}
	if n := len(p.To) + len(p.Refused); n != len(f.Processes) {
		t.Fatalf("%d of %d processes", n, len(f.Processes))
	}
	if why := newChecker(f, p.To).overfull(func(string) bool { return true }); why != "" {
		t.Fatal(why)
	}
}

func TestRandomFleets(t *testing.T) {
	begun, refused, retried, left := 0, 0, 0, 0
	for range 3000 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 1))
		f := randomFleet(r)
		func() {
			defer func() {
				if t.Failed() {
					t.Logf("seed %d: %+v", seed, f)
				}
			}()
			p := Place(f)
			checkPlacement(t, f, p)
			refused += len(p.Refused)
			b, n, l := drive(t, r, f, p.To)
			begun, retried, left = begun+b, retried+n, left+l
		}()
	}
	t.Logf("%d begun, %d refused, %d left out, %d tried again", begun, refused, left, retried)
	if begun < 10_000 || refused < 1000 || retried < 500 || left < 1000 {
		t.Error("too few to tell anything")
	}
}

// drive leads a schedule to its end, in whatever order things happen.
func drive(t *testing.T, r *rand.Rand, f Fleet, to map[string]string) (begun, retried, left int) {
	s, err := NewSchedule(f, to)
	if err != nil {
		t.Fatal(err)
	}
	c := newChecker(f, to)
	var running []string
	for {
		next := s.Next()
		if again := s.Next(); fmt.Sprint(next) != fmt.Sprint(again) {
			t.Fatalf("Next changes something: %v, then %v", next, again)
		}
		some := r.IntN(4) > 0
		if some && len(next) > 0 { // the best of them may go alone, too
			next = next[:1+r.IntN(len(next))]
		}
		for _, id := range next {
			if c.running[id] || c.done[id] || to[id] == "" {
				t.Fatalf("%s is to begin: running %v, done %v", id, c.running[id], c.done[id])
			}
			if why := c.early(id); why != "" {
				t.Fatal(why)
			}
			if why := s.Waits(id); why != "" && len(next) == 1 {
				t.Fatalf("%s may begin, but waits: %s", id, why)
			}
			s.Begin(id)
			s.Begin(id)
			c.running[id] = true
			running = append(running, id)
			begun++
		}
		if why := c.broken(); why != "" {
			t.Fatalf("%s, limits %+v", why, f.Limits)
		}
		waiting := 0
		for id := range to {
			if c.running[id] || c.done[id] || c.out[id] {
				continue
			}
			waiting++
			if may, why := c.may(id), s.Waits(id); may != (why == "") || may && !some {
				t.Fatalf("%s: may begin %v, waits %q", id, may, why)
			}
		}
		if waiting != s.Left() || len(running) != s.Running() {
			t.Fatalf("%d wait and %d run: Left %d, Running %d", waiting, len(running), s.Left(), s.Running())
		}
		if len(running) == 0 {
			if waiting > 0 {
				t.Fatalf("%d wait and nothing runs", waiting)
			}
			return begun, retried, left
		}
		i := r.IntN(len(running))
		id, done := running[i], r.IntN(4) > 0
		running = append(running[:i], running[i+1:]...)
		delete(c.running, id)
		s.End(id, done)
		s.End(id, !done)
		if done {
			c.done[id] = true
			continue
		}
		c.out[id] = true
		left++
		if r.IntN(2) == 0 {
			target := f.Hosts[r.IntN(len(f.Hosts))].Name
			before := to[id]
			if s.Retry(id, target) == nil {
				retried++
				delete(c.out, id)
				to[id] = target
			} else if to[id] = before; target == before {
				t.Fatalf("%s has no room at %s any more", id, target)
			}
		}
		if why := c.overfull(func(id string) bool { return !c.out[id] }); why != "" {
			t.Fatal(why)
		}
	}
}
