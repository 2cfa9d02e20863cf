package fault

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// FirstFD is the lowest number given to userfaultfds and other descriptors that
// must keep their number when a new pager takes over.
const FirstFD = 1000

// Config is what a trap works with.
type Config struct {
	// Store says what is where. It stays the caller's and must outlive the trap.
	Store *pagestore.Store
	// Request asks the source for pages that threads wait for. It is called on
	// the trap's own thread and must not wait for an answer.
	Request func(src page.Space, pages []page.Num)
	// Log is nil to discard.
	Log *slog.Logger
}

// Trap serves the userfaultfds of a store.
type Trap struct {
	st      *pagestore.Store
	request func(page.Space, []page.Num)
	log     *slog.Logger
	wake    int // eventfd that interrupts the poll
	noPage  []byte

	mu      sync.Mutex
	waiting map[waitKey][]waiter
	waiters atomic.Int64 // entries of waiting

	latency latency
	guards  guards

	closeOnce sync.Once
	stop      atomic.Bool
	running   sync.WaitGroup

	// The loop's own.
	state map[*pagestore.Space]*flux // of the spaces in flux
	// settledNow: the space being served came into flux in this call.
	settledNow bool
	retry      []thread
	batch      batch
}

// waitKey is a page of a source.
type waitKey struct {
	src  page.Space
	page int
}

// thread is where a thread of the program stands.
type thread struct {
	sp *pagestore.Space
	at page.Addr
}

type waiter struct {
	thread
	since time.Time
}

// New returns a trap over what is in the store and what will be added to it.
func New(cfg Config) (*Trap, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("fault: eventfd: %w", err)
	}
	// A page that cannot be read: see registered.
	no, err := unix.Mmap(-1, 0, page.Size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("fault: map: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	t := &Trap{
		st: cfg.Store, request: cfg.Request, log: cfg.Log, wake: fd, noPage: no,
		waiting: map[waitKey][]waiter{}, state: map[*pagestore.Space]*flux{},
	}
	t.latency.init()
	t.guards.init()
	return t, nil
}

// Kick makes Run look for spaces that were added to the store.
func (t *Trap) Kick() {
	one := [8]byte{1}
	_, _ = unix.Write(t.wake, one[:]) // full means that it is kicked already
}

// Run serves until Close. It must be called once at most.
func (t *Trap) Run() error {
	t.running.Add(1)
	defer t.running.Done()
	release := raisePriority(t.log)
	defer release()
	var fds []unix.PollFd
	var spaces []*pagestore.Space
	for !t.stop.Load() {
		now := t.st.Spaces()
		if len(fds) == 0 || !same(now, spaces) {
			spaces = now
			t.forgetFlux(now)
			fds = append(fds[:0], unix.PollFd{Fd: int32(t.wake), Events: unix.POLLIN})
			for _, sp := range spaces {
				fds = append(fds, unix.PollFd{Fd: int32(sp.FD()), Events: unix.POLLIN}) // -1 is skipped by poll
			}
		}
		if err := t.poll(fds); err != nil {
			return err
		}
		if fds[0].Revents != 0 {
			var b [8]byte
			_, _ = unix.Read(t.wake, b[:])
			fds = fds[:0] // there are others, or they have other numbers
			continue
		}
		for i, sp := range spaces {
			if fds[i+1].Revents != 0 || t.state[sp] != nil {
				t.serve(sp, fds[i+1].Revents)
			}
		}
		t.again()
	}
	return nil
}

func same(a, b []*pagestore.Space) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// soon is how long the next fault is waited for without telling the scheduler.
const soon = 2 * time.Millisecond

// poll waits until a descriptor is ready, or a moment where something has to be
// tried again.
func (t *Trap) poll(fds []unix.PollFd) error {
	// Threads that miss pages miss many: the next one comes soon.
	limit, again := soon, len(t.retry) > 0 || len(t.state) > 0
	if again {
		limit = time.Millisecond
	}
	for i := range fds {
		fds[i].Revents = 0
	}
	n, err := sys.AwaitReady(fds, limit)
	if n == 0 && err == nil && !again {
		_, err = unix.Poll(fds, -1)
	}
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("fault: poll: %w", err)
	}
	return nil
}

// Close ends Run and frees what New took. Userfaultfds stay open. Idempotent.
func (t *Trap) Close() error {
	t.closeOnce.Do(func() {
		t.Halt()
		t.guards.close()
		_ = unix.Munmap(t.noPage)
		_ = unix.Close(t.wake)
	})
	return nil
}

// Halt ends Run and returns when it has. Pages can still be placed.
func (t *Trap) Halt() {
	t.stop.Store(true)
	t.Kick()
	t.running.Wait()
}

// Waiting calls f for every page that a thread waits for.
func (t *Trap) Waiting(f func(src page.Space, n page.Num)) {
	t.mu.Lock()
	keys := make([]waitKey, 0, len(t.waiting))
	for k := range t.waiting {
		keys = append(keys, k)
	}
	t.mu.Unlock()
	for _, k := range keys {
		if src := t.st.Source(k.src); src != nil {
			f(k.src, src.Addr(k.page).Page())
		}
	}
}

// Latency is a snapshot of how long threads waited for pages of the source.
func (t *Trap) Latency() Latency { return t.latency.snapshot() }

// forget ends a space whose process is gone.
func (t *Trap) forget(sp *pagestore.Space) {
	fd, mem := sp.Gone()
	t.guards.forget(sp)
	for _, fd := range []int{fd, mem} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	if fd >= 0 || mem >= 0 {
		t.log.Debug("address space is gone", "space", sp.Source().ID(), "pid", sp.PID())
	}
	t.mu.Lock()
	for k, ws := range t.waiting {
		kept := ws[:0]
		for _, w := range ws {
			if w.sp != sp {
				kept = append(kept, w)
			}
		}
		if t.waiting[k] = kept; len(kept) == 0 {
			delete(t.waiting, k)
			t.waiters.Add(-1)
		}
	}
	t.mu.Unlock()
	t.Kick()
}

// The whole range of user addresses that UFFDIO_WAKE accepts on x86-64.
const (
	lowest  = 1 << 16
	highest = 1<<47 - page.Size
)
