package proc

import (
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// Walk is called with the ranges that a walk finds, each in ascending order.
type Walk struct {
	Content func(page.Range) // pages of the process's own
	Written func(page.Range) // those of them that were written
	Guard   func(page.Range) // made by MADV_GUARD_INSTALL
}

// walkPiece is how many bytes are walked in one call: meanwhile the kernel keeps
// the process from changing its mappings (mmap_lock).
const walkPiece = 128 << 20

// Take is Find for mappings that a userfaultfd has registered for WP_ASYNC: it
// also tells which pages have no write protection, and protects them, each at the
// moment at which it is looked at. EPERM where some of r is not registered; some
// of it may have been protected then. anon is that of Find.
func (p *Pagemap) Take(r page.Range, anon bool, w Walk) error {
	not := uint64(sys.PageIsPFNZero)
	if !anon {
		not |= sys.PageIsFile
	}
	tell := uint64(sys.PageIsGuard)
	if p.blind {
		tell = 0
	}
	content, written, guard := joiner{to: w.Content}, joiner{to: w.Written}, joiner{to: w.Guard}
	a := sys.PMScanArg{
		Flags:            sys.PMScanWPMatching | sys.PMScanCheckWPAsync,
		CategoryInverted: not, CategoryMask: not, CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped,
		ReturnMask: sys.PageIsPresent | sys.PageIsWritten | tell,
	}
	for left := r; !left.Empty(); {
		a.Start, a.End = uint64(left.Start), uint64(min(left.End, left.Start+walkPiece))
		left.Start = page.Addr(a.End)
		for a.Start < a.End {
			n, err := sys.PagemapScan(int(p.f.Fd()), &a, p.vec)
			if err != nil {
				return Gone(p.pid, err)
			}
			for _, v := range p.vec[:n] {
				r := page.Range{Start: page.Addr(v.Start), End: page.Addr(v.End)}
				if v.Categories&sys.PageIsGuard != 0 {
					guard.add(r)
					continue
				}
				content.add(r)
				if v.Categories&sys.PageIsWritten != 0 {
					written.add(r)
				}
			}
			if a.WalkEnd <= a.Start {
				return fmt.Errorf("pagemap of pid %d: the walk of %v does not move on from %#x", p.pid, r, a.Start)
			}
			a.Start = a.WalkEnd
		}
	}
	content.end()
	written.end()
	guard.end()
	return nil
}

// Look tells which pages of r have no write protection, and changes nothing.
// Nothing is told of what is not registered.
func (p *Pagemap) Look(r page.Range, written func(page.Range)) error {
	j := joiner{to: written}
	a := sys.PMScanArg{
		Start: uint64(r.Start), End: uint64(r.End),
		CategoryMask: sys.PageIsWritten | sys.PageIsWPAllowed | sys.PageIsPresent,
		ReturnMask:   sys.PageIsWritten,
	}
	for a.Start < a.End {
		n, err := sys.PagemapScan(int(p.f.Fd()), &a, p.vec)
		if err != nil {
			return Gone(p.pid, err)
		}
		for _, v := range p.vec[:n] {
			j.add(page.Range{Start: page.Addr(v.Start), End: page.Addr(v.End)})
		}
		if a.WalkEnd <= a.Start {
			return fmt.Errorf("pagemap of pid %d: the walk of %v does not move on from %#x", p.pid, r, a.Start)
		}
		a.Start = a.WalkEnd
	}
	j.end()
	return nil
}
