package fault

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// slice is how many bytes are placed before the lock is offered to the reader
// of events: about 20 us of copying.
const slice = 64 << 10

// ErrUnknownSpace: pages of a source that nobody adopted.
var ErrUnknownSpace = errors.New("fault: unknown address space")

// place is where pages were put.
type place struct {
	sp  *pagestore.Space
	dst page.Range
}

// scratch is what one call of Place works with.
type scratch struct {
	targets, kept []pagestore.Target
	placed        []place
	copies        bool // pages are placed, by UFFDIO_COPY or by writing
	guards        []page.Range
	scan          sys.PMScanArg
	vec           [slice >> page.Shift]sys.PageRegion
}

var scratches = sync.Pool{New: func() any { return new(scratch) }}

// Place puts data, the pages of r at the source, wherever they are missing, and
// returns how many were placed; those that are not missing are left alone. data
// must not be Go heap memory. On error some pages are still missing and may be
// placed again. Safe for concurrent use, for the same pages as well.
func (t *Trap) Place(id page.Space, r page.Range, data []byte) (placed int, err error) {
	return t.put(id, r, true, func(sp *pagestore.Space, tg pagestore.Target, off int) (int, error) {
		return t.copyRun(sp, tg, data[off:off+int(tg.Dst.Bytes())])
	})
}

// Zero says that the pages of r are zero. Where they are trapped nothing is
// placed unless a thread waits: they are zero when they are touched.
func (t *Trap) Zero(id page.Space, r page.Range) (placed int, err error) {
	return t.put(id, r, false, func(sp *pagestore.Space, tg pagestore.Target, _ int) (int, error) {
		if tg.Flags&pagestore.Written == 0 {
			return sp.Settle(tg.First, tg.First+tg.Dst.Pages()), nil
		}
		return t.writeRun(sp, tg, nil)
	})
}

// Absent says that the source has nothing at r: what a fresh mapping gives there
// is right.
func (t *Trap) Absent(id page.Space, r page.Range) (settled int, err error) {
	return t.put(id, r, false, func(sp *pagestore.Space, tg pagestore.Target, _ int) (int, error) {
		return sp.Settle(tg.First, tg.First+tg.Dst.Pages()), nil
	})
}

// put calls do, under the read lock, for every run of missing pages of r in
// every space, and then lets go of those who wait. off is where the run begins
// in r, in bytes; copies says that do places pages, and wakes those who wait for them.
func (t *Trap) put(id page.Space, r page.Range, copies bool, do func(sp *pagestore.Space, tg pagestore.Target, off int) (int, error)) (placed int, err error) {
	src := t.st.Source(id)
	if src == nil {
		return 0, fmt.Errorf("%w %d", ErrUnknownSpace, id)
	}
	if !r.Aligned() || r.Empty() {
		return 0, fmt.Errorf("fault: space %d: %v is not made of whole pages", id, r)
	}
	first, ok := src.Find(r.Start)
	if !ok || src.Run(first, r.Pages()) != r.Pages() {
		return 0, fmt.Errorf("fault: space %d: %v is not what the source has", id, r)
	}
	sc := scratches.Get().(*scratch)
	defer scratches.Put(sc)
	sc.placed, sc.copies = sc.placed[:0], copies
	for _, sp := range src.Spaces() {
		n, e := t.putIn(sp, r, first, sc, do)
		placed += n
		err = errors.Join(err, e)
	}
	if !copies {
		sc.placed = sc.placed[:0]
	}
	t.release(src, first, first+r.Pages(), sc.placed)
	return placed, err
}

func (t *Trap) putIn(sp *pagestore.Space, r page.Range, first int, sc *scratch, do func(*pagestore.Space, pagestore.Target, int) (int, error)) (placed int, err error) {
	tries := 0
	for part := (page.Range{Start: r.Start, End: min(r.End, r.Start+slice)}); !part.Empty(); {
		n, err := t.putSlice(sp, part, first, sc, do)
		placed += n
		switch {
		case err == nil:
			part = page.Range{Start: part.End, End: min(r.End, part.End+slice)}
			tries = 0
		case errors.Is(err, unix.EAGAIN):
			// An event waits to be read; what it says decides where this goes.
			pause(&tries)
		case errors.Is(err, unix.ESRCH):
			t.forget(sp)
			return placed, nil
		case errors.Is(err, unix.ENOMEM) && tries < 200:
			pause(&tries)
		default:
			return placed, fmt.Errorf("fault: place %v of space %d in pid %d: %w", part, sp.Source().ID(), sp.PID(), err)
		}
	}
	return placed, nil
}

