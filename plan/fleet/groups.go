package fleet

// group is one of a schedule's.
type group struct {
	Group
	next    []int32 // groups that come after it
	before  []int32
	pending int // of before, those that are not over
	left    int // processes that are not over
	size    int
	running int
	over    bool
	// tail is how many seconds at least come after it: the longest migrations of the
	// groups after it, along the longest chain.
	tail float64
}

func (s *Schedule) addGroups(list []Group) map[string]int32 {
	byName := make(map[string]int32, len(list))
	for i, g := range list {
		byName[g.Name] = int32(i)
		s.groups = append(s.groups, group{Group: g, pending: len(g.After)})
	}
	for i, g := range list {
		for _, a := range g.After {
			s.groups[byName[a]].next = append(s.groups[byName[a]].next, int32(i))
			s.groups[i].before = append(s.groups[i].before, byName[a])
		}
	}
	return byName
}

// settle finds out whether a group is over: nothing of it is left, and all that it
// comes after is over. So who comes after a group without processes comes after all
// that this one comes after.
func (s *Schedule) settle(g int32) {
	x := &s.groups[g]
	over := x.pending == 0 && x.left == 0
	if over == x.over {
		return
	}
	x.over = over
	for _, n := range x.next {
		if over {
			s.groups[n].pending--
		} else {
			s.groups[n].pending++
		}
		s.settle(n)
	}
}

// rankGroups sets the tails.
func (s *Schedule) rankGroups() {
	longest := make([]float64, len(s.groups))
	for i := range s.jobs {
		if j := &s.jobs[i]; j.group != nowhere {
			longest[j.group] = max(longest[j.group], j.seconds)
		}
	}
	known := make([]bool, len(s.groups))
	var tail func(g int32) float64
	tail = func(g int32) float64 {
		x := &s.groups[g]
		if !known[g] {
			for _, n := range x.next {
				x.tail = max(x.tail, longest[n]+tail(n))
			}
			known[g] = true
		}
		return x.tail
	}
	for g := range s.groups {
		tail(int32(g))
	}
}
