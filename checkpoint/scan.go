package checkpoint

import (
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// content is where a process has pages of its own.
type content struct {
	own    []page.Range // ascending
	guards []page.Range
	err    error
}

type scan struct{ done chan content }

// startScan walks the page tables in a goroutine of its own, which ends by
// itself.
func startScan(pid int, maps []proc.Mapping) scan {
	s := scan{make(chan content, 1)}
	go func() { s.done <- findContent(pid, maps) }()
	return s
}

// wait must be called once.
func (s scan) wait() (content, error) {
	c := <-s.done
	return c, c.err
}

// findContent asks for runs of mappings of one sort at once: a call for each
// mapping would cost more than the walk, and the walk of anonymous memory, which
// is nearly all, costs a fraction of the other.
func findContent(pid int, maps []proc.Mapping) (c content) {
	pm, err := proc.OpenPagemap(pid)
	if err != nil {
		return content{err: err}
	}
	defer pm.Close()
	var run page.Range
	var anon bool
	walk := func() {
		if c.err == nil && !run.Empty() {
			c.err = pm.Find(run, anon,
				func(r page.Range) { c.own = append(c.own, r) },
				func(r page.Range) { c.guards = append(c.guards, r) })
		}
	}
	for i := range maps {
		m := &maps[i]
		if m.Name == "[vsyscall]" {
			continue
		}
		if a := m.Ino == 0 && !m.Shared; run.Empty() || a != anon {
			walk()
			run, anon = m.Range, a
		}
		run.End = m.End
	}
	walk()
	return c
}
