package fault

import (
	"errors"
	"fmt"
	"sync"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// MADV_GUARD_INSTALL (6.13) gives up what is in a range and makes every access to
// it raise SIGSEGV. A userfaultfd is told nothing of it, and UFFDIO_COPY puts its
// page over the marker that the kernel has left in the page table, as it does with
// all markers (pte_none_mostly in mm/userfaultfd.c). So whoever places private
// memory looks for guards first (PAGEMAP_SCAN, 0.7 to 1 us), under the same lock:
// such pages are settled. When the guard is removed there is nothing, as on a
// machine of its own, and what is touched then is filled with zeros.
//
// Of shared memory a guard gives nothing up. There it is lost when the page comes.

// guards has the descriptors of /proc/PID/pagemap by which guards are found.
type guards struct {
	// blind: the kernel cannot tell them (before 6.15).
	blind bool
	fds   sync.Map // of *pagestore.Space: int, -1 where it cannot be had
}

func (g *guards) init() {
	fd, err := unix.Open("/proc/self/pagemap", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		g.blind = true
		return
	}
	defer unix.Close(fd)
	a := guardScan(page.Range{End: page.Size})
	_, err = sys.PagemapScan(fd, &a, nil)
	g.blind = err != nil
}

func guardScan(r page.Range) sys.PMScanArg {
	return sys.PMScanArg{Start: uint64(r.Start), End: uint64(r.End), CategoryMask: sys.PageIsGuard, ReturnMask: sys.PageIsGuard}
}

// of returns the descriptor for sp, or -1. The read lock is held.
func (g *guards) of(t *Trap, sp *pagestore.Space) int {
	if fd, ok := g.fds.Load(sp); ok {
		return fd.(int)
	}
	fd := -1
	if pid := sp.PID(); pid > 0 { // it is not known of forked children
		var err error
		if fd, err = unix.Open(fmt.Sprintf("/proc/%d/pagemap", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			t.log.Warn("guard pages that the process installs now may be lost", "pid", pid, "err", err)
			if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
				return -1 // out of descriptors, or memory: that may pass
			}
			fd = -1
		}
	}
	if other, there := g.fds.LoadOrStore(sp, fd); there {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		fd = other.(int)
	}
	return fd
}

// forget closes the descriptor for sp, which nobody places in any more.
func (g *guards) forget(sp *pagestore.Space) {
	if fd, ok := g.fds.LoadAndDelete(sp); ok && fd.(int) >= 0 {
		_ = unix.Close(fd.(int))
	}
}

func (g *guards) close() {
	g.fds.Range(func(sp, _ any) bool {
		g.forget(sp.(*pagestore.Space))
		return true
	})
}

// spare settles those of sc.targets that the program has put guards over, and
// leaves the others. The read lock is held.
//
// EAGAIN where the mappings are changing: what is at a target's address may be
// something else already, whose guard says nothing of the page, which has moved.
func (t *Trap) spare(sp *pagestore.Space, sc *scratch) error {
	if t.guards.blind {
		return nil
	}
	for k := 0; k < len(sc.targets); {
		span, n := sc.targets[k].Dst, 1
		if sc.targets[k].Flags&(pagestore.Written|pagestore.Shared) != 0 {
			k++
			continue
		}
		// Pieces that lie close together are looked at in one call.
		for _, tg := range sc.targets[k+1:] {
			if tg.Flags&(pagestore.Written|pagestore.Shared) != 0 || tg.Dst.Start < span.End || tg.Dst.End-span.Start > slice {
				break
			}
			span.End = tg.Dst.End
			n++
		}
		k += n
		if err := t.guarded(sp, span, sc); err != nil && !errors.Is(err, unix.ESRCH) {
			t.log.Warn("guard pages cannot be looked for", "pid", sp.PID(), "err", err)
		}
	}
	if len(sc.guards) == 0 {
		return nil
	}
	if changing(sp) {
		return unix.EAGAIN
	}
	sc.kept = sc.kept[:0]
	for _, tg := range sc.targets {
		for _, g := range sc.guards {
			x := tg.Dst.Intersect(g)
			if x.Empty() || tg.Flags&(pagestore.Written|pagestore.Shared) != 0 {
				continue
			}
			before, at := tg, tg.First+int((x.Start-tg.Dst.Start)>>page.Shift)
			if before.Dst.End = x.Start; !before.Dst.Empty() {
				sc.kept = append(sc.kept, before)
			}
			t.st.Add(pagestore.Dropped, uint64(sp.Settle(at, at+x.Pages())))
			tg.Dst.Start, tg.First = x.End, at+x.Pages()
		}
		if !tg.Dst.Empty() {
			sc.kept = append(sc.kept, tg)
		}
	}
	sc.targets, sc.kept = sc.kept, sc.targets
	return nil
}

// guarded adds the guards in r to sc.
func (t *Trap) guarded(sp *pagestore.Space, r page.Range, sc *scratch) error {
	fd := t.guards.of(t, sp)
	if fd < 0 {
		return nil
	}
	sc.scan = guardScan(r)
	for a := &sc.scan; a.Start < a.End; a.Start = a.WalkEnd {
		n, err := sys.PagemapScanNow(fd, a, sc.vec[:])
		if err != nil {
			return err
		}
		for _, v := range sc.vec[:n] {
			sc.guards = append(sc.guards, page.Range{Start: page.Addr(v.Start), End: page.Addr(v.End)})
		}
		if a.WalkEnd <= a.Start {
			return nil
		}
	}
	return nil
}
