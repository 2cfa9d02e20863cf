package proc

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Walk is called with the ranges that a walk finds, each in ascending order. A
// nil function is not called.
type Walk struct {
	Content func(page.Range) // pages of the process's own
	Written func(page.Range) // those of them that were written
	Guard   func(page.Range) // made by MADV_GUARD_INSTALL
}

// Take is Find for the mappings inside r that a userfaultfd has registered for
// WP_ASYNC: it also tells which pages have no write protection, and protects them,
// each at the moment at which it is looked at. Nothing is told of other mappings:
// they are what Untracked is for. anon is that of Find. Meanwhile the kernel keeps
// the process from changing its mappings (mmap_lock), so r should not be large.
func (p *Pagemap) Take(r page.Range, anon bool, w Walk) error {
	return p.tracked(r, anon, sys.PMScanArg{Flags: sys.PMScanWPMatching}, w)
}

// Changed is Take for those who know what had content when they asked before, in
// anonymous memory: it tells what of that is written, and what has no content, and
// nothing of the pages in between, which are nearly all. Those cost a third of what
// they cost Take. Gone may be called for what never had content. Where protect is
// not set it protects nothing, and takes one walk of the page tables instead of two:
// then pages are told again the next time. Of the pages that change between the two
// walks it tells what they are at the second or at a moment between, and the next
// call tells the rest.
func (p *Pagemap) Changed(r page.Range, protect bool, written, gone, guard func(page.Range)) error {
	return p.sighted(func() error {
		if !protect {
			return p.notClean(r, sys.PageIsWritten, written, gone, guard, nil)
		}
		// Both in one walk cannot be: what has no page table would get one, full of
		// notes that what will be there is protected (pagemap_scan_pte_hole,
		// fs/proc/task_mmu.c).
		take := sys.PMScanArg{Flags: sys.PMScanWPMatching, ReturnMask: sys.PageIsPresent,
			CategoryMask: sys.PageIsWritten | sys.PageIsPFNZero, CategoryInverted: sys.PageIsPFNZero,
			CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped}
		if !p.blind {
			take.ReturnMask |= sys.PageIsGuard
		}
		w := joiner{to: written}
		err := p.walk(r, take, func(r page.Range, is uint64) error {
			if is&sys.PageIsGuard == 0 {
				w.add(r)
			}
			return nil
		})
		if err != nil {
			return err
		}
		w.end()
		return p.notClean(r, 0, nil, gone, guard, nil)
	})
}

// Lacking tells which pages of registered mappings inside r, of anonymous memory,
// have no content, and changes nothing. swapped is called for those that are not in
// memory and have content.
func (p *Pagemap) Lacking(r page.Range, gone, guard, swapped func(page.Range)) error {
	return p.sighted(func() error { return p.notClean(r, 0, nil, gone, guard, swapped) })
}

