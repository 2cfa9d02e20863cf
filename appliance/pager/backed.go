package pager

import (
	"context"
	"slices"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/page"
)

// Backed is a mapping of a file that this pager shows.
type Backed struct {
	Range  page.Range `cbor:"1,keyasint"`
	File   int        `cbor:"2,keyasint"` // its number
	Offset uint64     `cbor:"3,keyasint"` // of the beginning of Range, in the file
}

// A page of such a mapping that the program has changed is written over what the file
// has: then the kernel reads that first, by a READ to this process, and the thread that
// writes waits for it with the lock of the address space, as the lock of the space in
// the store. The answer comes by the urgent lane, and whoever reads that may be waiting
// for one of these locks, to place another page. So the page of the file is in the page
// cache before anything is locked. (The kernel may have dropped it again when it is
// written over, or somebody have begun to read it: then the writer waits, but what he
// waits for is on its way.)

// placer is the trap, with that done before.
type placer struct {
	*fault.Trap
	s *server
}

func (p placer) Place(space page.Space, r page.Range, data []byte) (int, error) {
	if err := p.s.underlay(space, r); err != nil {
		return 0, err
	}
	return p.Trap.Place(space, r, data)
}

func (p placer) Zero(space page.Space, r page.Range) (int, error) {
	if err := p.s.underlay(space, r); err != nil {
		return 0, err
	}
	return p.Trap.Zero(space, r)
}

// underlay sees to it that the page cache has what files have at r.
func (s *server) underlay(space page.Space, r page.Range) error {
	list := s.backed.Load()
	if space != 0 || list == nil {
		return nil
	}
	i, _ := slices.BinarySearchFunc(*list, r.Start, func(b Backed, a page.Addr) int {
		if b.Range.End <= a {
			return -1
		}
		return 1
	})
	for ; i < len(*list) && (*list)[i].Range.Start < r.End; i++ {
		b := &(*list)[i]
		part := b.Range.Intersect(r)
		if err := s.cacheFile(s.ctx, b.File, b.Offset+uint64(part.Start-b.Range.Start), part.Bytes()); err != nil {
			return err
		}
	}
	return nil
}

// cacheFile puts a part of a file into the page cache.
func (s *server) cacheFile(ctx context.Context, i int, offset, length uint64) error {
	s.mu.Lock()
	f, size := s.fs, s.shown.Show.Files[i].Size
	s.mu.Unlock()
	if f == nil || offset >= uint64(size) { // beyond its end there is nothing to read
		return nil
	}
	buf := make([]byte, length)
	if err := s.fileSource(i).ReadPages(ctx, page.Num(offset>>page.Shift), buf, page.Demand); err != nil {
		return err
	}
	if err := f.AwaitFile(ctx, i, offset, length); err != nil {
		return err
	}
	return f.StoreFile(i, offset, buf)
}

// setBacked notes whether there are mappings of files, and which of regions are.
func (s *server) setBacked(needed bool, regions []Region) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []Backed
	for _, r := range regions {
		if r.File > 0 && r.File <= len(s.shown.Show.Files) && r.Kind == Written {
			list = append(list, Backed{r.Range, r.File - 1, r.Offset})
		}
	}
	if !needed {
		return nil
	}
	slices.SortFunc(list, func(a, b Backed) int {
		if a.Range.Start < b.Range.Start {
			return -1
		}
		return 1
	})
	s.backed.Store(&list)
	s.shown.Backed, s.shown.Needed = list, true
	return s.saveShown()
}
