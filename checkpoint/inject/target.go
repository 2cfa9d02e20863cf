package inject

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Target is one address space with a stub area.
type Target struct {
	tr  *proc.Tracer
	pid int
	mem *os.File // /proc/PID/mem

	area    page.Range // code, then the first arena
	code    page.Range // readable and executable
	idle    uint64     // of an adopted target: where untraced threads go
	note    page.Range // of a kept target
	slack   uint64     // address of the bootstrap code, 0 for an adopted target
	home    int        // thread that maps more memory
	growRec uint64
	space   space
	extra   []page.Range // trampolines of later threads

	sig     unix.Signal
	keep    uint64 // see KeepBlocked
	threads map[int]*thread
	rseq    map[int]rseqArea
	blocks  int // trampolines handed out
	stopSig unix.Signal
	deliver map[int]unix.Signal
}

// thread is what must be put back.
type thread struct {
	tid     int
	how     Interrupted
	mask    uint64
	open    uint64        // fault signals that are left unblocked during a batch
	block   uint64        // address of its resume trampoline
	entered bool          // registers and mask are ours
	waited  unix.Signal   // the one that our mask leaves open for the end of a batch
	stray   []sys.Siginfo // signals that came meanwhile and could not be blocked
}

// Bootstrap maps the stub area into a process of which thread tid is stopped. No
// other thread may run while it does, nor until Close, unless it cannot reach
// fork, exec or munmap of memory it does not know.
func Bootstrap(tr *proc.Tracer, pid, tid int) (t *Target, err error) {
	tr.Do(func() { t, err = bootstrap(tr, pid, tid, Room{Arena: firstArena}) })
	if err != nil {
		return nil, fmt.Errorf("prepare pid %d for injected calls: %w", pid, err)
	}
	return t, nil
}

