package fault

import (
	"errors"
	"slices"
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
// show only copies of its own and zeros: what it has gained by mremap. The file goes on
// there in a way that means nothing.
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
	mu      sync.Mutex
	by      map[int]*seen
	changed bool // since it was saved
	moves   []VeiledMove
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
			s.own, s.sights = parent.own.Clone(), slices.Clone(parent.sights)
		}
		v.memory.by[pid] = s
		v.memory.changed = true
	}
	return s
}

// scan is what pid sees now. The list of its mappings is not read at once: what another
// thread moves meanwhile can be missed, or found twice. Such a thread then waits for us
// before it can move anything again, so it is so in one of two scans at most.
func (v *Veil) scan(pid int) (out []sight, err error) {
	var scans [2][]sight
	for i := range scans {
		at, src, err := v.cfg.Shows(pid, everything)
		if err != nil {
			return nil, err
		}
		for k := range at {
			scans[i] = append(scans[i], sight{at[k], src[k]})
		}
	}
	out = scans[1]
	var there page.Set
	for _, g := range out {
		there.Add(g.src)
	}
	for _, g := range scans[0] {
		rest := page.NewSet(g.src)
		rest = page.Difference(&rest, &there)
		for _, r := range rest.Ranges() {
			start := g.at.Start + (r.Start - g.src.Start)
			out = append(out, sight{page.Range{Start: start, End: start + page.Addr(r.Bytes())}, r})
		}
	}
	return out, nil
}

// lost is what pid saw and does not see any more. What is moving is asked for when that
// has been looked at: of what was moved the thread is known, for it waits.
func (v *Veil) lost(pid int) (lost page.Set, err error) {
	now, err := v.scan(pid)
	if err != nil {
		return lost, err
	}
	under, err := v.moving()
	if err != nil {
		return lost, err
	}
	for _, m := range v.moves {
		if !slices.Contains(under, m) {
			under = append(under, m)
		}
	}
	under = slices.DeleteFunc(under, func(m mover) bool { return slices.Contains(v.followed, m) })
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	was, before := s.sights, s.src()
	old := was
	s.sights = now
	var there page.Set
	for _, g := range now {
		there.Add(g.at)
	}
	own := page.Intersection(&s.own, &there)
	if !slices.Equal(was, now) {
		v.memory.changed = true
	}
	// What is being unmapped may be gone, and show again by what has grown over it.
	for _, m := range under {
		if m.pid == pid && m.unmap {
			was = without(was, page.NewSet(page.Range{Start: m.from, End: m.from + m.old}))
		}
	}
	for _, m := range under {
		if m.pid == pid && !m.unmap {
			found, ferr := v.follow(pid, s, was, &own, m.move)
			if err = errors.Join(err, ferr); found {
				v.followed = append(v.followed, m)
			}
		}
	}
	for _, m := range under {
		if r := (page.Range{Start: m.from, End: m.from + m.old}); m.pid == pid && m.unmap && !sameAt(old, now, r) {
			v.followed = append(v.followed, m)
		}
	}
	for _, n := range now {
		for _, r := range grown(n, old, now, &own) {
			own.Add(r)
		}
	}
	if !slices.Equal(s.own.Ranges(), own.Ranges()) {
		v.memory.changed = true
	}
	s.own = own
	after := s.src()
	return page.Difference(&before, &after), err
}

// follow finds where m has gone. What has grown is new and zero, where the file goes on
// with what lay behind it; and zero is what was moved away, where it was not unmapped
// (MREMAP_DONTUNMAP). The call waits, so nobody has looked there yet.
func (v *Veil) follow(pid int, s *seen, was []sight, own *page.Set, m move) (found bool, err error) {
	old := page.Range{Start: m.from, End: m.from + m.old}
	var from, src page.Range
	for _, w := range was {
		if from, src = w.part(old); !from.Empty() {
			break
		}
	}
	if from.Empty() || from.Start != m.from {
		return false, nil // nothing of ours, or seen to before
	}
	for _, n := range s.sights {
		if !n.src.Contains(src.Start) {
			continue
		}
		at := n.at.Start + (src.Start - n.src.Start) // where it begins now
		if at != m.from && showed(was, at, src.Start) {
			continue // that is something else, which had grown before
		}
		end := at + m.old
		if at != m.from {
			own.Remove(page.Range{Start: at, End: max(end, at+m.size)}) // what was there before
			for _, r := range s.own.Intersect(old) {
				own.Add(page.Range{Start: at + (r.Start - m.from), End: at + (r.End - m.from)})
			}
			if m.stays {
				err = errors.Join(err, v.fresh(pid, s, nil, own, old))
			} else {
				own.Remove(old)
			}
			// What ends where it was may grow over that, and nobody is told.
			if slices.ContainsFunc(s.sights, func(g sight) bool { return g.at.End == m.from && g.src.End == src.Start }) {
				now := page.NewSet(page.Range{Start: at, End: end})
				now = page.Difference(&now, own)
				for _, r := range now.Ranges() {
					if oerr := v.cfg.Own(pid, r); oerr != nil {
						err = errors.Join(err, oerr)
						continue
					}
					own.Add(r)
				}
			}
		}
		if m.size > m.old {
			err = errors.Join(err, v.fresh(pid, s, was, own, page.Range{Start: end, End: at + m.size}))
		}
		if at != m.from {
			found = true // else it may not have happened yet
			break
		}
	}
	return found, err
}

