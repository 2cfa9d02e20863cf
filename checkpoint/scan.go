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

// findContent asks for the whole address space at once: a call for each mapping
// would cost more than the walk.
func findContent(pid int, maps []proc.Mapping) (c content) {
	var whole page.Range
	for i := range maps {
		if maps[i].Name == "[vsyscall]" {
			continue
		}
		if whole.Empty() {
			whole = maps[i].Range
		}
		whole.End = maps[i].End
	}
	pm, err := proc.OpenPagemap(pid)
	if err != nil {
		return content{err: err}
	}
	defer pm.Close()
	c.err = pm.Content(whole, func(r page.Range) { c.own = append(c.own, r) })
	if c.err != nil {
		return c
	}
	// Guards can only be where a mapping says so, on kernels that do ("gu",
	// 6.18); on others every private mapping would have to be asked, so all
	// are, in one walk of what has page tables.
	c.err = pm.Guards(whole, func(r page.Range) { c.guards = append(c.guards, r) })
	return c
}