func bootstrap(tr *proc.Tracer, pid, tid int, room Room) (*Target, error) {
	t := &Target{tr: tr, pid: pid, home: tid, threads: map[int]*thread{}}
	n, err := t.inspect(tid)
	if err != nil {
		return nil, err
	}
	if t.mem, err = openMem(pid); err != nil {
		return nil, err
	}
	ok := false
	defer func() {
		if !ok {
			_ = t.mem.Close()
		}
	}()
	code := page.Addr(page.Size + max(n, room.Threads)*blockSize).Ceil()
	arena := room.Arena + room.Note
	total := uint64(code) + arena
	if err := t.begin([]int{tid}); err != nil {
		return nil, err
	}
	maps := room.Maps
	if maps == nil {
		if maps, err = proc.ReadMaps(pid); err != nil {
			return nil, err
		}
	}
	if t.slack, err = findSlack(t.mem, maps); err != nil {
		return nil, err
	}
	at, err := t.boot(tid, unix.SYS_MMAP, 0, total, unix.PROT_READ|unix.PROT_EXEC,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uint64(0), 0)
	if err == nil {
		// Never writable and executable at once: PR_SET_MDWE forbids it.
		_, err = t.boot(tid, unix.SYS_MPROTECT, at+uint64(code), arena, unix.PROT_READ|unix.PROT_WRITE)
		if err != nil {
			_, _ = t.boot(tid, unix.SYS_MUNMAP, at, total)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map %d bytes: %w", total, err), t.releaseThread(t.threads[tid]), t.wipeSlack())
	}
	start := page.Addr(at)
	t.place(page.Range{Start: start, End: start + page.Addr(total)}, start+code)
	if room.Note > 0 {
		t.setNote(room.Note)
	}
	Point("mapped")
	if err := t.writeCode(t.code.Start, t.firstPage()); err != nil {
		return nil, errors.Join(err, t.Close(tid))
	}
	if err := t.writeBlocks([]*thread{t.threads[tid]}); err != nil {
		return nil, errors.Join(err, t.Close(tid))
	}
	ok = true
	return t, nil
}

// Adopt takes an area that is already mapped, readable, writable and executable,
// in a process whose registers need not be put back. Its threads go to sleep for
// ever where they are not stopped any more.
func Adopt(tr *proc.Tracer, pid int, area page.Range) (*Target, error) {
	if !area.Aligned() || area.Pages() < 3 {
		return nil, fmt.Errorf("stub area %v of pid %d is too small", area, pid)
	}
	mem, err := openMem(pid)
	if err != nil {
		return nil, err
	}
	t := &Target{tr: tr, pid: pid, home: pid, mem: mem, sig: unix.SIGURG, threads: map[int]*thread{}}
	t.place(area, area.Start+page.Size)
	t.idle = uint64(area.Start) + page.Size - blockSize
	err = t.writeCode(area.Start, stubCode)
	if err == nil {
		err = t.writeCode(page.Addr(t.idle), idleCode)
	}
	if err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	return t, nil
}

func (t *Target) place(area page.Range, arena page.Addr) {
	const reserved = 128 // for growRec
	t.area = area
	t.code = page.Range{Start: area.Start, End: arena}
	t.growRec = uint64(arena)
	t.space.add(page.Range{Start: arena + reserved, End: area.End})
}

func openMem(pid int) (*os.File, error) {
	f, err := os.OpenFile("/proc/"+strconv.Itoa(pid)+"/mem", os.O_RDWR, 0)
	return f, proc.Gone(pid, err)
}

// Areas returns the ranges that are mapped for the target: the stub area first,
// then what was added.
func (t *Target) Areas() []page.Range {
	t.space.mu.Lock()
	defer t.space.mu.Unlock()
	out := []page.Range{t.area}
	for _, a := range t.space.arenas[1:] {
		out = append(out, a.Range)
	}
	return append(out, t.extra...)
}

// UseSignal changes the signal that ends a batch. At a source it must be one
// that the program ignores; an adopted process may use any that it has neither
// pending nor blocked in its image.
func (t *Target) UseSignal(sig unix.Signal) { t.sig = sig }

// KeepBlocked names signals, as a set of bits, that a batch is to leave pending:
// else those of a fault are open while it runs, so that its own faults are seen.
// A batch of a thread that has one of its own pending would be ended by it.
func (t *Target) KeepBlocked(sigs uint64) {
	t.keep |= sigs
	for _, th := range t.threads {
		th.open &^= sigs
		th.waited = 0 // its mask is set again
	}
}

// Stopped is the stop signal (SIGSTOP) that arrived during a batch and was held
// back, or 0: whoever detaches sends it again.
func (t *Target) Stopped() unix.Signal { return t.stopSig }

// Forget drops what is known of a thread that has ended, or whose registers the
// caller has set itself.
func (t *Target) Forget(tid int) { delete(t.threads, tid) }

func (t *Target) writeCode(at page.Addr, b []byte) error {
	if _, err := t.mem.WriteAt(b, int64(at)); err != nil {
		return t.gone(fmt.Errorf("write code at %v: %w", at, err))
	}
	return nil
}

// gone makes the errors that the end of the process causes ErrGone.
func (t *Target) gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ECHILD) {
		return fmt.Errorf("pid %d: %w (%v)", t.pid, proc.ErrGone, err)
	}
	return err
}

// Release gives thread tid its registers and mask back. It stays stopped, and a
// call that the freeze interrupted goes on when it leaves the stop.
func (t *Target) Release(tid int) (err error) {
	th := t.threads[tid]
	if th == nil {
		return nil
	}
	t.tr.Do(func() { err = t.releaseThread(th) })
	return err
}

// releaseThread: until the registers are set the thread stands in the stub and
// goes by way of its trampoline, under either mask.
func (t *Target) releaseThread(th *thread) error {
	if !th.entered {
		delete(t.threads, th.tid)
		return nil
	}
	Point("release")
	if err := sys.PtraceSetSigmask(th.tid, th.mask); err != nil {
		return t.gone(fmt.Errorf("restore the signal mask of thread %d: %w", th.tid, err))
	}
	Point("release-mask")
	if err := sys.PtraceSetRegs(th.tid, &th.how.Kernel); err != nil {
		return t.gone(fmt.Errorf("restore the registers of thread %d: %w", th.tid, err))
	}
	Point("release-regs")
	delete(t.threads, th.tid)
	return t.passOn(th)
}

