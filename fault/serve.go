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
	msgs   []sys.UffdMsg
	faults []page.Addr
	nums   []page.Num
}

// serve reads what a userfaultfd has, applies the events if it can and then
// answers the faults.
func (t *Trap) serve(sp *pagestore.Space, revents int16) {
	b := &t.batch
	b.faults = b.faults[:0]
	if !sp.Lock() {
		delete(t.state, sp)
		return
	}
	was := t.state[sp] != nil
	var err error
	if revents&unix.POLLIN != 0 {
		err = t.read(sp)
	}
	settled := t.settle(sp, nil)
	sp.Unlock()
	now := time.Now()
	if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || revents&(unix.POLLERR|unix.POLLNVAL) != 0 {
		t.log.Error("userfaultfd failed: its process is not served any more", "pid", sp.PID(), "revents", revents, "err", err)
		t.forget(sp)
		return
	}
	if settled && (was || t.settledNow) {
		t.settledNow = false
		t.recheck()
	}
	t.answer(sp, b, now)
}

// read reads messages into the log and sorts them. The space is locked.
func (t *Trap) read(sp *pagestore.Space) error {
	var punched []page.Range
	tail := sp.LogTail()
	if len(tail) == 0 { // cannot be: settle does not let it come so far
		return nil
	}
	if sp.SharedMissing() {
		// One at a time: whose event was read is gone before one can look.
		tail = tail[:sys.UffdMsgSize]
		if changing(sp) {
			punched = punching(sp.PID())
		}
	}
	n, err := sys.ReadNow(sp.FD(), tail) // it does not block
	if n <= 0 {
		return err
	}
	old := sp.Pending()
	sp.LogRead(n)
	t.sort(sp, old, punched)
	return nil
}

// sort takes the faults out of the pending messages from number old on, and
// notes whether there are events.
func (t *Trap) sort(sp *pagestore.Space, old int, punched []page.Range) {
	events := 0
	t.batch.msgs = sp.Messages(old, t.batch.msgs[:0])
	for _, m := range t.batch.msgs {
		if m.Event == sys.UffdEventPagefault {
			t.batch.faults = append(t.batch.faults, page.Addr(m.Addr).Floor())
		} else {
			events++
		}
	}
	f := t.state[sp]
	if events == 0 && f == nil {
		_ = sp.Begin().Commit(sp.Pending()) // nothing moves: it cannot fail
		return
	}
	if f == nil {
		f = new(flux)
		t.state[sp] = f
		t.settledNow = true
	}
	f.punched = append(f.punched, punched...)
}

func addrs(start, end uint64) page.Range {
	return page.Range{Start: page.Addr(start), End: page.Addr(end)}
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

// aheadBytes is how much of a hole is filled behind a page that was touched.
const aheadBytes = 60 << 10

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
	if th.sp.Flux() {
		return tryAgain, 0
	}
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
		// Memory that is used for the first time is used in order: spare the
		// program a round trip for each page. Only page tables are written.
		if r := th.sp.Hole(th.at+page.Size, aheadBytes); !r.Empty() {
			_, _ = sys.UffdZeropage(th.sp.FD(), uint64(r.Start), r.Bytes(), 0)
		}
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
