package transport

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/pageferry/pageferry/page"
)

// Remote is memory of the peer that this end may read one-sided: pages of a space,
// at the addresses that they have there, by a key.
type Remote struct {
	Space page.Space
	Range page.Range
	Key   uint32
}

// Remotes is what a peer has offered. It is not changed any more once it is shared.
type Remotes struct{ sorted []Remote }

// NewRemotes takes over rs. They must not overlap, nor be empty.
func NewRemotes(rs []Remote) (*Remotes, error) {
	slices.SortStableFunc(rs, func(a, b Remote) int {
		return cmp.Or(cmp.Compare(a.Space, b.Space), cmp.Compare(a.Range.Start, b.Range.Start))
	})
	for i, r := range rs {
		if r.Range.Empty() || !r.Range.Aligned() || i > 0 && rs[i-1].Space == r.Space && rs[i-1].Range.End > r.Range.Start {
			return nil, fmt.Errorf("%w: remote memory %v overlaps another, or is not whole pages", ErrDamaged, r.Range)
		}
	}
	return &Remotes{rs}, nil
}

// Len is how many there are. A nil Remotes has none.
func (r *Remotes) Len() int {
	if r == nil {
		return 0
	}
	return len(r.sorted)
}

// All returns them in order; not to be changed.
func (r *Remotes) All() []Remote {
	if r == nil {
		return nil
	}
	return r.sorted
}

// Split returns the parts of rs that can be read, each of one Remote, and the rest. rs
// is in order.
func (r *Remotes) Split(space page.Space, rs []page.Range) (read []Remote, rest []page.Range) {
	if r.Len() == 0 {
		return nil, rs
	}
	for _, w := range rs {
		i, _ := slices.BinarySearchFunc(r.sorted, w.Start, func(m Remote, at page.Addr) int {
			if m.Space != space {
				return cmp.Compare(m.Space, space)
			}
			if m.Range.End <= at {
				return -1
			}
			return 1
		})
		for ; i < len(r.sorted) && r.sorted[i].Space == space && r.sorted[i].Range.Start < w.End && !w.Empty(); i++ {
			m := r.sorted[i]
			part := m.Range.Intersect(w)
			if part.Empty() {
				continue
			}
			if part.Start > w.Start {
				rest = append(rest, page.Range{Start: w.Start, End: part.Start})
			}
			read = append(read, Remote{space, part, m.Key})
			w.Start = part.End
		}
		if !w.Empty() {
			rest = append(rest, w)
		}
	}
	return read, rest
}
