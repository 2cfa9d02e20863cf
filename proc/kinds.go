package proc

import (
	"errors"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// PageKind is what a page of a private mapping of a file is.
type PageKind uint8

const (
	PageFile  PageKind = iota // the file's own, mapped
	PageOwn                   // changed by the process, in memory or swapped out
	PageGuard                 // made by MADV_GUARD_INSTALL
)

// Kinds calls f, in ascending order, with what is in r, which lies in private
// mappings of files; ranges that touch may be of one kind. Not with what was never
// accessed. Where the kernel cannot tell guards there are none.
func (p *Pagemap) Kinds(r page.Range, f func(r page.Range, k PageKind)) error {
	if !p.old {
		err := p.sighted(func() error { return p.kinds(r, f) })
		if !errors.Is(err, sys.ErrNotSupported) {
			return err
		}
		p.old = true
	}
	return p.entries(r, func(at page.Addr, e uint64) {
		switch {
		case e&entryPresent != 0 && e&entryFile != 0:
			f(page.PageOf(at), PageFile)
		case e&entryPresent != 0, e&entrySwapped != 0 && e&swapTypes != swapTypes:
			f(page.PageOf(at), PageOwn)
		}
	})
}

func (p *Pagemap) kinds(r page.Range, f func(r page.Range, k PageKind)) error {
	a := sys.PMScanArg{CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped, ReturnMask: sys.PageIsPresent | sys.PageIsFile}
	if !p.blind {
		a.ReturnMask |= sys.PageIsGuard
	}
	return p.walk(r, a, func(r page.Range, is uint64) error {
		switch {
		case is&sys.PageIsGuard != 0:
			f(r, PageGuard)
		case is&sys.PageIsFile != 0:
			f(r, PageFile)
		case is&sys.PageIsPresent == 0:
			return p.swapped(r, func(r page.Range) { f(r, PageOwn) })
		default:
			f(r, PageOwn)
		}
		return nil
	})
}
