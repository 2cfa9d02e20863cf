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
	anon   hashKind
	files  hashKind
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

func (t *hash) Last(maps []proc.Mapping) (Pages, error) { return t.Collect(maps) }

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
	var p Pages
	for _, anon := range []bool{false, true} {
		var of []proc.Mapping
		for i := range maps {
			if private(&maps[i]) && anon == (maps[i].Ino == 0) {
				of = append(of, maps[i])
			}
		}
		if len(of) == 0 {
			continue // every process has both: it was not asked for
		}
		if err := t.kind(anon, of, &p); err != nil {
			return Pages{}, err
		}
	}
	var err error
	p.Shared, err = t.shared.collect(maps)
	return p, err
}

// hashKind is what is known of anonymous mappings, or of those of files.
type hashKind struct {
	last    []proc.Mapping // at the last look
	content page.Set
}

// kind looks at the mappings of one kind.
func (t *hash) kind(anon bool, maps []proc.Mapping, p *Pages) error {
	k := &t.files
	if anon {
		k = &t.anon
	}
	// Where a mapping is another one now, the other side makes it anew.
	for _, r := range fresh(k.last, maps) {
		t.hashes.forget(r)
	}
	k.last = maps
	var f found
	for i := range maps {
		c := len(f.content)
		if err := t.pm.Find(maps[i].Range, anon, func(r page.Range) { f.content = append(f.content, r) }, f.addGuard); err != nil {
			return err
		}
		for _, r := range f.content[c:] {
			if err := t.hashes.compare(r, t.read, f.addWritten); err != nil {
				return err
			}
		}
	}
	now := f.pages()
	// What is content no longer the other side drops: it is unknown when it comes
	// back.
	gone := page.Difference(&k.content, &now.Content)
	t.hashes.drop(&gone)
	k.content = now.Content
	p.Content = page.Union(&p.Content, &now.Content)
	p.Written = page.Union(&p.Written, &now.Written)
	p.Guards = page.Union(&p.Guards, &now.Guards)
	return nil
}

func (t *hash) read(b []byte, at page.Addr) error {
	r := page.Range{Start: at, End: at + page.Addr(len(b))}
	return t.mem.ReadPages([]page.Range{r}, b)
}