// grown are the parts of n, one of now, by which a mapping has grown in place since it was
// was: of that no event tells. The file goes on there, with what others see, or saw; as
// the program's own it is zero when it is settled. What has moved there is not seen any
// more where it was.
func grown(n sight, was, now []sight, own *page.Set) (out []page.Range) {
	rest := page.NewSet(n.at)
	rest = page.Difference(&rest, own)
	for _, w := range was {
		if at, src := w.part(n.at); !at.Empty() {
			if _, is := n.part(at); is == src {
				rest.Remove(at)
			}
		}
	}
	for _, r := range rest.Ranges() {
		if r.Start == n.at.Start {
			continue // it is not behind anything
		}
		_, src := n.part(r)
		new := page.NewSet(r)
		for _, w := range was {
			x := w.src.Intersect(src)
			if x.Empty() {
				continue
			}
			if there := w.at.Start + (x.Start - w.src.Start); !showed(now, there, x.Start) {
				start := r.Start + (x.Start - src.Start)
				new.Remove(page.Range{Start: start, End: start + page.Addr(x.Bytes())})
			}
		}
		out = append(out, new.Ranges()...)
	}
	return out
}

// showed reports whether the file showed address src at at.
func showed(was []sight, at, src page.Addr) bool {
	for _, w := range was {
		if w.at.Contains(at) && w.src.Start+(at-w.at.Start) == src {
			return true
		}
	}
	return false
}

// fresh makes zero what pid sees at r and did not see there before.
func (v *Veil) fresh(pid int, s *seen, was []sight, own *page.Set, r page.Range) (err error) {
	for _, n := range s.sights {
		at, _ := n.part(r)
		if at.Empty() {
			continue
		}
		fresh := page.NewSet(at)
		fresh = page.Difference(&fresh, own)
		for _, w := range was {
			if a, src := w.part(at); !a.Empty() {
				if _, now := n.part(a); now == src {
					fresh.Remove(a)
				}
			}
		}
		for _, a := range fresh.Ranges() {
			_, src := n.part(a)
			own.Add(a)
			err = errors.Join(err, v.cfg.Blank(pid, a, src))
		}
	}
	return err
}

// sameAt reports whether both show the same at r.
func sameAt(a, b []sight, r page.Range) bool {
	at := func(sights []sight) (out []sight) {
		for _, g := range sights {
			if at, src := g.part(r); !at.Empty() {
				out = append(out, sight{at, src})
			}
		}
		return out
	}
	return slices.Equal(at(a), at(b))
}

// without are the parts of sights that are not at gone.
func without(sights []sight, gone page.Set) (left []sight) {
	for _, g := range sights {
		rest := page.NewSet(g.at)
		rest = page.Difference(&rest, &gone)
		for _, r := range rest.Ranges() {
			at, src := g.part(r)
			left = append(left, sight{at, src})
		}
	}
	return left
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

// Expected reports whether pid, which stands still, is known to see src at at. If not, a
// mapping has grown over that in place: it is the program's own from now on.
func (v *Veil) Expected(pid int, at, src page.Range) bool {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	rest := page.NewSet(at)
	for _, w := range s.sights {
		if a, is := w.part(at); !a.Empty() && is.Start == src.Start+(a.Start-at.Start) {
			rest.Remove(a)
		}
	}
	for _, r := range rest.Ranges() {
		s.own.Add(r)
		v.memory.changed = true
	}
	v.noted()
	return rest.Empty()
}

// Again says that pid sees src at at by the file after all.
func (v *Veil) Again(pid int, at, src page.Range) {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	s.sights = append(without(s.sights, page.NewSet(at)), sight{at, src})
	v.memory.changed = true
	v.noted()
}

// Settled says that pid sees parts of the source no longer by the file, but has them
// as they were.
func (v *Veil) Settled(pid int, at page.Set) {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	s.sights = without(s.sights, at)
	v.memory.changed = true
	v.noted()
}

// noted keeps what was learned from whoever settles the memory: what grows or moves there
// later is nothing of the file's. mu is held.
func (v *Veil) noted() {
	if err := v.keepState(); err != nil {
		v.log.Error("what is known of the program's memory cannot be saved", "err", err)
	}
}

// Own are the addresses of pid in r where it has copies of its own of all that is not
// zero, so that the file does not count.
func (v *Veil) Own(pid int, r page.Range) page.Set {
	v.memory.mu.Lock()
	defer v.memory.mu.Unlock()
	s := v.of(pid)
	return page.NewSet(s.own.Intersect(r)...)
}
