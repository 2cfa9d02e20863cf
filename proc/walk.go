package proc

import (
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// walk makes the calls that a walk of r takes, and passes on what they return.
// The address range of a is filled in here.
func (p *Pagemap) walk(r page.Range, a sys.PMScanArg, each func(r page.Range, categories uint64) error) error {
	a.Start, a.End = uint64(r.Start), uint64(r.End)
	for a.Start < a.End {
		n, err := sys.PagemapScan(int(p.f.Fd()), &a, p.vec)
		if err != nil {
			return Gone(p.pid, err)
		}
		for _, v := range p.vec[:n] {
			if err := each(page.Range{Start: page.Addr(v.Start), End: page.Addr(v.End)}, v.Categories); err != nil {
				return err
			}
		}
		if a.WalkEnd <= a.Start {
			return fmt.Errorf("pagemap of pid %d: the walk of %v does not move on from %#x", p.pid, r, a.Start)
		}
		a.Start = a.WalkEnd
	}
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
	if !j.last.Empty() && j.to != nil {
		j.to(j.last)
	}
	j.last = page.Range{}
}
