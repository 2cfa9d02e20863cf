package restore

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

// userEnd is the end of what mmap and munmap take with four-level page tables.
const userEnd page.Addr = 0x7fff_ffff_f000

// apart is how far what we put into a hole stays from its neighbours: stacks
// grow down, the heap and arenas grow up.
const apart = 256 << 20

// hole finds size bytes that none of taken comes near. It looks above
// seedBase first, where programs rarely have anything.
func hole(size uint64, taken []page.Range) (page.Range, bool) {
	var s page.Set
	for _, r := range taken {
		r.Start -= min(r.Start, apart)
		r.End = min(r.End+apart, userEnd)
		s.Add(r)
	}
	for _, in := range []page.Range{{Start: seedBase, End: userEnd - apart}, {Start: apart, End: seedBase}} {
		for _, g := range s.Gaps(in) {
			g.Start = g.Start.Ceil()
			if g.Bytes() >= size {
				return page.Range{Start: g.Start, End: g.Start + page.Addr(size)}, true
			}
		}
	}
	return page.Range{}, false
}

// layoutOf returns the mappings of the image that take up addresses.
func layoutOf(p *image.Process) []page.Range {
	rs := make([]page.Range, 0, len(p.VMAs))
	for i := range p.VMAs {
		if p.VMAs[i].Kind != image.VMAVsyscall {
			rs = append(rs, p.VMAs[i].Range)
		}
	}
	return rs
}

func overlapsAny(r page.Range, rs []page.Range) bool {
	return slices.ContainsFunc(rs, r.Overlaps)
}

// clear unmaps everything but keep. It may run in parts.
func (s *script) clear(tid int, keep ...page.Range) {
	set := page.NewSet(keep...)
	at := page.Addr(page.Size)
	for _, k := range append(slices.Clone(set.Ranges()), page.Range{Start: userEnd, End: userEnd}) {
		if at < k.Start {
			gap := page.Range{Start: at, End: k.Start}
			s.on(func() string { return "unmap the seed's " + gap.String() })
			s.call(unix.SYS_MUNMAP, uint64(gap.Start), gap.Bytes())
			s.part(tid)
		}
		at = k.End
	}
}
