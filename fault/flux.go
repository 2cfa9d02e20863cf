package fault

import (
	"errors"
	"slices"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// The kernel changes mappings first and queues the event afterwards, without
// the lock that covers the change (mremap_userfaultfd_complete,
// userfaultfd_unmap_complete and dup_userfaultfd_complete in fs/userfaultfd.c),
// so events of several threads can come in another order than the changes they
// tell of:
//
//   - mremap(X to Z) by one thread and mremap(Y to X) by another, read as Y to X,
//     X to Z: taken literally, Z would get the content of Y.
//   - munmap(X) and mremap(Y to X), read the other way round: the content that
//     moved to X would be given up.
//   - mremap(X to Z) tells of its two parts, as REMAP and UNMAP(X), one after the
//     other was read: another thread has long moved something to X.
//   - fork, and munmap by another thread before fork returns, read as UNMAP,
//     FORK: the child would lose what it has.
//
// So events are kept until nothing is changing: only then is the order of what
// was read decided, by asking the kernel what is mapped. Until then the space is
// in flux and nothing is placed in it. That costs nothing, for the kernel
// refuses UFFDIO_COPY as long as an event is on its way.
//
// flux is what the trap keeps of a space in flux besides the log.
type flux struct {
	punched []page.Range // by MADV_REMOVE, see punching
}

// changing reports whether a change of mappings is under way whose event has
// not been read. The kernel checks that before the arguments.
func changing(sp *pagestore.Space) bool {
	_, err := sys.UffdZeropage(sp.FD(), 0, page.Size, 0)
	return errors.Is(err, unix.EAGAIN)
}

// registered reports whether the page at a is mapped and registered with the
// userfaultfd of sp. The kernel looks for the mapping before it looks at the
// source of a copy, which cannot be read. known is false while something is
// changing.
func (t *Trap) registered(sp *pagestore.Space, a page.Addr) (yes, known bool) {
	_, err := sys.UffdCopy(sp.FD(), uint64(a.Floor()), t.noPage, 0)
	return errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EEXIST), !errors.Is(err, unix.EAGAIN)
}

// event is a message that is to be applied.
type event struct {
	sys.UffdMsg
	k    int // its number among the pending messages
	done bool
}

// vacates is the range that holds nothing after e, fills the one that holds
// something.
func (e *event) vacates() page.Range {
	switch e.Event {
	case sys.UffdEventUnmap:
		return addrs(e.Start, e.End)
	case sys.UffdEventRemap:
		return addrs(e.From, e.From+e.Len)
	}
	return page.Range{}
}

func (e *event) fills() page.Range {
	if e.Event == sys.UffdEventRemap {
		return addrs(e.To, e.To+max(e.Len, page.Size))
	}
	return page.Range{}
}

// settle applies the pending messages of a space if nothing is changing, or if
// it cannot wait. The space is locked. It reports whether it has.
func (t *Trap) settle(sp *pagestore.Space, adopt func(fd int) (int, error)) bool {
	f := t.state[sp]
	if f == nil {
		return true
	}
	if changing(sp) && !sp.LogFull() {
		sp.SetFlux(true)
		return false
	}
	var events []*event
	for k, m := range sp.Messages(0, nil) {
		if m.Event != sys.UffdEventPagefault {
			events = append(events, &event{UffdMsg: m, k: k})
		}
	}
	b := &settling{t: t, sp: sp, c: sp.Begin(), events: events, punched: f.punched}
	b.pair()
	b.fork(adopt)
	for i := range events {
		b.apply(i)
	}
	for _, child := range b.young {
		b.keep(child.c, 0)
		child.c.Space().Unlock()
	}
	b.keep(b.c, sp.Pending())
	for _, fd := range b.close {
		_ = unix.Close(fd)
	}
	sp.SetFlux(false)
	delete(t.state, sp)
	return true
}

// settling applies one batch of events to a space and its newest children.
type settling struct {
	t       *Trap
	sp      *pagestore.Space
	c       *pagestore.Change
	events  []*event
	punched []page.Range
	young   []youngster
	close   []int
}

// youngster is a child that was forked by event number at. Its space is locked.
type youngster struct {
	c  *pagestore.Change
	at int
}

// pair takes out the UNMAP that is the second half of a mremap.
func (b *settling) pair() {
	for i, e := range b.events {
		if e.Event != sys.UffdEventRemap {
			continue
		}
		for _, o := range b.events[i+1:] {
			if o.Event == sys.UffdEventUnmap && !o.done && o.Start == e.From && o.End == e.From+e.Len {
				o.done = true
				b.t.st.Add(pagestore.Unmaps, 1)
				break
			}
		}
	}
}

// keep commits a change.
func (b *settling) keep(c *pagestore.Change, messages int) {
	if err := c.Commit(messages); err != nil {
		b.t.log.Error("moved mappings cannot be followed any more: pages there stay missing", "pid", b.sp.PID(), "err", err)
		_ = c.Space().Begin().Commit(messages)
	}
}

