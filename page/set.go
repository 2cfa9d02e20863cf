package page

import (
	"cmp"
	"slices"
	"sort"
)

// Set is a set of addresses kept as sorted ranges that neither touch nor
// overlap. The zero value is empty. Building one in ascending order costs
// constant time per Add.
type Set struct{ r []Range }

// NewSet returns the set of all addresses in rs, in any order. What is in
// ascending order is not sorted: a fragmented process has hundreds of thousands.
func NewSet(rs ...Range) Set {
	byStart := func(a, b Range) int { return cmp.Compare(a.Start, b.Start) }
	if !slices.IsSortedFunc(rs, byStart) {
		rs = slices.Clone(rs)
		slices.SortFunc(rs, byStart)
	}
	var s Set
	if len(rs) > 0 {
		s.r = make([]Range, 0, len(rs))
	}
	for _, r := range rs {
		s.Add(r)
	}
	return s
}

// Union returns what is in a or in b. It may share memory with them: neither it
// nor they may be changed then, but by Clone.
func Union(a, b *Set) Set {
	switch {
	case a.Empty():
		return *b
	case b.Empty():
		return *a
	}
	out := Set{make([]Range, 0, len(a.r)+len(b.r))}
	for x, y := a.r, b.r; len(x)+len(y) > 0; {
		if len(y) == 0 || len(x) > 0 && x[0].Start <= y[0].Start {
			out.Add(x[0])
			x = x[1:]
		} else {
			out.Add(y[0])
			y = y[1:]
		}
	}
	return out
}

// Difference returns what is in a and not in b, in time linear in their ranges.
// It may share memory with a: see Union.
func Difference(a, b *Set) Set {
	if a.Empty() || b.Empty() {
		return *a
	}
	out := Set{make([]Range, 0, len(a.r))}
	y := b.r
	for _, r := range a.r {
		for len(y) > 0 && y[0].End <= r.Start {
			y = y[1:]
		}
		// What of b overlaps r may reach into the next range of a, so that y
		// stays at it.
		for _, cut := range y {
			if cut.Start >= r.End {
				break
			}
			if cut.Start > r.Start {
				out.r = append(out.r, Range{r.Start, cut.Start})
			}
			r.Start = cut.End
			if r.Empty() {
				break
			}
			y = y[1:]
		}
		if !r.Empty() {
			out.r = append(out.r, r)
		}
	}
	return out
}

// Intersection returns what is in a and in b, in time linear in their ranges.
// It shares memory with neither.
func Intersection(a, b *Set) Set {
	var out Set
	for x, y := a.r, b.r; len(x) > 0 && len(y) > 0; {
		if r := x[0].Intersect(y[0]); !r.Empty() {
			out.r = append(out.r, r)
		}
		if x[0].End < y[0].End {
			x = x[1:]
		} else {
			y = y[1:]
		}
	}
	return out
}

// Ranges returns the ranges in ascending order. The slice is s's own: read only.
func (s *Set) Ranges() []Range { return s.r }

// Len is the number of ranges.
func (s *Set) Len() int { return len(s.r) }

// Empty reports whether s has no address.
func (s *Set) Empty() bool { return len(s.r) == 0 }

// Bytes is the number of bytes in s.
func (s *Set) Bytes() (n uint64) {
	for _, r := range s.r {
		n += r.Bytes()
	}
	return n
}

// Pages is the number of pages in s; its ranges must be aligned.
func (s *Set) Pages() uint64 { return s.Bytes() >> Shift }

// Clone returns a copy that shares nothing with s.
func (s *Set) Clone() Set { return Set{slices.Clone(s.r)} }

// first returns the index of the first range that ends after a.
func (s *Set) first(a Addr) int {
	return sort.Search(len(s.r), func(i int) bool { return s.r[i].End > a })
}

// Find returns the range that holds a.
func (s *Set) Find(a Addr) (Range, bool) {
	i := s.first(a)
	if i < len(s.r) && s.r[i].Start <= a {
		return s.r[i], true
	}
	return Range{}, false
}

// Contains reports whether a is in s.
func (s *Set) Contains(a Addr) bool { _, ok := s.Find(a); return ok }

// Add puts r into s.
func (s *Set) Add(r Range) {
	if r.Empty() {
		return
	}
	n := len(s.r)
	if n == 0 || s.r[n-1].End < r.Start {
		s.r = append(s.r, r)
		return
	}
	i := sort.Search(n, func(i int) bool { return s.r[i].End >= r.Start })
	j := i
	for j < n && s.r[j].Start <= r.End {
		r.Start = min(r.Start, s.r[j].Start)
		r.End = max(r.End, s.r[j].End)
		j++
	}
	s.r = slices.Replace(s.r, i, j, r)
}

// Remove takes r out of s and returns what was there, in ascending order.
func (s *Set) Remove(r Range) []Range {
	if r.Empty() {
		return nil
	}
	i := s.first(r.Start)
	j := i
	var cut, keep []Range
	for j < len(s.r) && s.r[j].Start < r.End {
		g := s.r[j]
		cut = append(cut, g.Intersect(r))
		if g.Start < r.Start {
			keep = append(keep, Range{g.Start, r.Start})
		}
		if g.End > r.End {
			keep = append(keep, Range{r.End, g.End})
		}
		j++
	}
	if j > i {
		s.r = slices.Replace(s.r, i, j, keep...)
	}
	return cut
}

// Intersect returns the parts of s inside r, in ascending order.
func (s *Set) Intersect(r Range) []Range {
	if r.Empty() {
		return nil
	}
	var out []Range
	for i := s.first(r.Start); i < len(s.r) && s.r[i].Start < r.End; i++ {
		out = append(out, s.r[i].Intersect(r))
	}
	return out
}

// BytesIn is the number of bytes of s inside r.
func (s *Set) BytesIn(r Range) (n uint64) {
	if r.Empty() {
		return 0
	}
	for i := s.first(r.Start); i < len(s.r) && s.r[i].Start < r.End; i++ {
		n += s.r[i].Intersect(r).Bytes()
	}
	return n
}

// Covers reports whether all of r is in s.
func (s *Set) Covers(r Range) bool {
	if r.Empty() {
		return true
	}
	got, ok := s.Find(r.Start)
	return ok && got.End >= r.End
}

// Gaps returns the parts of r that are not in s, in ascending order.
func (s *Set) Gaps(r Range) []Range {
	var out []Range
	at := r.Start
	for _, c := range s.Intersect(r) {
		if c.Start > at {
			out = append(out, Range{at, c.Start})
		}
		at = c.End
	}
	if at < r.End {
		out = append(out, Range{at, r.End})
	}
	return out
}
