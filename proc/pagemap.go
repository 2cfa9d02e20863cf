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

// Content calls f, in ascending order, with the ranges inside r that hold pages
// of the process's own: anonymous memory and changed pages of private file
// mappings, in memory or swapped out, the shared zero page left out. Special
// mappings (vvar) appear too. Where the kernel is older than 6.7, zero pages are
// counted as content.
func (p *Pagemap) Content(r page.Range, f func(page.Range)) error {
	const not = sys.PageIsFile | sys.PageIsPFNZero
	if !p.old && !p.blind {
		err := p.scan(r, not|sys.PageIsGuard, not|sys.PageIsGuard, sys.PageIsPresent|sys.PageIsSwapped, f)
		if err != unix.EINVAL {
			if !errors.Is(err, sys.ErrNotSupported) {
				return err
			}
			p.old = true
		}
		p.blind = true
	}
	if !p.old {
		return p.scan(r, not, not, sys.PageIsPresent|sys.PageIsSwapped, f)
	}
	return p.slow(r, f)
}

// Guards calls g with the ranges inside r that MADV_GUARD_INSTALL made; none
// where the kernel cannot tell.
func (p *Pagemap) Guards(r page.Range, g func(page.Range)) error {
	if p.old || p.blind {
		return nil
	}
	err := p.scan(r, 0, sys.PageIsGuard, 0, g)
	if err == unix.EINVAL || errors.Is(err, sys.ErrNotSupported) {
		return nil
	}
	return err
}

func (p *Pagemap) scan(r page.Range, inverted, mask, anyOf uint64, f func(page.Range)) error {
	a := sys.PMScanArg{
		Start: uint64(r.Start), End: uint64(r.End),
		CategoryInverted: inverted, CategoryMask: mask, CategoryAnyof: anyOf,
		ReturnMask: sys.PageIsPresent,
	}
	var last page.Range
	for a.Start < a.End {
		n, err := sys.PagemapScan(int(p.f.Fd()), &a, p.vec)
		if err != nil {
			return Gone(p.pid, err)
		}
		for _, v := range p.vec[:n] {
			g := page.Range{Start: page.Addr(v.Start), End: page.Addr(v.End)}
			if g.Start == last.End {
				last.End = g.End
				continue
			}
			if !last.Empty() {
				f(last)
			}
			last = g
		}
		if a.WalkEnd <= a.Start {
			return fmt.Errorf("pagemap of pid %d: the walk of %v does not move on from %#x", p.pid, r, a.Start)
		}
		a.Start = a.WalkEnd
	}
	if !last.Empty() {
		f(last)
	}
	return nil
}

// slow reads the entries of the pagemap file one by one.
func (p *Pagemap) slow(r page.Range, f func(page.Range)) error {
	const (
		present = 1 << 63
		swapped = 1 << 62
		file    = 1 << 61
	)
	buf := make([]byte, 64<<10)
	var last page.Range
	for at := r.Start; at < r.End; {
		n := min(len(buf), page.Range{Start: at, End: r.End}.Pages()*8)
		n, err := p.f.ReadAt(buf[:n], int64(at.Page())*8)
		if n == 0 {
			if err == nil {
				err = errors.New("empty read")
			}
			return Gone(p.pid, fmt.Errorf("pagemap of pid %d at %v: %w", p.pid, at, err))
		}
		for i := 0; i+8 <= n; i += 8 {
			e := binary.LittleEndian.Uint64(buf[i:])
			if e&(present|swapped) != 0 && e&file == 0 {
				if last.End == at {
					last.End += page.Size
				} else {
					if !last.Empty() {
						f(last)
					}
					last = page.PageOf(at)
				}
			}
			at += page.Size
		}
	}
	if !last.Empty() {
		f(last)
	}
	return nil
}
