package fault

import (
	"errors"
	"slices"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// flux is what has to be remembered of a space while system calls of several
// of its threads overlap. The kernel changes the mappings first and queues the
// event afterwards, without the lock that covers the change (mm/userfaultfd,
// mremap_userfaultfd_complete and userfaultfd_unmap_complete), so two events can
// come in the other order than the changes they tell of:
//
//   - munmap(X) and then mremap(Y to X), read as REMAP, UNMAP: taken literally,
//     the content that moved to X would be dropped.
//   - mremap(Y to X) and then fork, read as FORK, REMAP: taken literally, the
//     child would look for the content at Y.
//
// As long as the kernel says that changes are under way, what was done last is
// kept here; an event that contradicts it is settled by asking the kernel what
// is mapped.
type flux struct {
	moved    []page.Range       // where REMAPs led
	young    []*pagestore.Space // children of FORKs
	suspects []page.Range       // UNMAPs of what had moved there
}

func (t *Trap) flux(sp *pagestore.Space) *flux {
	f := t.state[sp]
	if f == nil {
		f = new(flux)
		t.state[sp] = f
	}
	return f
}

// changing reports whether a change of mappings is under way whose event has
// not been read. The kernel checks that before the arguments.
func (t *Trap) changing(sp *pagestore.Space) bool {
	_, err := sys.UffdZeropage(sp.FD(), 0, page.Size, 0)
	return errors.Is(err, unix.EAGAIN)
}

// registered reports whether the page at a is registered with the userfaultfd
// of sp, in a moment when nothing is changing: the kernel looks for the mapping
// before it looks at the source of a copy, which cannot be read.
func (t *Trap) registered(sp *pagestore.Space, a page.Addr) bool {
	_, err := sys.UffdCopy(sp.FD(), uint64(a), t.noPage, 0)
	return errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EEXIST)
}

func (t *Trap) unmap(sp *pagestore.Space, r page.Range) {
	if f := t.state[sp]; f != nil {
		for _, m := range f.moved {
			if x := m.Intersect(r); !x.Empty() {
				f.suspects = append(f.suspects, x)
			}
		}
		if len(f.suspects) > 0 {
			rest := page.NewSet(r)
			for _, x := range f.suspects {
				rest.Remove(x)
			}
			for _, x := range rest.Ranges() {
				sp.Drop(x, false)
			}
			return
		}
	}
	sp.Drop(r, false)
}

func (t *Trap) remap(sp *pagestore.Space, m sys.UffdMsg) {
	f := t.flux(sp)
	from, to := page.Addr(m.From), page.Addr(m.To)
	for _, child := range f.young {
		if !child.Lock() {
			continue
		}
		if t.registered(child, to) && (m.Len == 0 || !t.registered(child, from)) {
			t.remapIn(child, from, to, m.Len)
		}
		child.Unlock()
	}
	f.moved = append(f.moved, page.Range{Start: to, End: to + page.Addr(m.Len)})
	t.remapIn(sp, from, to, m.Len)
}

func (t *Trap) remapIn(sp *pagestore.Space, from, to page.Addr, length uint64) {
	if err := sp.Remap(from, to, length); err != nil {
		t.log.Error("a moved mapping cannot be followed: its missing pages stay missing",
			"pid", sp.PID(), "from", from, "to", to, "bytes", length, "err", err)
		sp.Done()
	}
}

// settleFlux forgets the flux of a space once nothing is changing any more, and
// decides what was in doubt. The space is locked.
func (t *Trap) settleFlux(sp *pagestore.Space) {
	f := t.state[sp]
	if f == nil || t.changing(sp) {
		return
	}
	for _, r := range f.suspects {
		var lost []page.Range
		sp.EachMissing(func(tg pagestore.Target) bool {
			x := tg.Dst.Intersect(r)
			for a := x.Start; a < x.End; a += page.Size {
				if !t.registered(sp, a) {
					lost = append(lost, page.PageOf(a))
				}
			}
			return true
		})
		for _, l := range lost {
			sp.Drop(l, false)
		}
	}
	delete(t.state, sp)
}

// forgetFlux drops what refers to spaces that are gone.
func (t *Trap) forgetFlux(live []*pagestore.Space) {
	for sp, f := range t.state {
		if !slices.Contains(live, sp) {
			delete(t.state, sp)
			continue
		}
		f.young = slices.DeleteFunc(f.young, func(c *pagestore.Space) bool { return !slices.Contains(live, c) })
	}
}
