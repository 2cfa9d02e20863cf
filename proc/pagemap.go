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
	not := uint64(sys.PageIsPFNZero)
	if !anon {
		not |= sys.PageIsFile
	}
	if !p.old && !p.blind {
		err := p.scan(r, not, sys.PageIsGuard, content, guard)
		if err != unix.EINVAL {
			if !errors.Is(err, sys.ErrNotSupported) {
				return err
			}
			p.old = true
		}
		p.blind = true
	}
	if !p.old {
		return p.scan(r, not, 0, content, guard)
	}
	return p.slow(r, content)
}

// scan walks r once. A guard looks as if it was swapped out, so both come from
// the same walk and are told apart by what is returned of them.
func (p *Pagemap) scan(r page.Range, not, tell uint64, content, guard func(page.Range)) error {
	a := sys.PMScanArg{
		Start: uint64(r.Start), End: uint64(r.End),
		CategoryInverted: not, CategoryMask: not, CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped,
		ReturnMask: sys.PageIsPresent | tell,
	}
	c, g := joiner{to: content}, joiner{to: guard}
	for a.Start < a.End {
		n, err := sys.PagemapScan(int(p.f.Fd()), &a, p.vec)
		if err != nil {
			return Gone(p.pid, err)
		}
		for _, v := range p.vec[:n] {
			j := &c
			if v.Categories&sys.PageIsGuard != 0 {
				j = &g
			}
			j.add(page.Range{Start: page.Addr(v.Start), End: page.Addr(v.End)})
		}
		if a.WalkEnd <= a.Start {
			return fmt.Errorf("pagemap of pid %d: the walk of %v does not move on from %#x", p.pid, r, a.Start)
		}
		a.Start = a.WalkEnd
	}
	c.end()
	g.end()
	return nil
}

// joiner passes ranges on, those that touch as one.
type joiner struct {
	to   func(page.Range)
	last page.Range
}

func (j *joiner) add(r page.Range) {
	if r.Start == j.last.End && !j.last.Empty() {
		j.last.End = r.End
		return
	}
	j.end()
	j.last = r
}

func (j *joiner) end() {
	if !j.last.Empty() {
		j.to(j.last)
	}
	j.last = page.Range{}
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