// notClean tells of pages that are not in memory, of the shared zero page, and of
// those that also are also.
func (p *Pagemap) notClean(r page.Range, also uint64, written, gone, guard, swapped func(page.Range)) error {
	a := sys.PMScanArg{
		CategoryMask: sys.PageIsWPAllowed, CategoryInverted: sys.PageIsPresent,
		CategoryAnyof: sys.PageIsPresent | sys.PageIsPFNZero | also,
		ReturnMask:    sys.PageIsPresent | sys.PageIsSwapped | sys.PageIsPFNZero | also,
	}
	if !p.blind {
		a.ReturnMask |= sys.PageIsGuard
	}
	w, n, g, s := joiner{to: written}, joiner{to: gone}, joiner{to: guard}, joiner{to: swapped}
	err := p.walk(r, a, func(r page.Range, is uint64) error {
		switch {
		case is&sys.PageIsGuard != 0:
			n.add(r)
			g.add(r)
			return nil
		case is&sys.PageIsPFNZero != 0, is&(sys.PageIsPresent|sys.PageIsSwapped) == 0:
			n.add(r)
			return nil
		case is&sys.PageIsPresent == 0:
			s.add(r)
		}
		if is&also != 0 {
			w.add(r)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, j := range []*joiner{&w, &n, &g, &s} {
		j.end()
	}
	return nil
}

// Protect protects all pages in registered mappings inside r, which should be in
// memory, and tells nothing: three quarters of the time of Take. What has no page
// gets a note that it will be protected.
func (p *Pagemap) Protect(r page.Range) error {
	a := sys.PMScanArg{Flags: sys.PMScanWPMatching, CategoryMask: sys.PageIsWritten, ReturnMask: sys.PageIsWritten,
		Start: uint64(r.Start), End: uint64(r.End)}
	for a.Start < a.End {
		if _, err := sys.PagemapScan(int(p.f.Fd()), &a, nil); err != nil {
			return Gone(p.pid, err)
		}
		if a.WalkEnd <= a.Start {
			return fmt.Errorf("pagemap of pid %d: the walk of %v does not move on from %#x", p.pid, r, a.Start)
		}
		a.Start = a.WalkEnd
	}
	return nil
}

// Untracked is Find for the mappings inside r that are not registered, and also
// calls all with where they are. Those that are registered cost nothing: the
// kernel does not look into them.
func (p *Pagemap) Untracked(r page.Range, anon bool, all, content, guard func(page.Range)) error {
	const not = sys.PageIsWPAllowed
	tell := func() error {
		a := sys.PMScanArg{CategoryInverted: not, CategoryMask: not,
			ReturnMask: sys.PageIsPresent | sys.PageIsSwapped | sys.PageIsPFNZero}
		if !anon {
			a.ReturnMask |= sys.PageIsFile
		}
		if !p.blind {
			a.ReturnMask |= sys.PageIsGuard
		}
		l, c, g := joiner{to: all}, joiner{to: content}, joiner{to: guard}
		err := p.walk(r, a, func(r page.Range, is uint64) error {
			l.add(r)
			switch {
			case is&sys.PageIsGuard != 0:
				g.add(r)
			case is&(sys.PageIsPresent|sys.PageIsSwapped) == 0, is&(sys.PageIsPFNZero|sys.PageIsFile) != 0:
			case !anon && is&sys.PageIsPresent == 0:
				return p.swapped(r, c.add)
			default:
				c.add(r)
			}
			return nil
		})
		l.end()
		c.end()
		g.end()
		return err
	}
	return p.sighted(tell)
}

// sighted calls f, and calls it again where the kernel is found to know no guards.
func (p *Pagemap) sighted(f func() error) error {
	err := f()
	if err == unix.EINVAL && !p.blind {
		// Nothing was walked: arguments are checked first.
		p.blind = true
		err = f()
	}
	return err
}

func (p *Pagemap) tracked(r page.Range, anon bool, a sys.PMScanArg, w Walk) error {
	return p.sighted(func() error { return p.tell(r, anon, a, w) })
}

func (p *Pagemap) tell(r page.Range, anon bool, a sys.PMScanArg, w Walk) error {
	not := uint64(sys.PageIsPFNZero)
	if !anon {
		not |= sys.PageIsFile
	}
	a.CategoryInverted |= not
	a.CategoryMask |= not
	a.CategoryAnyof = sys.PageIsPresent | sys.PageIsSwapped
	wrote := a.ReturnMask
	if wrote == 0 {
		wrote = sys.PageIsWritten
	}
	a.ReturnMask = sys.PageIsPresent | wrote
	if !p.blind {
		a.ReturnMask |= sys.PageIsGuard
	}
	content, written, guard := joiner{to: w.Content}, joiner{to: w.Written}, joiner{to: w.Guard}
	err := p.walk(r, a, func(r page.Range, is uint64) error {
		if is&sys.PageIsGuard != 0 {
			guard.add(r)
			return nil
		}
		add := func(r page.Range) {
			content.add(r)
			if is&wrote != 0 {
				written.add(r)
			}
		}
		if !anon && is&sys.PageIsPresent == 0 {
			return p.swapped(r, add)
		}
		add(r)
		return nil
	})
	if err != nil {
		return err
	}
	content.end()
	written.end()
	guard.end()
	return nil
}

// From pagemap.rst and <linux/swapops.h>.
const (
	entryPresent   = 1 << 63
	entrySwapped   = 1 << 62
	entryFile      = 1 << 61
	entryProtected = 1 << 57 // by a userfaultfd
	entrySoftDirty = 1 << 55
	entryFrame     = 1<<55 - 1

	// The highest type of swap stands for a marker: no page, but a note where
	// one was (SWP_PTE_MARKER).
	swapTypes = 1<<5 - 1
)

// swapped calls f with those pages of r that are on swap. In a mapping of a file
// the kernel notes the protection of a page that the program gave up
// (MADV_DONTNEED), and PAGEMAP_SCAN takes the note for a page.
func (p *Pagemap) swapped(r page.Range, f func(page.Range)) error {
	j := joiner{to: f}
	err := p.entries(r, func(at page.Addr, e uint64) {
		if e&entryPresent == 0 && e&entrySwapped != 0 && e&swapTypes == swapTypes {
			return
		}
		// It may have come back meanwhile.
		j.add(page.PageOf(at))
	})
	j.end()
	return err
}

// Marked reports whether any page of r has the mark of write protection, whether
// r is registered or not.
func (p *Pagemap) Marked(r page.Range) (bool, error) {
	marked := false
	err := p.walk(r, sys.PMScanArg{
		CategoryInverted: sys.PageIsWritten, CategoryMask: sys.PageIsWritten,
		CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped, ReturnMask: sys.PageIsPresent,
	}, func(page.Range, uint64) error { marked = true; return errFound })
	if err == errFound {
		err = nil
	}
	return marked, err
}

var errFound = errors.New("found")

// Look tells which pages of those in pages have no write protection, and changes
// nothing. Nothing is told of what is not registered.
func (p *Pagemap) Look(pages *page.Set, written func(page.Range)) error {
	// A call for each of many small ranges costs more than to look at what lies
	// between them.
	const near, longest = 256 * page.Size, 128 << 20
	rs := pages.Ranges()
	j := joiner{to: written}
	for i := 0; i < len(rs); {
		span := rs[i]
		k := i + 1
		for k < len(rs) && rs[k].Start-span.End <= near && span.Bytes() < longest {
			span.End = rs[k].End
			k++
		}
		among := rs[i:k]
		i = k
		err := p.walk(span, sys.PMScanArg{
			CategoryMask: sys.PageIsWritten | sys.PageIsWPAllowed | sys.PageIsPresent,
			ReturnMask:   sys.PageIsWritten,
		}, func(r page.Range, _ uint64) error {
			for len(among) > 0 && among[0].End <= r.Start {
				among = among[1:]
			}
			for _, a := range among {
				if a.Start >= r.End {
					break
				}
				j.add(a.Intersect(r))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	j.end()
	return nil
}

// Entry is what the pagemap file says of one page.
type Entry struct {
	Present, Protected, File bool
	Frame                    uint64 // where it is present and the reader is privileged
}

// Entry reads what the pagemap file says of the page at at.
func (p *Pagemap) Entry(at page.Addr) (e Entry, err error) {
	err = p.entries(page.PageOf(at), func(_ page.Addr, b uint64) {
		e = Entry{Present: b&entryPresent != 0, Protected: b&entryProtected != 0, File: b&entryFile != 0}
		if e.Present {
			e.Frame = b & entryFrame
		}
	})
	return e, err
}

// SoftDirty is Find that also tells which pages with content have their
// soft-dirty bit (soft-dirty.rst). Before Linux 6.8 it reads the pagemap file,
// which takes an entry for each page that could be there; then pages of frame
// zero, the shared zero page, are left out (0: it is not known), and there are no
// guards.
func (p *Pagemap) SoftDirty(r page.Range, anon bool, zero uint64, w Walk) error {
	if !p.old {
		err := p.tracked(r, anon, sys.PMScanArg{ReturnMask: sys.PageIsSoftDirty}, w)
		if err != unix.EINVAL && !errors.Is(err, sys.ErrNotSupported) {
			return err
		}
		p.old = true
	}
	return p.slow(r, zero, w)
}

// entries calls f with the entry of each page of r.
func (p *Pagemap) entries(r page.Range, f func(at page.Addr, e uint64)) error {
	const most = 64 << 10
	if p.buf == nil {
		p.buf = make([]byte, most)
	}
	for at := r.Start; at < r.End; {
		b := p.buf[:min(most, page.Range{Start: at, End: r.End}.Pages()*8)]
		n, err := p.f.ReadAt(b, int64(at.Page())*8)
		if n < 8 {
			if err == nil {
				err = errors.New("empty read")
			}
			return p.unreadable(at, err)
		}
		at = decode(b[:n], at, f)
	}
	return nil
}
