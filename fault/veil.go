package fault

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// VeilConfig is what a Veil works with. All functions must be set.
type VeilConfig struct {
	// Source is what the veiled memory has its content from. Source.Veil was
	// called.
	Source *pagestore.Source
	// PID is the process that arrived, whose is the first of Source.VeilFDs.
	PID int
	// Views is all that is veiled, as it is at the source.
	Views page.Set
	// Processes are those that may see veiled memory: the one that arrived, and
	// what it forked. Several may have one address space (vfork).
	Processes func() ([]int, error)
	// Locate tells which pages of the source process pid sees at its addresses r,
	// in order; nothing of what is not veiled. one says that no more than one
	// mapping was found.
	Locate func(pid int, r page.Range) (src []page.Range, one bool, err error)
	// Shows tells which pages of src process pid sees, and where.
	Shows func(pid int, src page.Range) (at []page.Range, from []page.Range, err error)
	// Invalidate makes the kernel forget what it has cached of src. It may wait
	// for reads that are being answered.
	Invalidate func(src page.Range) error
	// Own gives process pid, which stands still, copies of its own of its pages of
	// at, wherever it has none.
	Own func(pid int, at page.Range) error
	// Blank makes the pages at r of process pid, which sees src there, zero. Nobody in
	// the process knows yet that they are there.
	Blank func(pid int, r, src page.Range) error
	// Freeze begins to stop all those processes, Frozen reports whether they stand
	// still, and Thaw lets them go.
	Freeze, Thaw func() error
	Frozen       func() (bool, error)
	// Save keeps what must not be lost with this process, and Saved is what was saved
	// last by the one before, if there was one.
	Save  func(VeilState) error
	Saved VeilState
	Log   *slog.Logger // nil discards
}

// Veil sees to it that veiled memory behaves as anonymous memory does: what a
// program gives up (MADV_DONTNEED, MADV_FREE) is zero when it is touched next,
// where a private mapping of a file would show the file again.
//
// A userfaultfd, registered for write protection that is never used, tells of it
// (Linux 6.7; the only mode that a mapping of any file system takes). The call
// waits until its event is read. So what it gives up is looked for before that,
// in /proc/PID/task/TID/syscall, and made zero in the file and in the page cache;
// then the event is read, and the call goes on.
//
// Where there are several threads, others may make such calls meanwhile, and the kernel
// hands out the event of the last one first (__add_wait_queue). So none is let return to
// the program from its call before all is seen to: the freezer is on for that time, but
// nobody waits until they stand still.
//
// The file is one for all processes that a fork has made. Where there are others,
// they get copies of their own first, and stand still for it; as they do where it
// cannot be seen who gives up what (io_uring, process_madvise by another).
//
// One goroutine (Run), not that of the Trap: stopping a program waits for threads
// that wait for pages.
type Veil struct {
	cfg  VeilConfig
	src  *pagestore.Source
	log  *slog.Logger
	wake int

	memory memory
	moves  []mover // that were under way when the program was being stopped
	// followed are those of which all is known: they show as long as nobody lets their
	// thread return.
	followed []mover

	// busy is held from before an event is read until what it says has been done.
	busy sync.Mutex

	once    sync.Once
	stop    atomic.Bool
	running sync.WaitGroup
}

// VeilFeatures are those of a userfaultfd for it.
const VeilFeatures = sys.UffdFeatureWPAsync | sys.UffdFeaturePagefaultFlagWP | sys.UffdFeatureWPUnpopulated |
	sys.UffdFeatureEventRemove | sys.UffdFeatureEventRemap | sys.UffdFeatureEventUnmap | sys.UffdFeatureEventFork

// NewVeil returns one that serves what Source.VeilFDs lists.
func NewVeil(cfg VeilConfig) (*Veil, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("fault: eventfd: %w", err)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	v := &Veil{cfg: cfg, src: cfg.Source, log: cfg.Log, wake: fd, memory: memory{by: map[int]*seen{}}}
	v.restore(cfg.Saved)
	return v, nil
}

