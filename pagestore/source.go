package pagestore

import (
	"fmt"
	"slices"
	"sort"
	"sync/atomic"

	"github.com/pageferry/pageferry/page"
)

// Words of an entry of the source table.
const (
	sID = iota
	sAll
	sAllLen
	sEager
	sEagerLen
	sHot
	sHotLen
	sVeil       // where what is known of veiled memory begins, 0 without
	sourceWords = 8
)

// Span is a run of pages with consecutive numbers in an Index: [First, End).
type Span struct{ First, End int }

// Index numbers the pages of a set, in ascending order of their addresses.
type Index struct {
	r    []page.Range
	base []int // base[i] is the number of the first page of r[i]
	n    int
}

func newIndex(rs []page.Range) Index {
	x := Index{r: rs, base: make([]int, len(rs))}
	for i, r := range rs {
		x.base[i] = x.n
		x.n += r.Pages()
	}
	return x
}

// Set is all pages of the index. It must not be changed.
func (x *Index) Set() page.Set { return page.NewSet(x.r...) }

// Len is the number of pages.
func (x *Index) Len() int { return x.n }

// Find returns the number of the page at a.
func (x *Index) Find(a page.Addr) (int, bool) {
	i := sort.Search(len(x.r), func(i int) bool { return x.r[i].End > a })
	if i == len(x.r) || a < x.r[i].Start {
		return 0, false
	}
	return x.base[i] + int((a.Floor()-x.r[i].Start)>>page.Shift), true
}

// Addr is the address of page number i, which must be less than Len.
func (x *Index) Addr(i int) page.Addr {
	k := sort.Search(len(x.base), func(k int) bool { return x.base[k] > i }) - 1
	return x.r[k].Start + page.Addr(i-x.base[k])<<page.Shift
}

// Run is how many pages from number i on, at most limit, lie one after the
// other in memory.
func (x *Index) Run(i, limit int) int {
	k := sort.Search(len(x.base), func(k int) bool { return x.base[k] > i }) - 1
	return min(limit, x.base[k]+x.r[k].Pages()-i)
}

// Each calls f for every part of r that is in the index: its range and its
// first number.
func (x *Index) Each(r page.Range, f func(part page.Range, first int)) {
	for i := sort.Search(len(x.r), func(i int) bool { return x.r[i].End > r.Start }); i < len(x.r) && x.r[i].Start < r.End; i++ {
		p := x.r[i].Intersect(r)
		f(p, x.base[i]+int((p.Start-x.r[i].Start)>>page.Shift))
	}
}

// spans are the numbers of the pages of set, which must be part of the index.
func (x *Index) spans(rs []page.Range) (out []Span) {
	for _, r := range rs {
		x.Each(r, func(p page.Range, i int) {
			if n := len(out); n > 0 && out[n-1].End == i {
				out[n-1].End = i + p.Pages()
			} else {
				out = append(out, Span{i, i + p.Pages()})
			}
		})
	}
	return out
}

// Source is an address space at the source. Its methods are safe for
// concurrent use.
type Source struct {
	Index
	st     *Store
	id     page.Space
	slot   int
	eager  []Span
	hot    []Span
	spaces atomic.Pointer[[]*Space] // that need its pages; replaced under Store.mu
	// eagerFrom is a lower bound of the first eager page that is missing.
	eagerFrom atomic.Int64
	veil      int // see Veil
	gone      atomic.Pointer[page.Bitmap]
}

// ID is what the source calls it.
func (s *Source) ID() page.Space { return s.id }

// Hot and Eager are the pages that come first.
func (s *Source) Hot() []Span   { return s.hot }
func (s *Source) Eager() []Span { return s.eager }

