package fusemem

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const (
	// lookAgain is how often a READ that waits looks whether its reader is still there: the kernel
	// tells of one signal only, and a new pager of none that came before it.
	lookAgain = 500 * time.Millisecond
	// unwatched is for how long nobody looks at all.
	unwatched = 2 * time.Millisecond
	// patience is for how long a person's tool that got a signal, but is not killed by it, waits
	// on.
	patience = 2 * time.Second
)

// reading is a READ under way, and the context that its Source gets. It ends when the reader is
// killed, the mount is closed, or the READ is answered. Most are answered from memory, so nothing
// is made before somebody asks for Done.
type reading struct {
	fs    *FS
	node  uint64
	first page.Num
	pages int
	place int // in reads.m, guarded by its mu

	// interrupt is closed when a signal came. go-fuse uses it for other requests after this one.
	interrupt <-chan struct{}
	thread    uint32 // of the reader, 0 where our pid namespace has none
	prio      page.Priority

	mu   sync.Mutex
	done chan struct{} // made by the first Done
	stop chan struct{} // closed by end, where done was made
	// timer begins to watch. Most pages are here before it fires, and a goroutine and a
	// ticker for each would be as much work as the rest of the READ.
	timer *time.Timer
	err   error
}

var _ context.Context = (*reading)(nil)

func (r *reading) Deadline() (time.Time, bool) { return time.Time{}, false }

func (r *reading) Value(any) any { return nil }

func (r *reading) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil && isClosed(r.fs.closing) {
		return context.Canceled
	}
	return r.err
}

func (r *reading) Done() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done == nil {
		r.done = make(chan struct{})
		if r.err != nil {
			close(r.done)
			return r.done
		}
		stop := make(chan struct{})
		r.stop = stop
		r.timer = time.AfterFunc(unwatched, func() { r.watch(stop) })
	}
	return r.done
}

// end is called when the Source has returned.
func (r *reading) end() {
	r.cancel()
	if r.stop != nil {
		r.timer.Stop()
		close(r.stop)
	}
}

func (r *reading) cancel() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err != nil {
		return
	}
	r.err = context.Canceled
	if r.done != nil {
		close(r.done)
	}
}

// watch cancels the READ when nobody waits for it any more.
func (r *reading) watch(stop <-chan struct{}) {
	interrupt := r.interrupt
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	var since time.Time
	for {
		select {
		case <-stop:
			return
		case <-r.fs.closing:
			r.cancel()
			return
		case <-interrupt:
			interrupt, since = nil, time.Now()
		case <-tick.C:
		}
		late := r.prio != page.Demand && !since.IsZero() && time.Since(since) > patience
		if late || killed(r.thread) || r.fs.aborted() {
			r.cancel()
			return
		}
	}
}

// killed reports whether a thread is gone or being killed: whatever ends a process puts SIGKILL
// into the set of each of its threads (kernel/signal.c, complete_signal).
func killed(thread uint32) bool {
	if thread == 0 {
		return false
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", thread))
	if err != nil {
		return os.IsNotExist(err)
	}
	_, b, ok := bytes.Cut(b, []byte("\nSigPnd:\t"))
	if !ok {
		return false
	}
	line, _, _ := bytes.Cut(b, []byte("\n"))
	set, err := strconv.ParseUint(string(line), 16, 64)
	return err == nil && set>>(unix.SIGKILL-1)&1 != 0
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