// pause yields, then sleeps: what is waited for is another thread's system call.
func pause(tries *int) {
	if *tries++; *tries < 4 {
		runtime.Gosched()
		return
	}
	time.Sleep(time.Duration(min(*tries, 100)) * 5 * time.Microsecond)
}

func (t *Trap) putSlice(sp *pagestore.Space, part page.Range, first int, sc *scratch, do func(*pagestore.Space, pagestore.Target, int) (int, error)) (placed int, err error) {
	if !sp.RLock() {
		return 0, nil
	}
	defer sp.RUnlock()
	if sp.Flux() {
		return 0, unix.EAGAIN
	}
	sc.targets, sc.guards = sp.Targets(part, sc.targets[:0]), sc.guards[:0]
	if sc.copies {
		if err := t.spare(sp, sc); err != nil {
			return 0, err
		}
	}
	for _, tg := range sc.targets {
		n, err := do(sp, tg, (tg.First-first)<<page.Shift)
		placed += n
		if err != nil {
			return placed, err
		}
		if t.waiters.Load() > 0 && tg.Flags&pagestore.Written == 0 {
			sc.placed = append(sc.placed, place{sp, tg.Dst})
		}
	}
	return placed, nil
}

// copyRun places one run, which lies in one segment. The read lock is held.
func (t *Trap) copyRun(sp *pagestore.Space, tg pagestore.Target, data []byte) (placed int, err error) {
	if tg.Flags&pagestore.Written != 0 {
		return t.writeRun(sp, tg, data)
	}
	fd, dst, i := sp.FD(), tg.Dst.Start, tg.First
	limit := len(data)
	for len(data) > 0 {
		n, err := sys.UffdCopy(fd, uint64(dst), data[:min(limit, len(data))], 0)
		if n > 0 {
			pages := int(n >> page.Shift)
			placed += sp.Settle(i, i+pages)
			data, dst, i = data[n:], dst+page.Addr(n), i+pages
			continue
		}
		switch {
		case errors.Is(err, unix.EEXIST):
			// Placed by a pager that was killed before it could note it, or
			// through another mapping of the same memory.
		case errors.Is(err, unix.ENOENT):
			// The kernel looks for the mapping before it looks whether it is
			// changing: it may just have moved. Its event cannot be read
			// meanwhile, we hold the lock.
			if changing(sp) {
				return placed, unix.EAGAIN
			}
			// Part of the run is not there: find out which, page by page in
			// the end. The program has split or replaced the mapping.
			if l := min(limit, len(data)); l > page.Size {
				limit = (l / 2) &^ (page.Size - 1)
				continue
			}
			t.st.Add(pagestore.Dropped, 1)
		default:
			return placed, err
		}
		sp.Settle(i, i+1)
		_ = sys.UffdWake(fd, uint64(dst), page.Size)
		data, dst, i = data[page.Size:], dst+page.Size, i+1
		limit = len(data)
	}
	return placed, nil
}

var zeros = make([]byte, slice)

// writeRun writes one run through /proc/PID/mem; nil data stands for zeros. The
// process does not run yet.
func (t *Trap) writeRun(sp *pagestore.Space, tg pagestore.Target, data []byte) (placed int, err error) {
	if data == nil {
		data = zeros[:tg.Dst.Bytes()]
	}
	dst, i := tg.Dst.Start, tg.First
	for len(data) > 0 {
		n, err := unix.Pwrite(sp.MemFD(), data, int64(dst))
		n &^= page.Size - 1
		if n <= 0 {
			if err == nil {
				err = unix.EIO
			}
			return placed, fmt.Errorf("write through /proc/PID/mem: %w", err)
		}
		placed += sp.Settle(i, i+n>>page.Shift)
		data, dst, i = data[n:], dst+page.Addr(n), i+n>>page.Shift
	}
	return placed, nil
}
