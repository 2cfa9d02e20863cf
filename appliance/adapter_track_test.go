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
	} {
		got := p.remade(c.layout)
		more, less := page.Difference(&got, &c.want), page.Difference(&c.want, &got)
		if !more.Empty() || !less.Empty() {
			t.Errorf("layout %d: %v, want %v", i, got.Ranges(), c.want.Ranges())
		}
	}
}
