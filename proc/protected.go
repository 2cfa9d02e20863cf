package proc

import (
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// Guard protects all pages in memory inside r, which lies in private mappings of files
// that a userfaultfd has registered for WP_ASYNC, and calls f with those that had no
// protection: what they are, in ascending order. Meanwhile the kernel keeps the process
// from changing its mappings, so r should not be large.
func (p *Pagemap) Guard(r page.Range, f func(r page.Range, k PageKind)) error {
	const here = sys.PageIsWritten | sys.PageIsPresent
	return p.walk(r, sys.PMScanArg{Flags: sys.PMScanWPMatching, CategoryMask: here, ReturnMask: here | sys.PageIsFile},
		func(r page.Range, is uint64) error {
			if is&sys.PageIsFile != 0 {
				f(r, PageFile)
			} else {
				f(r, PageOwn)
			}
			return nil
		})
}

// Unprotected calls f with what of r has no protection, whether there is a page or not,
// and changes nothing. It is the fastest of all walks, 0.5 ms for each GiB: the kernel
// looks at nothing but the entries.
func (p *Pagemap) Unprotected(r page.Range, f func(page.Range)) error {
	j := joiner{to: f}
	err := p.walk(r, sys.PMScanArg{CategoryMask: sys.PageIsWritten, ReturnMask: sys.PageIsWritten},
		func(r page.Range, _ uint64) error {
			j.add(r)
			return nil
		})
	j.end()
	return err
}
