package appliance

import (
	"testing"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

// What the destination unmaps for a new layout is told, also where a mapping of
// another kind takes its place.
func TestRemade(t *testing.T) {
	at := func(first, end page.Num) page.Range { return page.Range{Start: first.Addr(), End: end.Addr()} }
	vma := func(first, end page.Num, flags ...string) image.VMA {
		return image.VMA{Range: at(first, end), Kind: image.VMAAnon, Flags: flags}
	}
	object := func(first, end page.Num, memory int, offset page.Num) image.VMA {
		return image.VMA{Range: at(first, end), Kind: image.VMAShared, Shared: true, Memory: memory, Offset: uint64(offset.Addr())}
	}
	file := func(first, end page.Num, path string, ino uint64, offset page.Num) image.VMA {
		return image.VMA{Range: at(first, end), Kind: image.VMAFile, Path: path, File: image.FileID{Ino: ino}, Offset: uint64(offset.Addr())}
	}
	memories := []image.SharedMemory{{ID: image.ObjectID{Ino: 1}}, {ID: image.ObjectID{Ino: 2}}}
	var p process
	for i, c := range []struct {
		layout []image.VMA
		want   page.Set
	}{
		{[]image.VMA{vma(10, 20), vma(20, 30, "nr")}, page.Set{}},
		{[]image.VMA{vma(10, 15), vma(15, 20), vma(20, 40, "nr")}, page.Set{}},
		{[]image.VMA{vma(10, 13), vma(13, 20, "nr"), vma(20, 40, "nr")}, page.NewSet(at(13, 20))},
		{[]image.VMA{vma(10, 13), vma(22, 40, "nr")}, page.NewSet(at(13, 22))},
		{[]image.VMA{vma(10, 13, "nr"), vma(22, 40, "nr")}, page.NewSet(at(10, 13))},
		{[]image.VMA{object(10, 20, 0, 0), vma(22, 40, "nr")}, page.NewSet(at(10, 13))},
		{[]image.VMA{object(10, 15, 0, 0), object(15, 20, 0, 5), vma(22, 40, "nr")}, page.Set{}},
		{[]image.VMA{object(10, 15, 0, 0), object(15, 20, 1, 5), vma(22, 40, "nr")}, page.NewSet(at(15, 20))},
		{[]image.VMA{object(10, 15, 0, 1), object(15, 20, 1, 5)}, page.NewSet(at(10, 15), at(22, 40))},
		{[]image.VMA{file(10, 15, "/a", 1, 1)}, page.NewSet(at(10, 20))},
		{[]image.VMA{file(10, 12, "/a", 1, 1), file(12, 15, "/a", 1, 3)}, page.Set{}},
		{[]image.VMA{file(10, 12, "/a", 1, 1), file(12, 15, "/a", 1, 4)}, page.NewSet(at(12, 15))},
		{[]image.VMA{file(10, 12, "/a", 2, 1), file(12, 15, "/b", 1, 4)}, page.NewSet(at(10, 15))},
	} {
		got := p.remade(&image.Layout{VMAs: c.layout, Memories: memories})
		more, less := page.Difference(&got, &c.want), page.Difference(&c.want, &got)
		if !more.Empty() || !less.Empty() {
			t.Errorf("layout %d: %v, want %v", i, got.Ranges(), c.want.Ranges())
		}
	}
}
