package pagestore

import (
	"slices"

	"github.com/pageferry/pageferry/page"
)

// Change applies messages to a space: pages that were given up are settled at
// once, and a new layout holds from Commit on, which counts the messages as
// applied in the same step. After a kill before Commit the messages are there
// still, and applying them again does no harm. The space's Lock must be held
// from Begin to Commit, or to where the change is forgotten.
type Change struct {
	sp    *Space
	segs  []Segment
	moved bool
}

// Begin returns a change that does nothing yet.
func (sp *Space) Begin() *Change { return &Change{sp: sp, segs: sp.segs} }

// Space is what the change is of.
func (c *Change) Space() *Space { return c.sp }

// Occupied reports whether something of r is known to be mapped.
func (c *Change) Occupied(r page.Range) bool {
	return slices.ContainsFunc(c.segs, func(g Segment) bool { return g.Dst.Overlaps(r) })
}

// Drop settles the missing pages whose place here is in r, because the program
// gave up their content. keepShared spares the regions whose content the
// program does not own alone.
func (c *Change) Drop(r page.Range, keepShared bool) {
	for _, g := range c.segs {
		if g.Dst.Overlaps(r) && (g.Flags&Shared == 0 || !keepShared) {
			c.dropSegment(g.part(r))
		}
	}
}

func (c *Change) dropSegment(g Segment) {
	if g.Flags&Alias != 0 {
		return
	}
	n := 0
	c.sp.src.Each(g.SrcRange(), func(p page.Range, first int) {
		n += c.sp.Settle(first, first+p.Pages())
	})
	if !c.sp.Forked() {
		c.sp.st.Add(Dropped, uint64(n))
	}
}

// Unmap takes out what was at r, and settles it.
func (c *Change) Unmap(r page.Range) {
	c.Drop(r, false)
	if c.Occupied(r) {
		c.segs, _ = cut(c.segs, r)
		c.moved = true
	}
}

// Remap moves what is at [from, from+length) to to, in the place of what was
// there. A length of zero is mremap's second mapping of shared memory.
func (c *Change) Remap(from, to page.Addr, length uint64) {
	c.moved = true
	if length == 0 {
		c.alias(from, to)
		return
	}
	left, moved := cut(c.segs, page.Range{Start: from, End: from + page.Addr(length)})
	c.segs = left
	c.Unmap(page.Range{Start: to, End: to + page.Addr(length)})
	delta := to - from // wraps around where to is below from
	for i := range moved {
		moved[i].Dst.Start += delta
		moved[i].Dst.End += delta
	}
	c.add(moved)
}

// alias maps what begins at from at to as well, as far as it is in one piece.
func (c *Change) alias(from, to page.Addr) {
	delta := to - from
	var more []Segment
	for _, g := range c.segs { // ascending
		if g.Dst.Contains(from) {
			a := g.part(page.Range{Start: from, End: g.Dst.End})
			from = a.Dst.End
			a.Dst.Start, a.Dst.End, a.Flags = a.Dst.Start+delta, a.Dst.End+delta, a.Flags|Alias
			more = append(more, a)
		}
	}
	for _, a := range more {
		c.Unmap(a.Dst)
	}
	c.add(more)
}

func (c *Change) add(segs []Segment) {
	all := append(slices.Clone(c.segs), segs...)
	sortByDst(all)
	c.segs = merge(all)
}

// merge joins neighbours that continue each other, in place.
func merge(segs []Segment) []Segment {
	out := segs[:0]
	for _, g := range segs {
		if n := len(out); n > 0 && out[n-1].Dst.End == g.Dst.Start && out[n-1].Flags == g.Flags && out[n-1].SrcRange().End == g.Src {
			out[n-1].Dst.End = g.Dst.End
			continue
		}
		out = append(out, g)
	}
	return out
}

// Fork makes the space of the child that message number k of those pending
// brought: it needs what its parent is missing, at the places that hold now. fd
// is the child's userfaultfd. The child is returned locked, so that nothing is
// placed before what else is known was applied to it. Where a killed pager has
// made it already, made is false, and fd not used.
func (c *Change) Fork(k, fd int) (child *Space, made bool, err error) {
	sp, s := c.sp, c.sp.st
	key := sp.Seq() + uint64(k) + 1
	for _, o := range s.Spaces() {
		if s.load64(o.at+pParent) == uint64(sp.slot+1) && s.load64(o.at+pParentSeq) == key && o.Lock() {
			return o, false, nil
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	child, err = s.newSpace(sp.src, len(c.segs))
	if err != nil {
		return nil, false, err
	}
	n := sp.bits.Len()
	for i := sp.bits.NextSet(0, n); i < n; {
		j := sp.bits.NextClear(i, n)
		child.missing.Add(int64(child.bits.AtomicSetRange(i, j)))
		i = sp.bits.NextSet(j, n)
	}
	child.SetFD(fd)
	child.SetMemFD(-1)
	s.store64(child.at+pParent, uint64(sp.slot+1))
	s.store64(child.at+pParentSeq, key)
	child.writeSegs(slices.Clone(c.segs), 0)
	s.store64(child.at+pState, stateLive)
	child.mu.Lock() // nobody knows it yet
	s.list(child)
	return child, true, nil
}

// Commit makes the new layout hold and counts the first n pending messages as
// applied. On error, ErrFull, nothing of that has happened.
func (c *Change) Commit(n int) error {
	sp, s := c.sp, c.sp.st
	seq := sp.Seq()
	if c.moved {
		s.mu.Lock()
		half, _, _ := unpackCommit(s.load64(sp.at + pCommit))
		err := sp.room(half^1, len(c.segs))
		s.mu.Unlock()
		if err != nil {
			return err
		}
		sp.writeSegs(c.segs, seq+uint64(n))
	} else {
		half, segs, _ := unpackCommit(s.load64(sp.at + pCommit))
		s.store64(sp.at+pCommit, packCommit(half, segs, seq+uint64(n)))
	}
	for k := range n {
		s.store64(sp.slotWord(seq+uint64(k)), 0)
	}
	sp.pending -= n
	return nil
}
