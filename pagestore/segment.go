package pagestore

import (
	"slices"
	"sort"

	"github.com/pageferry/pageferry/page"
)

// SegmentFlags say what a region is.
type SegmentFlags uint64

const (
	// Written: not registered with the userfaultfd, filled by writing.
	Written SegmentFlags = 1 << iota
	// Shared: MADV_DONTNEED does not drop the content.
	Shared
	// Alias: a second mapping of what another segment leads to.
	Alias
)

// Segment says that the pages of Dst here are those from Src on at the source.
type Segment struct {
	Dst   page.Range
	Src   page.Addr
	Flags SegmentFlags
}

const segWords = 4

// SrcRange is where its pages lie at the source.
func (g Segment) SrcRange() page.Range {
	return page.Range{Start: g.Src, End: g.Src + page.Addr(g.Dst.Bytes())}
}

// part is the piece of g whose addresses here are in r.
func (g Segment) part(r page.Range) Segment {
	x := g.Dst.Intersect(r)
	return Segment{x, g.Src + (x.Start - g.Dst.Start), g.Flags}
}

func compare(a, b page.Addr) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func sortByDst(segs []Segment) {
	slices.SortFunc(segs, func(a, b Segment) int { return compare(a.Dst.Start, b.Dst.Start) })
}

// findSegment returns the segment that holds a; segs are sorted by Dst.
func findSegment(segs []Segment, a page.Addr) (Segment, bool) {
	i := sort.Search(len(segs), func(i int) bool { return segs[i].Dst.End > a })
	if i < len(segs) && segs[i].Dst.Start <= a {
		return segs[i], true
	}
	return Segment{}, false
}

// firstBySrc returns the index of the first segment whose source range ends
// after a; segs are sorted by Src and their source ranges do not overlap.
func firstBySrc(segs []Segment, a page.Addr) int {
	return sort.Search(len(segs), func(i int) bool { return segs[i].SrcRange().End > a })
}

// cut takes r out of segs, which are sorted by Dst, and returns what is left
// and what was taken.
func cut(segs []Segment, r page.Range) (left, taken []Segment) {
	for _, g := range segs {
		if !g.Dst.Overlaps(r) {
			left = append(left, g)
			continue
		}
		taken = append(taken, g.part(r))
		if g.Dst.Start < r.Start {
			left = append(left, g.part(page.Range{Start: g.Dst.Start, End: r.Start}))
		}
		if g.Dst.End > r.End {
			left = append(left, g.part(page.Range{Start: r.End, End: g.Dst.End}))
		}
	}
	return left, taken
}

func readSegs(w []uint64) []Segment {
	segs := make([]Segment, 0, len(w)/segWords)
	for ; len(w) >= segWords; w = w[segWords:] {
		segs = append(segs, Segment{
			page.Range{Start: page.Addr(w[0]), End: page.Addr(w[1])}, page.Addr(w[2]), SegmentFlags(w[3])})
	}
	return segs
}

// setSegs replaces the Go side of the segments.
func (sp *Space) setSegs(segs []Segment) {
	sp.segs = segs
	sp.shared = slices.ContainsFunc(segs, func(g Segment) bool { return g.Flags&(Shared|Written) == Shared })
	sp.bySrc = slices.DeleteFunc(slices.Clone(segs), func(g Segment) bool { return g.Flags&Alias != 0 })
	slices.SortFunc(sp.bySrc, func(a, b Segment) int { return compare(a.Src, b.Src) })
}

// room makes segment table half large enough for n.
func (sp *Space) room(half, n int) error {
	s := sp.st
	if uint64(n) <= s.w[sp.at+pCap0+half] {
		return nil
	}
	n += n/2 + 64
	off, err := s.alloc(n * segWords)
	if err != nil {
		return err
	}
	s.store64(sp.at+pCap0+half, 0)
	s.store64(sp.at+pSegs0+half, uint64(off))
	s.store64(sp.at+pCap0+half, uint64(n))
	return nil
}

// writeSegs puts segs into the table that does not count and, in one store,
// makes it count, with seq messages applied. There must be room.
func (sp *Space) writeSegs(segs []Segment, seq uint64) {
	s := sp.st
	half, _, _ := unpackCommit(s.w[sp.at+pCommit])
	half ^= 1
	w := s.words(int(s.w[sp.at+pSegs0+half]), len(segs)*segWords)
	for i, g := range segs {
		w[i*segWords], w[i*segWords+1] = uint64(g.Dst.Start), uint64(g.Dst.End)
		w[i*segWords+2], w[i*segWords+3] = uint64(g.Src), uint64(g.Flags)
	}
	s.store64(sp.at+pCommit, packCommit(half, len(segs), seq))
	sp.setSegs(segs)
}

const seqMask = 1<<40 - 1

func packCommit(half, segs int, seq uint64) uint64 {
	return uint64(half)<<63 | uint64(segs)&(1<<23-1)<<40 | seq&seqMask
}

func unpackCommit(v uint64) (half, segs int, seq uint64) {
	return int(v >> 63), int(v >> 40 & (1<<23 - 1)), v & seqMask
}
