package inject

import (
	"fmt"
	"sync"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const (
	firstArena = 64 << 10 // bytes mapped by Bootstrap
	growArena  = 1 << 20  // least that is added when it does not suffice
)

// arena is one readable and writable mapping of ours inside the process.
type arena struct {
	page.Range
	next page.Addr
}

// space hands out the memory of a target to its batches.
type space struct {
	mu     sync.Mutex
	arenas []*arena
	// live counts batches whose addresses are in use; when there are none
	// everything is free again.
	live int
}

func (s *space) add(r page.Range) { s.arenas = append(s.arenas, &arena{r, r.Start}) }

// take finds n bytes, 16-aligned, or reports that the space must grow.
func (s *space) take(n uint64) (uint64, bool) {
	n = (n + 15) &^ 15
	for i := len(s.arenas) - 1; i >= 0; i-- {
		a := s.arenas[i]
		if uint64(a.End-a.next) >= n {
			at := a.next
			a.next += page.Addr(n)
			return uint64(at), true
		}
	}
	return 0, false
}

// alloc returns the address of n bytes inside the process, mapping more where
// there are too few.
func (t *Target) alloc(n uint64) (uint64, error) {
	t.space.mu.Lock()
	defer t.space.mu.Unlock()
	if at, ok := t.space.take(n); ok {
		return at, nil
	}
	size := max(growArena, uint64(page.Addr(n).Ceil()))
	at, err := t.mapMore(size)
	if err != nil {
		return 0, fmt.Errorf("map %d bytes more for injected calls in pid %d: %w", size, t.pid, err)
	}
	t.space.add(page.Range{Start: page.Addr(at), End: page.Addr(at + size)})
	at, _ = t.space.take(n)
	return at, nil
}

// mapMore maps memory by a single call on the home thread; its record is in a
// place set aside for it.
func (t *Target) mapMore(size uint64) (uint64, error) {
	b := &Batch{t: t}
	c := b.Call(unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE, ^uint64(0), 0)
	b.recs = t.growRec
	if err := b.Run(t.home); err != nil {
		return 0, err
	}
	return c.ret, nil
}

func (t *Target) retain() {
	t.space.mu.Lock()
	t.space.live++
	t.space.mu.Unlock()
}

func (t *Target) release() {
	t.space.mu.Lock()
	defer t.space.mu.Unlock()
	if t.space.live--; t.space.live == 0 {
		for _, a := range t.space.arenas {
			a.next = a.Start
		}
	}
}
