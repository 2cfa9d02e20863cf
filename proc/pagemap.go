package proc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Pagemap finds which pages of a process have content. Not for concurrent use.
type Pagemap struct {
	pid int
	f   *os.File
	vec []sys.PageRegion
	buf []byte // for entries
	// old: the kernel has no PAGEMAP_SCAN. blind: it cannot tell guards.
	old, blind bool
}

// OpenPagemap opens /proc/PID/pagemap.
func OpenPagemap(pid int) (*Pagemap, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, Gone(pid, err)
	}
	return &Pagemap{pid: pid, f: f, vec: make([]sys.PageRegion, 4096)}, nil
}

// Close releases the descriptor.
func (p *Pagemap) Close() error { return p.f.Close() }

// Find calls content, in ascending order, with the ranges inside r that hold
// pages of the process's own: anonymous memory and changed pages of private file
// mappings, in memory or swapped out, the shared zero page left out. Special
// mappings (vvar) appear too. It calls guard with those that MADV_GUARD_INSTALL
// made. Where the kernel is older than 6.7, zero pages are counted as content;
// where it cannot tell guards there are none.
//
// anon says that no file is mapped in r. The walk is then several times as fast:
// to tell a page of a file the kernel looks at each page's own structure.
func (p *Pagemap) Find(r page.Range, anon bool, content, guard func(page.Range)) error {
	if !p.old && !p.blind {
		err := p.scan(r, anon, sys.PageIsGuard, content, guard)
		if err != unix.EINVAL {
			if !errors.Is(err, sys.ErrNotSupported) {
				return err
			}
			p.old = true
		}
		p.blind = true
	}
	if !p.old {
		return p.scan(r, anon, 0, content, guard)
	}
	return p.slow(r, 0, Walk{Content: content})
}

// scan walks r once. A guard looks as if it was swapped out, so both come from
// the same walk and are told apart by what is returned of them.
func (p *Pagemap) scan(r page.Range, anon bool, tell uint64, content, guard func(page.Range)) error {
	not := uint64(sys.PageIsPFNZero)
	if !anon {
		not |= sys.PageIsFile
	}
	a := sys.PMScanArg{
		CategoryInverted: not, CategoryMask: not, CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped,
		ReturnMask: sys.PageIsPresent | tell,
	}
	c, g := joiner{to: content}, joiner{to: guard}
	err := p.walk(r, a, func(r page.Range, is uint64) error {
		switch {
		case is&sys.PageIsGuard != 0:
			g.add(r)
		case !anon && is&sys.PageIsPresent == 0:
			return p.swapped(r, c.add)
		default:
			c.add(r)
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.end()
	g.end()
	return nil
}

// slow reads the entries of the pagemap file one by one.
func (p *Pagemap) slow(r page.Range, zero uint64, w Walk) error {
	content, written := joiner{to: w.Content}, joiner{to: w.Written}
	err := p.entries(r, func(at page.Addr, e uint64) {
		if e&(entryPresent|entrySwapped) == 0 || e&entryFile != 0 ||
			zero != 0 && e&entryPresent != 0 && e&entryFrame == zero {
			return
		}
		content.add(page.PageOf(at))
		if e&entrySoftDirty != 0 {
			written.add(page.PageOf(at))
		}
	})
	content.end()
	written.end()
	return err
}

// decode calls f with each entry of b, which begins with that of at, and returns
// the address behind.
func decode(b []byte, at page.Addr, f func(at page.Addr, e uint64)) page.Addr {
	for ; len(b) >= 8; b = b[8:] {
		f(at, binary.LittleEndian.Uint64(b))
		at += page.Size
	}
	return at
}

func (p *Pagemap) unreadable(at page.Addr, err error) error {
	return Gone(p.pid, fmt.Errorf("pagemap of pid %d at %v: %w", p.pid, at, err))
}
