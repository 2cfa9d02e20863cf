package codec

// sampler gives up by itself what finds nothing: if in a window of so many fewer
// than one in worth of those it took were hits, it takes half as many in the next,
// down to one in 16, and twice as many again when there are more.
type sampler struct {
	window, worth int
	shift         uint8
	seen, hits    int
}

const maxShift = 4

// takes reports whether the one with that hash is among those to take.
func (s *sampler) takes(hash uint32) bool { return hash&(1<<s.shift-1) == 0 }

// note counts one that was taken.
func (s *sampler) note(hit bool) {
	s.seen++
	if hit {
		s.hits++
	}
	if s.seen < s.window>>s.shift {
		return
	}
	if s.hits*s.worth < s.seen {
		s.shift = min(s.shift+1, maxShift)
	} else if s.shift > 0 {
		s.shift--
	}
	s.seen, s.hits = 0, 0
}
