package plan

import "github.com/pageferry/pageferry/page"

// Batches cuts an order into batches of at most Bytes each, for a round: before a
// batch is sent the caller skips what of it was written again since the scan
// (Clark et al. 2005, to_skip), as it will have to be sent again anyway. Small
// batches skip more, large ones cost fewer scans.
type Batches struct {
	Order []page.Set // as History.Order returns it; not changed
	Bytes uint64     // a whole number of pages

	class, index int
	done         uint64 // bytes of the range at index
}

// Next returns the next batch, or false when there is none. A batch is of one
// class only.
func (b *Batches) Next() (page.Set, bool) {
	var out page.Set
	most := max(b.Bytes, page.Size)
	for b.class < len(b.Order) && most > 0 {
		rs := b.Order[b.class].Ranges()
		if b.index == len(rs) {
			b.class, b.index = b.class+1, 0
			if out.Empty() {
				continue
			}
			break
		}
		r := rs[b.index]
		n := min(most, r.Bytes()-b.done)
		start := r.Start + page.Addr(b.done)
		out.Add(page.Range{Start: start, End: start + page.Addr(n)})
		most -= n
		if b.done += n; b.done == r.Bytes() {
			b.index, b.done = b.index+1, 0
		}
	}
	return out, !out.Empty()
}
