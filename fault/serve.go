package fault

import (
	"errors"
	"slices"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// batch is what one reading of a userfaultfd gave.
type batch struct {
	faults []page.Addr
	nums   []page.Num
	events int
}

// serve reads what a userfaultfd has, applies the events and then answers the
// faults.
func (t *Trap) serve(sp *pagestore.Space, revents int16) {
	b := &t.batch
	b.faults, b.events = b.faults[:0], 0
	if !sp.Lock() {
		delete(t.state, sp)
		return
	}
	var err error
	if revents&unix.POLLIN != 0 {
		var gone []page.Range
		if sp.SharedMissing() && t.changing(sp) {
			gone = punching(sp.PID())
		}
		_, err = unix.Read(sp.FD(), sp.LogTail())
		t.apply(sp, gone, nil)
	}
	t.settleFlux(sp)
	sp.Unlock()
	now := time.Now()
	switch {
	case err == nil || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
	default:
		t.log.Error("userfaultfd cannot be read: its process is not served any more", "pid", sp.PID(), "err", err)
		t.forget(sp)
		return
	}
	if revents&(unix.POLLERR|unix.POLLNVAL) != 0 {
		t.log.Error("userfaultfd failed: its process is not served any more", "pid", sp.PID(), "revents", revents)
		t.forget(sp)
		return
	}
	if b.events > 0 {
		t.recheck()
	}
	t.answer(sp, b, now)
}

// apply takes the messages of the log in order. adopt makes the number of a
// forked child's descriptor into one of ours; nil stands for dup. The space is
// locked.
func (t *Trap) apply(sp *pagestore.Space, punched []page.Range, adopt func(fd int) (int, error)) {
	for {
		m, ok := sp.Next()
		if !ok {
			return
		}
		switch m.Event {
		case sys.UffdEventPagefault:
			t.batch.faults = append(t.batch.faults, page.Addr(m.Addr).Floor())
			sp.Done()
			continue
		case sys.UffdEventRemove:
			t.st.Add(pagestore.Removes, 1)
			t.remove(sp, addrs(m.Start, m.End), punched)
			sp.Done()
		case sys.UffdEventUnmap:
			t.st.Add(pagestore.Unmaps, 1)
			t.unmap(sp, addrs(m.Start, m.End))
			sp.Done()
		case sys.UffdEventRemap:
			t.st.Add(pagestore.Remaps, 1)
			t.remap(sp, m)
		case sys.UffdEventFork:
			t.st.Add(pagestore.Forks, 1)
			t.fork(sp, m.ForkFD, adopt)
		default:
			t.log.Warn("unknown userfaultfd event", "event", m.Event, "pid", sp.PID())
			sp.Done()
			continue
		}
		t.batch.events++
	}
}

func addrs(start, end uint64) page.Range {
	return page.Range{Start: page.Addr(start), End: page.Addr(end)}
}

// remove: the program gave up the content of r, which reads as zeros from now
// on. Only of memory that it shares MADV_DONTNEED keeps the content; there the
// system call, seen before the event was read, tells.
func (t *Trap) remove(sp *pagestore.Space, r page.Range, punched []page.Range) {
	sp.Drop(r, true)
	for _, p := range punched {
		sp.Drop(r.Intersect(p), false)
	}
}

func (t *Trap) fork(sp *pagestore.Space, fd int, adopt func(int) (int, error)) {
	defer sp.Done()
	if adopt == nil {
		adopt = func(fd int) (int, error) {
			n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, FirstFD)
			return n, err
		}
		defer func() { _ = unix.Close(fd) }()
	}
	if sp.ForkDone() {
		return
	}
	n, err := adopt(fd)
	if err == nil {
		var child *pagestore.Space
		if child, err = sp.Fork(n); err == nil {
			t.flux(sp).young = append(t.flux(sp).young, child)
			return
		}
		_ = unix.Close(n)
	}
	// Closing the last copy frees the child to read zeros where it should read
	// its content: it is better stopped for good, and said so.
	keep, _ := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, FirstFD)
	t.log.Error("a forked child cannot be served: it stops at its first missing page",
		"parent", sp.PID(), "descriptor", keep, "err", err)
}

// answer sends requests for faults on missing pages and fills the others.
func (t *Trap) answer(sp *pagestore.Space, b *batch, now time.Time) {
	if len(b.faults) == 0 {
		return
	}
	t.st.Add(pagestore.Faults, uint64(len(b.faults)))
	b.nums = b.nums[:0]
	for _, a := range b.faults {
		t.fault(thread{sp, a}, now, &b.nums)
	}
	if len(b.nums) > 0 {
		t.st.Add(pagestore.Faulted, uint64(len(b.nums)))
		t.request(sp.Source().ID(), b.nums)
	}
}