// AddSource makes a source of the pages in lazy and eager; hot is part of lazy.
// The id must be new.
func (s *Store) AddSource(id page.Space, lazy, eager, hot page.Set) (*Source, error) {
	for _, r := range eager.Ranges() {
		if lazy.BytesIn(r) > 0 {
			return nil, fmt.Errorf("pagestore: space %d: %v is both lazy and eager", id, r)
		}
	}
	all := page.Union(&lazy, &eager)
	for _, set := range []*page.Set{&all, &hot} {
		for _, r := range set.Ranges() {
			if !r.Aligned() {
				return nil, fmt.Errorf("pagestore: space %d: %v is not made of whole pages", id, r)
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.Sources()
	if slices.ContainsFunc(old, func(o *Source) bool { return o.id == id }) {
		return nil, fmt.Errorf("pagestore: space %d is there already", id)
	}
	if len(old) == maxSources {
		return nil, fmt.Errorf("%w: %d sources", ErrFull, maxSources)
	}
	slot := len(old)
	at := sourceTable + slot*sourceWords
	s.store64(at+sID, uint64(id))
	for k, set := range []*page.Set{&all, &eager, &hot} {
		off, err := s.alloc(2 * set.Len())
		if err != nil {
			return nil, err
		}
		for i, r := range set.Ranges() {
			s.w[off+2*i], s.w[off+2*i+1] = uint64(r.Start), uint64(r.End)
		}
		s.store64(at+sAll+2*k, uint64(off))
		s.store64(at+sAllLen+2*k, uint64(set.Len()))
	}
	src, err := s.loadSource(slot)
	if err != nil {
		return nil, err
	}
	now := append(slices.Clone(old), src)
	s.store64(wSources, uint64(len(now)))
	s.sources.Store(&now)
	return src, nil
}

func (s *Store) loadSource(slot int) (*Source, error) {
	at := sourceTable + slot*sourceWords
	src := &Source{st: s, slot: slot, id: page.Space(s.w[at+sID])}
	src.spaces.Store(new([]*Space))
	for k := range 3 {
		off, n := s.w[at+sAll+2*k], s.w[at+sAllLen+2*k]
		if n > uint64(len(s.w)) || off > uint64(len(s.w))-2*n {
			return nil, fmt.Errorf("%w: ranges of source %d", ErrFormat, slot)
		}
		rs := make([]page.Range, n)
		for i := range rs {
			rs[i] = page.Range{Start: page.Addr(s.w[int(off)+2*i]), End: page.Addr(s.w[int(off)+2*i+1])}
			if rs[i].Empty() || !rs[i].Aligned() || i > 0 && rs[i].Start < rs[i-1].End {
				return nil, fmt.Errorf("%w: range %d of source %d is %v", ErrFormat, i, slot, rs[i])
			}
		}
		switch k {
		case 0:
			src.Index = newIndex(rs)
		case 1:
			src.eager = src.spans(rs)
		case 2:
			src.hot = src.spans(rs)
		}
	}
	return src, src.loadVeil()
}

// Spaces are the live spaces that need pages of s.
func (s *Source) Spaces() []*Space { return *s.spaces.Load() }

// Wanted reports whether some space misses page number i.
func (s *Source) Wanted(i int) bool {
	for _, sp := range s.Spaces() {
		if sp.bits.AtomicGet(i) {
			return true
		}
	}
	return false
}

// NextWanted is the first page from i on and before end that some space misses,
// or end.
func (s *Source) NextWanted(i, end int) int {
	best := end
	for _, sp := range s.Spaces() {
		best = min(best, sp.bits.NextSet(i, end))
	}
	return best
}

// EagerLeft reports whether an eager page is missing.
func (s *Source) EagerLeft() bool {
	from := int(s.eagerFrom.Load())
	for _, e := range s.eager {
		if e.End <= from {
			continue
		}
		if i := s.NextWanted(max(from, e.First), e.End); i < e.End {
			s.eagerFrom.Store(int64(i))
			return true
		}
		from = e.End
	}
	s.eagerFrom.Store(int64(from))
	return false
}

// EagerMissing is how many eager pages are missing.
func (s *Source) EagerMissing() (n int) {
	for _, e := range s.eager {
		for i := s.NextWanted(e.First, e.End); i < e.End; i = s.NextWanted(i+1, e.End) {
			n++
		}
	}
	return n
}
