package page

import (
	"slices"
	"sort"
)

// Set is a set of addresses kept as sorted ranges that neither touch nor
// overlap. The zero value is empty. Building one in ascending order costs
// constant time per Add.
type Set struct{ r []Range }

// NewSet returns the set of all addresses in rs, in any order.
func NewSet(rs ...Range) Set {
	var s Set
	rs = slices.Clone(rs)
	slices.SortFunc(rs, func(a, b Range) int {
		switch {
		case a.Start < b.Start:
			return -1
		case a.Start > b.Start:
			return 1
		}
		return 0
	})
	for _, r := range rs {
		s.Add(r)
	}
	return s
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
