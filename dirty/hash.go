package dirty

import (
	"errors"
	"fmt"
	"sync"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// hash tracks by comparing all pages with what was sent: see hashes. It needs
// nothing of the kernel, and reads all memory at each look.
type hash struct {
	pid int

	mu     sync.Mutex
	closed bool
	pm     *proc.Pagemap
	mem    *proc.Memory
	hashes *hashes
	shared *shared
	last   []proc.Mapping
}

func newHash(pid int, hashes *hashes, shared *shared) (*hash, error) {
	pm, err := proc.OpenPagemap(pid)
	if err != nil {
		return nil, err
	}
	mem, err := proc.OpenMemory(pid)
	if err != nil {
		return nil, errors.Join(err, pm.Close())
	}
	return &hash{pid: pid, pm: pm, mem: mem, hashes: hashes, shared: shared}, nil
}

func (t *hash) Method() Method { return Hash }

func (t *hash) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil
	}
	t.closed = true
	return errors.Join(t.pm.Close(), t.mem.Close())
}

func (t *hash) Sent(rs []page.Range, buf []byte) { t.hashes.sent(rs, buf, nil) }

// Peek tells nothing: it would cost what a look does.
func (t *hash) Peek(*page.Set) (page.Set, error) { return page.Set{}, nil }

func (t *hash) Collect(maps []proc.Mapping) (Pages, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return Pages{}, ErrClosed
	}
	p, err := t.collect(maps)
	if err != nil {
		t.hashes.forget(everywhere)
		t.shared.forget()
		return Pages{}, fmt.Errorf("dirty: pid %d: %w", t.pid, err)
	}
	return p, nil
}

func (t *hash) collect(maps []proc.Mapping) (Pages, error) {
	// Where a mapping is another one now, the other side makes it anew.
	for _, r := range fresh(t.last, maps) {
		t.hashes.forget(r)
	}
	t.last = maps
	var f found
	all := runs(maps)
	for i := range all {
		for k := range all[i].maps {
			part := all[i].maps[k].Intersect(all[i].Range)
			c := len(f.content)
			if err := t.pm.Find(part, all[i].anon, func(r page.Range) { f.content = append(f.content, r) }, f.addGuard); err != nil {
				return Pages{}, err
			}
			for _, r := range f.content[c:] {
				if err := t.hashes.compare(r, t.read, f.addWritten); err != nil {
					return Pages{}, err
				}
			}
		}
	}
	p := f.pages()
	var err error
	if p.Shared, err = t.shared.collect(maps); err != nil {
		return Pages{}, err
	}
	both := page.Union(&p.Content, &p.Shared.Content)
	t.hashes.keep(&both)
	return p, nil
}

func (t *hash) read(b []byte, at page.Addr) error {
	r := page.Range{Start: at, End: at + page.Addr(len(b))}
	return t.mem.ReadPages([]page.Range{r}, b)
}