// passOn arranges that a signal which came from outside during a batch, and is
// one that the program has blocked, is queued when the thread leaves its stop.
func (t *Target) passOn(th *thread) error {
	for i := range th.stray {
		s := &th.stray[i]
		if th.mask&sys.SigBit(s.Signo()) == 0 && faults&sys.SigBit(s.Signo()) == 0 {
			continue // ignored, or it would not have been chosen
		}
		if err := sys.PtraceSetSiginfo(th.tid, s); err != nil {
			return t.gone(err)
		}
		if t.deliver == nil {
			t.deliver = make(map[int]unix.Signal)
		}
		t.deliver[th.tid] = unix.Signal(s.Signo())
		break
	}
	return nil
}

// Deliver is the signal with which a released thread must leave its stop, mostly
// 0: one that came from outside during a batch.
func (t *Target) Deliver(tid int) unix.Signal { return t.deliver[tid] }

// ReleaseAll is Release for every thread.
func (t *Target) ReleaseAll() (err error) {
	t.tr.Do(func() {
		for _, th := range t.threads {
			err = errors.Join(err, t.releaseThread(th))
		}
	})
	return err
}

// Close unmaps all that Bootstrap and later batches mapped, from inside thread
// tid, gives every thread its registers and mask back and closes what the target
// holds. The threads stay stopped. Of an adopted target the thread is left in a
// system call's exit stop with nothing of ours mapped, for the caller to set its
// registers. The target cannot be used afterwards, even on error.
func (t *Target) Close(tid int) (err error) {
	t.tr.Do(func() { err = t.close(tid) })
	return err
}

func (t *Target) close(tid int) error {
	defer t.mem.Close()
	var err error
	for _, th := range t.threads {
		if th.tid != tid && t.slack != 0 {
			err = errors.Join(err, t.releaseThread(th))
		}
	}
	err = errors.Join(err, t.unmapMore(tid))
	if t.slack == 0 {
		return errors.Join(err, t.unmapSelf(tid))
	}
	if errors.Is(err, proc.ErrGone) {
		return err
	}
	if t.threads[tid] == nil {
		if err := t.begin([]int{tid}); err != nil {
			return err
		}
	}
	_, e := t.boot(tid, unix.SYS_MUNMAP, uint64(t.area.Start), t.area.Bytes())
	err = errors.Join(err, e)
	if th := t.threads[tid]; th != nil {
		err = errors.Join(err, t.releaseThread(th))
	}
	return errors.Join(err, t.wipeSlack())
}

// unmapMore unmaps what was mapped beside the stub area, by a batch inside it.
// Other threads must have been released.
func (t *Target) unmapMore(tid int) error {
	more := t.Areas()[1:]
	if len(more) == 0 {
		return nil
	}
	if th := t.threads[tid]; th != nil && !t.code.Contains(page.Addr(th.block)) && t.idle == 0 {
		// Its trampoline must not go away under it.
		th.block = uint64(t.code.Start) + page.Size
		if err := t.writeCode(page.Addr(th.block), resumeBlock(&th.how.Ready, th.mask)); err != nil {
			return err
		}
	}
	t.space.arenas = t.space.arenas[:1]
	t.space.arenas[0].next = t.space.arenas[0].Start
	b := t.Batch()
	for _, r := range more {
		b.Call(unix.SYS_MUNMAP, uint64(r.Start), r.Bytes())
	}
	return b.Run(tid)
}

// Saved returns how thread tid goes on when it is released, and its signal mask;
// ok is false for a thread that has run no batch.
func (t *Target) Saved(tid int) (how Interrupted, mask uint64, ok bool) {
	th := t.threads[tid]
	if th == nil {
		return how, 0, false
	}
	return th.how, th.mask, true
}
