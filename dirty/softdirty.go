package dirty

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// softDirty tracks by the kernel's soft-dirty bits. They are read by one call and
// cleared, all of them, by another, so whatever the order, a running process can
// write in between and not be seen: read first, and what it writes before the
// clearing is lost; clear first, and so is what it wrote before. So it stands
// still for the two.
//
// It also lacks what mremap moves by whole page tables: see tables.
//
// The bit of a page is also set where the kernel only knows that its mapping is
// new or has grown (VM_SOFTDIRTY): a heap that grows is written as a whole.
type softDirty struct {
	pid   int
	stop  Stop
	pm    bits
	clear func() error                   // clears the bits of the process
	list  func() ([]proc.Mapping, error) // of its mappings
	zero  uint64                         // frame of the shared zero page, if known

	mu     sync.Mutex
	closed bool
	shared *shared
	seen   bool
	last   []proc.Mapping // at the last look
	untold untold
	tables tables
}

// bits is what a softDirty needs of a proc.Pagemap.
type bits interface {
	SoftDirty(r page.Range, anon bool, zero uint64, w proc.Walk) error
	Entry(at page.Addr) (proc.Entry, error)
	Close() error
}

func newSoftDirty(pid int, stop Stop, shared *shared) (*softDirty, error) {
	pm, err := proc.OpenPagemap(pid)
	if err != nil {
		return nil, err
	}
	return &softDirty{pid: pid, stop: stop, pm: pm, zero: zeroFrame(), shared: shared,
		clear: func() error { return clearSoftDirty(pid) },
		list:  func() ([]proc.Mapping, error) { return proc.ReadMaps(pid) }}, nil
}

// clearSoftDirty clears the bits of all pages of a process: proc_pid_clear_refs(5).
func clearSoftDirty(pid int) error {
	err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("4"), 0)
	return proc.Gone(pid, err)
}

func (t *softDirty) Method() Method { return SoftDirty }

// Close leaves the bits as they are: they cost nothing but the fault by which
// each next write sets one.
func (t *softDirty) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	return errors.Join(t.pm.Close())
}

func (t *softDirty) Sent(rs []page.Range, buf []byte) { t.shared.sent(rs, buf) }

// Peek tells nothing: it would cost what a look does.
func (t *softDirty) Peek(*page.Set) (page.Set, error) { return page.Set{}, nil }

func (t *softDirty) Last(maps []proc.Mapping) (Pages, error) { return t.Collect(maps) }

func (t *softDirty) Collect(maps []proc.Mapping) (Pages, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return Pages{}, ErrClosed
	}
	p, err := t.collect(maps)
	if err == nil {
		p.Shared, err = t.shared.collect(maps)
	}
	t.seen = err == nil
	if err != nil {
		t.shared.forget()
		return Pages{}, fmt.Errorf("dirty: pid %d: %w", t.pid, err)
	}
	return p, nil
}

func (t *softDirty) collect(asked []proc.Mapping) (Pages, error) {
	resume, err := t.stop()
	if err != nil {
		return Pages{}, fmt.Errorf("stop it to read its soft-dirty bits: %w", err)
	}
	p, err := t.read()
	if err == nil {
		err = t.clear()
	}
	if err := errors.Join(err, resume()); err != nil {
		return Pages{}, err
	}
	if !t.seen {
		p.Written = p.Content.Clone()
	}
	// All bits are cleared, also those of what nobody asked for.
	t.untold.restrict(&p, asked)
	return p, nil
}

// read reads the bits of all private mappings there are. The process stands still.
func (t *softDirty) read() (Pages, error) {
	maps, err := t.list()
	if err != nil {
		return Pages{}, err
	}
	var f found
	all := runs(maps)
	for i := range all {
		w := proc.Walk{Content: f.addContent, Written: f.addWritten, Guard: f.addGuard}
		if err := t.pm.SoftDirty(all[i].Range, all[i].anon, t.zero, w); err != nil {
			return Pages{}, err
		}
	}
	p := f.pages()
	more, err := t.tables.moved(maps, &p.Content, &p.Written, t.frame)
	if err != nil {
		return Pages{}, err
	}
	// New mappings are marked as a whole (VM_SOFTDIRTY), but some kernels lose the
	// mark where they join them to others.
	for _, r := range fresh(t.last, maps) {
		more = append(more, p.Content.Intersect(r)...)
	}
	unmarked := page.NewSet(more...)
	p.Written = page.Union(&p.Written, &unmarked)
	t.last = maps
	return p, nil
}

func (t *softDirty) frame(at page.Addr) (uint64, error) {
	e, err := t.pm.Entry(at)
	return e.Frame, err
}

// fresh returns the parts of the private mappings of now that were not in such a
// mapping of the same file before, at the same place in it.
func fresh(before, now []proc.Mapping) (out []page.Range) {
	i := 0
	for k := range now {
		m := &now[k]
		if !private(m) {
			continue
		}
		at := m.Start
		for i < len(before) && before[i].End <= at {
			i++
		}
		for j := i; j < len(before) && before[j].Start < m.End; j++ {
			b := &before[j]
			if !private(b) || !sameFile(b, m) {
				continue
			}
			if b.Start > at {
				out = append(out, page.Range{Start: at, End: b.Start})
			}
			at = max(at, min(b.End, m.End))
		}
		if at < m.End {
			out = append(out, page.Range{Start: at, End: m.End})
		}
	}
	return out
}

func sameFile(a, b *proc.Mapping) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && (a.Ino == 0 || uint64(a.Start)-a.Offset == uint64(b.Start)-b.Offset)
}
