package checkpoint

import (
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// content is where a process has pages of its own.
type content struct {
	own    page.Set
	guards page.Set
	err    error
}

type scan struct{ done chan content }

// startScan walks the page tables in a goroutine of its own, which ends by
// itself: first those of mappings of files, which are few pages as a rule, then
// those of anonymous memory.
// find takes the place of the walk where it is not nil.
func startScan(pid int, maps []proc.Mapping, find Finder) (few, most scan) {
	few, most = scan{make(chan content, 1)}, scan{make(chan content, 1)}
	walk := func(anon bool) content {
		if find == nil || !anon {
			return findContent(pid, maps, anon)
		}
		var c content
		c.own, c.guards, c.err = find(maps)
		return c
	}
	go func() {
		few.done <- walk(false)
		most.done <- walk(true)
	}()
	return few, most
}

// wait must be called once.
func (s scan) wait() (content, error) {
	c := <-s.done
	return c, c.err
}

// walkPiece is how many bytes of mappings are walked at once: meanwhile the kernel
// keeps the process from changing its mappings (mmap_lock), as the calls do that
// it is made to make. 128 MiB of small pages take 0.4 ms.
const walkPiece = 128 << 20

// findContent asks for runs of private mappings of one sort at once: a call for
// each mapping would cost more than the walk, and the walk of anonymous memory,
// which is nearly all, costs a fraction of the other. What shared mappings show
// is not the process's own.
func findContent(pid int, maps []proc.Mapping, anon bool) (c content) {
	pm, err := proc.OpenPagemap(pid)
	if err != nil {
		return content{err: err}
	}
	defer pm.Close()
	var run page.Range
	var mapped uint64 // of it
	walk := func() {
		if c.err == nil && !run.Empty() {
			c.err = pm.Find(run, anon, c.own.Add, c.guards.Add)
		}
		run, mapped = page.Range{}, 0
	}
	for i := range maps {
		m := &maps[i]
		if m.Name == "[vsyscall]" {
			continue
		}
		if m.Shared || anon != (m.Ino == 0) {
			walk()
			continue
		}
		for left := m.Range; !left.Empty(); {
			if run.Empty() {
				run.Start = left.Start
			}
			n := min(left.Bytes(), walkPiece-mapped)
			left.Start += page.Addr(n)
			run.End, mapped = left.Start, mapped+n
			if mapped == walkPiece {
				walk()
			}
		}
	}
	walk()
	return c
}