// Run serves until Close. It must be called once at most.
func (v *Veil) Run() error {
	v.running.Add(1)
	defer v.running.Done()
	for !v.stop.Load() {
		fds := []unix.PollFd{{Fd: int32(v.wake), Events: unix.POLLIN}}
		for _, fd := range v.src.VeilFDs() {
			fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
		}
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("fault: poll: %w", err)
		}
		for _, p := range fds[1:] {
			switch {
			case p.Revents&unix.POLLIN != 0:
				if err := v.serve(int(p.Fd)); err != nil {
					v.log.Error("memory that the program gave up", "err", err)
				}
			case p.Revents != 0:
				v.drop(int(p.Fd))
			}
		}
	}
	return nil
}

// Close ends Run. Userfaultfds stay open. Idempotent.
func (v *Veil) Close() error {
	v.once.Do(func() {
		v.Halt()
		_ = unix.Close(v.wake)
	})
	return nil
}

// Halt ends Run and returns when it has.
func (v *Veil) Halt() {
	v.stop.Store(true)
	one := [8]byte{1}
	_, _ = unix.Write(v.wake, one[:])
	v.running.Wait()
}

// Leave closes the userfaultfds. Nothing is veiled any more.
func (v *Veil) Leave() {
	for _, fd := range v.src.VeilFDs() {
		v.drop(fd)
	}
}

func (v *Veil) drop(fd int) {
	v.src.DropVeilFD(fd)
	_ = unix.Close(fd)
}

// giver is a process in a call that gives up r.
type giver struct {
	pid int
	r   page.Range
}

// doing is what the programs are at. Of those that have one address space pids has one,
// and what any of them does counts as done by that.
type doing struct {
	pids              []int
	single            bool    // it is one process, with one thread
	givers, keepers   []giver // keepers are those that will have given up nothing
	changing, forking bool
	running           bool // see calls
	moves             []mover
}

// mover is a process in a mremap.
type mover struct {
	pid int
	move
}

func (v *Veil) look() (d doing, err error) {
	spaces, err := v.spaces()
	if err != nil {
		return d, err
	}
	for _, sharing := range spaces {
		first := sharing[0]
		d.pids = append(d.pids, first)
		for _, pid := range sharing {
			calls := giving(pid)
			for _, r := range calls.ranges {
				d.givers = append(d.givers, giver{first, r})
			}
			for _, r := range calls.keeping {
				d.keepers = append(d.keepers, giver{first, r})
			}
			for _, m := range calls.moves {
				d.moves = append(d.moves, mover{first, m})
			}
			d.changing, d.forking = d.changing || calls.changing, d.forking || calls.forking
			d.running = d.running || calls.running
		}
	}
	d.single = len(spaces) == 1 && len(spaces[0]) == 1 && threads(d.pids[0]) == 1
	return d, nil
}

// spaces are the address spaces that may see veiled memory, each by the processes that
// have it: that which arrived is the first of its own.
func (v *Veil) spaces() ([][]int, error) {
	pids, err := v.cfg.Processes()
	if err != nil {
		return nil, err
	}
	if i := slices.Index(pids, v.cfg.PID); i > 0 {
		pids = slices.Insert(slices.Delete(pids, i, i+1), 0, v.cfg.PID)
	}
	return proc.AddressSpaces(pids), nil
}

// nobody is the process of an event that takes nothing from anybody.
const nobody = -1

func covers(gs []giver, m sys.UffdMsg) bool {
	return slices.ContainsFunc(gs, func(g giver) bool { return g.r.Covers(addrs(m.Start, m.End)) })
}

// calm is how long threads that nobody lets return to the program may be at work in a call.
const calm = 20 * time.Millisecond

// moving are the moves that are under way: all that have changed a mapping by now, as the
// thread waits, or is held up behind its call. One that is at work has changed it maybe, and
// cannot be asked.
func (v *Veil) moving() ([]mover, error) {
	for begin := time.Now(); ; time.Sleep(20 * time.Microsecond) {
		d, err := v.look()
		if err != nil || !d.running {
			return d.moves, err
		}
		if time.Since(begin) > calm {
			return nil, errBusy
		}
	}
}

