package proc

import "github.com/pageferry/pageferry/page"

// entrySole is of pages that are mapped once, since Linux 4.2 (pagemap.rst). The zero
// page never is.
const entrySole = 1 << 56

// Resident calls f, in ascending order, with the pages of r that are in memory and
// that a device can be given without the kernel allocating anything. Of private
// mappings those are anonymous ones that nobody else maps: the zero page, pages of a
// file and what a fork or KSM shares would be copied first (FAULT_FLAG_UNSHARE,
// mm/gup.c). Of shared ones, if shared says that r is of such, all that are mapped.
func (p *Pagemap) Resident(r page.Range, shared bool, f func(page.Range)) error {
	is, want := uint64(entryPresent|entryFile|entrySole), uint64(entryPresent|entrySole)
	if shared {
		is, want = entryPresent, entryPresent
	}
	j := joiner{to: f}
	err := p.entries(r, func(at page.Addr, e uint64) {
		if e&is == want {
			j.add(page.PageOf(at))
		}
	})
	j.end()
	return err
}