// fork makes the spaces of new children before anything else is applied: what
// else is in the batch is undone for them where it came after the fork.
func (b *settling) fork(adopt func(fd int) (int, error)) {
	for i, e := range b.events {
		if e.Event != sys.UffdEventFork {
			continue
		}
		e.done = true
		b.t.st.Add(pagestore.Forks, 1)
		fd, err := -1, error(nil)
		if adopt != nil {
			fd, err = adopt(e.ForkFD)
		} else if fd, err = unix.FcntlInt(uintptr(e.ForkFD), unix.F_DUPFD_CLOEXEC, FirstFD); err == nil {
			b.close = append(b.close, e.ForkFD)
		}
		var child *pagestore.Space
		made := false
		if err == nil {
			child, made, err = b.c.Fork(e.k, fd)
		}
		if !made && fd >= 0 {
			_ = unix.Close(fd)
		}
		if err != nil {
			// Closing the last copy would let the child read zeros in the
			// place of its content. It is kept: the child stops instead.
			b.close = slices.DeleteFunc(b.close, func(fd int) bool { return fd == e.ForkFD })
			b.t.log.Error("a forked child cannot be served: it stops at its first missing page",
				"parent", b.sp.PID(), "descriptor", e.ForkFD, "err", err)
			continue
		}
		b.young = append(b.young, youngster{child.Begin(), i})
	}
}

// apply applies event number i, and before it those that must have come first.
func (b *settling) apply(i int) {
	e := b.events[i]
	if e.done {
		return
	}
	e.done = true // also ends a circle of moves, which takes more room than there was
	if into := e.fills(); !into.Empty() {
		for j := i + 1; j < len(b.events); j++ {
			if o := b.events[j]; !o.done && o.vacates().Overlaps(into) && b.before(j, i) {
				b.apply(j)
			}
		}
	}
	switch e.Event {
	case sys.UffdEventRemove:
		b.t.st.Add(pagestore.Removes, 1)
		b.remove(i, addrs(e.Start, e.End))
	case sys.UffdEventUnmap:
		b.t.st.Add(pagestore.Unmaps, 1)
		b.unmap(i, addrs(e.Start, e.End))
	case sys.UffdEventRemap:
		b.t.st.Add(pagestore.Remaps, 1)
		b.remap(i, page.Addr(e.From), page.Addr(e.To), e.Len)
	}
}

// before decides whether event j, which was read after event i and vacates what
// i fills, came first nevertheless.
func (b *settling) before(j, i int) bool {
	x := b.events[j].vacates().Intersect(b.events[i].fills())
	// mremap goes to a place that is free: what is known to be there must have
	// gone before.
	if b.c.Occupied(x) {
		return true
	}
	// What is mapped but was never told, because a mapping grew in place, is
	// not known. If something is there in the end, the filling came last.
	for k, e := range b.events {
		if k != i && k != j && !e.done && (e.vacates().Overlaps(x) || e.fills().Overlaps(x)) {
			return false
		}
	}
	there, known := b.t.registered(b.sp, x.Start)
	return known && there
}

// remove: the program gave up the content of r, which reads as zeros from now
// on. Only of memory that it shares MADV_DONTNEED keeps the content; there the
// system call, seen before the event was read, tells.
func (b *settling) remove(i int, r page.Range) {
	drop := func(c *pagestore.Change) {
		c.Drop(r, true)
		for _, p := range b.punched {
			c.Drop(r.Intersect(p), false)
		}
	}
	drop(b.c)
	for _, y := range b.young {
		if i < y.at {
			drop(y.c)
		}
	}
}

// unmap and remap follow the parent, and of its new children those that were
// forked afterwards: a fork takes long, and what another thread does meanwhile is
// often read before it. What the child has mapped tells; where something else
// may have come to that place since, the order of reading has to do.
func (b *settling) unmap(i int, r page.Range) {
	b.c.Unmap(r)
	for _, y := range b.young {
		there, known := b.t.registered(y.c.Space(), r.Start)
		if known && there {
			known, _ = b.t.registered(b.sp, r.Start)
			known = !known // where it is there again in the parent, who knows
		}
		if known && !there || !known && i < y.at {
			y.c.Unmap(r)
		}
	}
}

func (b *settling) remap(i int, from, to page.Addr, length uint64) {
	b.c.Remap(from, to, length)
	was := page.Range{Start: from, End: from + page.Addr(max(length, page.Size))}
	for _, y := range b.young {
		there, known1 := b.t.registered(y.c.Space(), to)
		still, known2 := b.t.registered(y.c.Space(), from)
		after := i < y.at
		if known1 && known2 && there != still {
			after = there
		}
		if after && y.c.Occupied(was) {
			y.c.Remap(from, to, length)
		}
	}
}

// forgetFlux drops what refers to spaces that are gone.
func (t *Trap) forgetFlux(live []*pagestore.Space) {
	for sp := range t.state {
		if !slices.Contains(live, sp) {
			delete(t.state, sp)
		}
	}
}