var errBusy = errors.New("fault: a thread is at work in a call for long")

// quiet is how long Quiet waits.
const quiet = 2 * time.Millisecond

// Quiet calls f when all that has been read of what the programs give up has been done,
// and nothing is read meanwhile; ok is false where it does not come to that soon. A
// program that is made to stand still may do so with memory that it has given up and that
// is not made zero yet.
func (v *Veil) Quiet(f func() error) (ok bool, err error) {
	for begin := time.Now(); time.Since(begin) < quiet; time.Sleep(50 * time.Microsecond) {
		if !v.busy.TryLock() {
			continue
		}
		if _, _, read := v.src.VeilEvent(0); !read && !v.src.Stopping() { // by a pager that was killed
			defer v.busy.Unlock()
			return true, f()
		}
		v.busy.Unlock()
	}
	return false, nil
}

// serve deals with the next event of fd.
func (v *Veil) serve(fd int) error {
	v.busy.Lock()
	defer v.busy.Unlock()
	d, err := v.look()
	if err != nil {
		return err
	}
	known := len(d.givers)+len(d.keepers) > 0 || d.changing || d.forking
	switch {
	case len(d.pids) != 1 || !known:
		return v.standing()
	case !d.single:
		return v.held(fd)
	case !v.ahead(d):
		return v.standing()
	}
	m, ok := v.read(fd, 0)
	if !ok {
		return nil
	}
	if m.Event == sys.UffdEventRemove && !covers(d.givers, m) && !covers(d.keepers, m) {
		return v.standing() // with what was read
	}
	v.moves, v.followed = nil, nil
	v.src.ClearVeilEvents()
	return nil
}

// ahead gives up what the one process is giving up, before its calls go on: what it
// advises, and what it has unmapped, for a mapping that grows (mremap) would show
// that again. It reports whether that could be told.
func (v *Veil) ahead(d doing) bool {
	var all []page.Range
	for _, g := range d.givers {
		src, one, err := v.cfg.Locate(g.pid, g.r)
		if err != nil || !one || v.doubles(g.pid, g.r) {
			return false
		}
		all = append(all, src...)
	}
	var failed error
	if d.changing {
		var lost page.Set
		lost, failed = v.lost(d.pids[0]) // which it tells once
		all = append(all, lost.Ranges()...)
	}
	return errors.Join(failed, v.giveUp(all)) == nil
}

func (v *Veil) giveUp(src []page.Range) (err error) {
	for _, r := range src {
		v.src.GiveUp(r)
	}
	for _, r := range src {
		err = errors.Join(err, v.cfg.Invalidate(r))
	}
	return err
}

// read reads one event of fd into slot k, notes whose it is, and follows forks.
func (v *Veil) read(fd, k int) (m sys.UffdMsg, ok bool) {
	d, err := v.look() // before: the event's reading lets the call go on
	if err != nil {
		return m, false
	}
	for _, mv := range d.moves {
		if !slices.Contains(v.moves, mv) {
			v.moves = append(v.moves, mv)
		}
	}
	if err := v.save(); err != nil {
		v.log.Error("what is known of the program's memory cannot be saved", "err", err)
	}
	v.src.SetVeilPID(k, v.only(fd, d.pids))
	n, err := sys.ReadNow(fd, v.src.VeilSlot(k))
	if n <= 0 {
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			v.drop(fd)
		}
		return m, false
	}
	m, _, ok = v.src.VeilEvent(k)
	switch m.Event {
	case sys.UffdEventFork:
		v.adopt(m.ForkFD)
	case sys.UffdEventRemove:
		if covers(d.keepers, m) && !covers(d.givers, m) {
			v.src.SetVeilPID(k, nobody)
			break
		}
		who := slices.DeleteFunc(d.givers, func(g giver) bool { return !g.r.Covers(addrs(m.Start, m.End)) })
		if len(who) > 0 && !slices.ContainsFunc(who, func(g giver) bool { return g.pid != who[0].pid }) {
			v.src.SetVeilPID(k, who[0].pid)
		}
	}
	return m, ok
}