// fault answers th, or registers it and adds to ask what it waits for.
func (t *Trap) fault(th thread, now time.Time, ask *[]page.Num) {
	switch r, i := t.fill(th); r {
	case filled:
	case tryAgain:
		t.retry = append(t.retry, th)
	case spaceGone:
		t.forget(th.sp)
	case pageMissing:
		if t.wait(th, i, now) {
			*ask = append(*ask, th.sp.Source().Addr(i).Page())
		}
		// It may have come between looking and registering.
		if !th.sp.IsMissing(i) {
			t.release(th.sp.Source(), i, i+1, nil)
		}
	}
}

// wait registers th for page i, and reports whether it is the first.
func (t *Trap) wait(th thread, i int, now time.Time) bool {
	k := waitKey{th.sp.Source().ID(), i}
	t.mu.Lock()
	defer t.mu.Unlock()
	ws, there := t.waiting[k]
	t.waiting[k] = append(ws, waiter{th, now})
	if !there {
		t.waiters.Add(1)
	}
	return !there
}

// again retries what an unread event stood in the way of.
func (t *Trap) again() {
	if len(t.retry) == 0 {
		return
	}
	list := t.retry
	t.retry = nil
	now := time.Now()
	for _, th := range list {
		var ask []page.Num
		t.fault(th, now, &ask)
		if len(ask) > 0 {
			t.st.Add(pagestore.Faulted, uint64(len(ask)))
			t.request(th.sp.Source().ID(), ask)
		}
	}
}

type outcome int

const (
	filled outcome = iota
	tryAgain
	pageMissing
	spaceGone
)

// fill answers a fault on something that the source does not have (any more):
// with a zero page, or by waking the thread where there is a page. i is the
// number of a page that is missing.
func (t *Trap) fill(th thread) (r outcome, i int) {
	if !th.sp.RLock() {
		return filled, 0
	}
	defer th.sp.RUnlock()
	i, missing, _ := th.sp.Lookup(th.at)
	if missing {
		if !t.st.Flag(pagestore.FlagPoisoned) {
			return pageMissing, i
		}
		if _, err := sys.UffdPoison(th.sp.FD(), uint64(th.at), page.Size, 0); err == nil {
			return filled, 0
		} else if errors.Is(err, unix.EAGAIN) {
			return tryAgain, 0
		}
		return filled, 0
	}
	_, err := sys.UffdZeropage(th.sp.FD(), uint64(th.at), page.Size, 0)
	switch {
	case err == nil:
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
		return tryAgain, 0
	case errors.Is(err, unix.ESRCH):
		return spaceGone, 0
	default: // EEXIST: it came. ENOENT: unmapped, the thread shall see that.
		_ = sys.UffdWake(th.sp.FD(), uint64(th.at), page.Size)
	}
	return filled, 0
}

// release lets go of threads that wait for pages [i, j) of src, which are
// settled. Whoever was not woken by the placing into placed is answered here.
func (t *Trap) release(src *pagestore.Source, i, j int, placed []place) {
	if t.waiters.Load() == 0 {
		return
	}
	var list []waiter
	t.mu.Lock()
	for ; i < j; i++ {
		k := waitKey{src.ID(), i}
		if ws, ok := t.waiting[k]; ok {
			delete(t.waiting, k)
			t.waiters.Add(-1)
			list = append(list, ws...)
		}
	}
	t.mu.Unlock()
	if len(placed) > 0 && len(list) > 0 {
		now := time.Now()
		list = slices.DeleteFunc(list, func(w waiter) bool {
			if !slices.ContainsFunc(placed, func(p place) bool { return p.sp == w.sp && p.dst.Contains(w.at) }) {
				return false
			}
			t.latency.add(now.Sub(w.since))
			return true
		})
	}
	t.resolve(list)
}

func (t *Trap) resolve(list []waiter) {
	now := time.Now()
	for _, w := range list {
		t.latency.add(now.Sub(w.since))
		switch r, _ := t.fill(w.thread); r {
		case tryAgain, pageMissing:
			// Let it fault again: what it finds then is what holds then.
			if w.sp.RLock() {
				_ = sys.UffdWake(w.sp.FD(), uint64(w.at), page.Size)
				w.sp.RUnlock()
			}
		case spaceGone:
			t.forget(w.sp)
		}
	}
}

// recheck looks, after events, for threads whose page is not missing any more
// or is another one now, and lets them fault again.
func (t *Trap) recheck() {
	if t.waiters.Load() == 0 {
		return
	}
	var list []waiter
	t.mu.Lock()
	for k, ws := range t.waiting {
		kept := ws[:0]
		for _, w := range ws {
			if w.sp.RLock() {
				i, missing, _ := w.sp.Lookup(w.at)
				w.sp.RUnlock()
				if missing && i == k.page {
					kept = append(kept, w)
					continue
				}
			}
			list = append(list, w)
		}
		if t.waiting[k] = kept; len(kept) == 0 {
			delete(t.waiting, k)
			t.waiters.Add(-1)
		}
	}
	t.mu.Unlock()
	t.resolve(list)
}
