package fault

import (
	"errors"
	"sync"

	"github.com/pageferry/pageferry/page"
)

// everything is any address that a source has.
var everything = page.Range{Start: 0, End: highest}

// sight is what a process sees: src at at.
type sight struct{ at, src page.Range }

// part is what is seen of s at r.
func (s sight) part(r page.Range) (at, src page.Range) {
	at = s.at.Intersect(r)
	if at.Empty() {
		return at, at
	}
	start := s.src.Start + (at.Start - s.at.Start)
	return at, page.Range{Start: start, End: start + page.Addr(at.Bytes())}
}

// seen is what a process saw when it was looked at last, and which of its addresses
// show only copies of its own and zeros: what it has moved with mremap, and what it
// has gained by that. The file goes on there in a way that means nothing.
type seen struct {
	sights []sight
	own    page.Set
}

// src are the pages of the source that it sees by the file.
func (s *seen) src() (out page.Set) {
	for _, g := range s.sights {
		at := page.NewSet(g.at)
		at = page.Difference(&at, &s.own)
		for _, r := range at.Ranges() {
			_, src := g.part(r)
			out.Add(src)
		}
	}
	return out
}

// memory is what is known of each process.
type memory struct {
	mu sync.Mutex
	by map[int]*seen
}

// of is what is known of pid; mu is held.
func (v *Veil) of(pid int) *seen {
	s := v.memory.by[pid]
	if s == nil { // since the veil began, or since it was forked
		s = new(seen)
		for _, r := range v.cfg.Views.Ranges() {
			s.sights = append(s.sights, sight{r, r})
		}
		if parent := v.memory.by[v.cfg.PID]; parent != nil && pid != v.cfg.PID {
			s.own = parent.own.Clone()
		}
		v.memory.by[pid] = s
	}
	return s
}

// lost is what pid saw and does not see any more. What it has moved becomes its own.
func (v *Veil) lost(pid int, moves []mover) (lost page.Set, err error) {
	at, from, err := v.cfg.Shows(pid, everything)
	if err != nil {
		return lost, err
	}
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	was, before := s.sights, s.src()
	s.sights = nil
	var there page.Set
	for i := range at {
		s.sights = append(s.sights, sight{at[i], from[i]})
		there.Add(at[i])
	}
	s.own = page.Intersection(&s.own, &there)
	for _, m := range moves {
		if m.pid == pid {
			err = errors.Join(err, v.follow(pid, s, was, m.move))
		}
	}
	now := s.src()
	return page.Difference(&before, &now), err
}

// follow makes pid's own what it has moved. The call waits, so nobody has looked there
// yet. What has grown is new and zero, where the file would show what comes next; and
// zero is what was moved away, where it was not unmapped (MREMAP_DONTUNMAP).
func (v *Veil) follow(pid int, s *seen, was []sight, m move) (err error) {
	var src page.Range
	for _, w := range was {
		if _, part := w.part(page.Range{Start: m.from, End: m.from + m.old}); !part.Empty() {
			src = part
			break
		}
	}
	if src.Empty() {
		return nil
	}
	for _, n := range s.sights {
		if !n.src.Contains(src.Start) {
			continue
		}
		at := n.at.Start + (src.Start - n.src.Start) // where it begins now
		switch {
		case at != m.from:
			moved := page.Range{Start: at, End: at + page.Addr(src.Bytes())}
			err = errors.Join(err, v.cfg.Own(pid, moved))
			s.own.Add(moved)
			err = errors.Join(err, v.fresh(pid, s, n, page.Range{Start: moved.End, End: at + m.size}))
		case m.stays:
			err = errors.Join(err, v.fresh(pid, s, n, page.Range{Start: at, End: at + m.old}))
		}
	}
	return err
}

// fresh makes zero what pid sees at r by n.
func (v *Veil) fresh(pid int, s *seen, n sight, r page.Range) error {
	at, src := n.part(r)
	if at.Empty() {
		return nil
	}
	s.own.Add(at)
	return v.cfg.Blank(pid, at, src)
}

// doubles are other places than at, of pid, where the file shows what it sees there.
func (v *Veil) doubles(pid int, at page.Range) bool {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	if s.own.BytesIn(at) == 0 {
		return false
	}
	src := s.src()
	for _, g := range s.sights {
		if _, p := g.part(at); !p.Empty() && src.BytesIn(p) > 0 {
			return true
		}
	}
	return false
}

// Settled says that pid sees parts of the source no longer by the file, but has them
// as they were.
func (v *Veil) Settled(pid int, at page.Set) {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	var left []sight
	for _, g := range s.sights {
		rest := page.NewSet(g.at)
		rest = page.Difference(&rest, &at)
		for _, r := range rest.Ranges() {
			a, src := g.part(r)
			left = append(left, sight{a, src})
		}
	}
	s.sights = left
}

// Own are the addresses of pid in r where it has copies of its own of all that is not
// zero, so that the file does not count.
func (v *Veil) Own(pid int, r page.Range) page.Set {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	return page.NewSet(s.own.Intersect(r)...)
}
