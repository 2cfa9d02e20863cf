package checkpoint

import (
	"encoding/binary"

	"github.com/pageferry/pageferry/page"
)

// robustLimit is how far the kernel follows a robust list (ROBUST_LIST_LIMIT,
// include/uapi/linux/futex.h).
const robustLimit = 2048

// atExit are the pages that the kernel touches for a thread that ends. Faults of
// an exiting task do not reach a userfaultfd: handle_userfault (fs/userfaultfd.c)
// gives up, and so does the kernel, silently. A mutex would stay locked by a
// thread that is no more, a join wait for ever. So these come before it runs.
func (c *capture) atExit() (pages []page.Range) {
	add := func(a uint64) { pages = append(pages, page.PageOf(page.Addr(a))) }
	for i := range c.p.Threads {
		t := &c.p.Threads[i]
		if t.Robust != 0 {
			c.robust(t.Robust, add)
		}
		// The kernel writes to the rseq area before the thread does anything,
		// and by an ordinary fault.
		if t.ClearTID != 0 && (t.Rseq.Ptr == 0 || page.PageOf(page.Addr(t.ClearTID)) != page.PageOf(page.Addr(t.Rseq.Ptr))) {
			add(t.ClearTID)
		}
	}
	return pages
}

// robust calls add for all that the kernel touches of a robust list with entries
// (set_robust_list(2)): its head, its entries and their futex words. What cannot
// be read here the kernel cannot follow there.
func (c *capture) robust(head uint64, add func(uint64)) {
	m := c.s.mem.Load()
	var h [24]byte
	if m == nil || m.ReadAt(h[:], page.Addr(head)) != nil {
		return
	}
	const pi = 1 // the lowest bit says that it is a priority-inheriting mutex
	entry, offset, pending := binary.LittleEndian.Uint64(h[:]), binary.LittleEndian.Uint64(h[8:]), binary.LittleEndian.Uint64(h[16:])
	if entry&^pi == head && pending == 0 {
		return
	}
	add(head)
	add(head + 16)
	if pending != 0 {
		add(pending&^pi + offset)
	}
	for range robustLimit {
		entry &^= pi
		if entry == head || entry == 0 {
			return
		}
		add(entry)
		add(entry + offset)
		var next [8]byte
		if m.ReadAt(next[:], page.Addr(entry)) != nil {
			return
		}
		entry = binary.LittleEndian.Uint64(next[:])
	}
}
