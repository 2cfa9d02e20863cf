package appliance

import (
	"slices"
	"testing"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/page"
)

// Where a mapping has grown over what another shows, and is replaced first, the other keeps
// its content.
func TestEmptied(t *testing.T) {
	const ino = 9
	s := &settling{ino: ino, views: []pager.View{{Range: page.Range{Start: 0x100000, End: 0x200000}, Shadow: 0x900000}}}
	at := func(a, end page.Addr) page.Range { return page.Range{Start: a, End: end} }
	parts := []checkpoint.SettlePart{
		{Range: at(0x100000, 0x110000), Ino: ino, Offset: 0x100000, Shadow: 0x900000},
		{Range: at(0x5000000, 0x5008000), Ino: ino, Offset: 0x10c000, Shadow: 0x700000}, // new memory, over 0x10c000 to 0x114000
		{Range: at(0x110000, 0x120000), Ino: ino, Offset: 0x110000, Shadow: 0x910000},
		{Range: at(0x130000, 0x140000), Ino: ino + 1, Offset: 0x130000, Shadow: 0x930000}, // of another file
	}
	want := []page.Range{at(0x100000, 0x110000), at(0x110000, 0x120000)}
	if got := emptied(s.parts(parts)); !slices.Equal(got, want) {
		t.Errorf("emptied: %v, want %v", got, want)
	}
	if got := emptied(s.parts(parts[1:2])); len(got) != 0 {
		t.Errorf("%v count as empty, which another mapping shows still", got)
	}
}
