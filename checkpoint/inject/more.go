package inject

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// moreBlocks maps room for trampolines of threads that were not there when the
// stub area was made.
func (t *Target) moreBlocks(threads []*thread) error {
	size := uint64(page.Addr(len(threads) * blockSize).Ceil())
	b := &Batch{t: t}
	c := b.Call(unix.SYS_MMAP, 0, size, unix.PROT_READ|unix.PROT_EXEC,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, ^uint64(0), 0)
	b.recs = t.growRec
	if err := b.Run(t.home); err != nil {
		return fmt.Errorf("map %d bytes for the trampolines of %d threads in pid %d: %w", size, len(threads), t.pid, err)
	}
	at := page.Addr(c.ret)
	t.extra = append(t.extra, page.Range{Start: at, End: at + page.Addr(size)})
	buf := make([]byte, len(threads)*blockSize)
	for i, th := range threads {
		th.block = uint64(at) + uint64(i*blockSize)
		copy(buf[i*blockSize:], resumeBlock(&th.how.Ready, th.mask))
	}
	return t.writeCode(at, buf)
}

// unmapSelf unmaps the area of an adopted target from inside it, by way of the
// system call's own stops: the page that it returns to is gone.
func (t *Target) unmapSelf(tid int) error {
	var r sys.Regs
	if err := sys.PtraceGetRegs(tid, &r); err != nil {
		return t.gone(err)
	}
	r.Rip = t.idle + 5 // the system call instruction
	r.Rax, r.Rdi, r.Rsi = unix.SYS_MUNMAP, uint64(t.area.Start), t.area.Bytes()
	r.Orig_rax = ^uint64(0)
	if err := sys.PtraceSetRegs(tid, &r); err != nil {
		return t.gone(err)
	}
	for stops := 0; stops < 2; {
		if err := unix.PtraceSyscall(tid, 0); err != nil {
			return t.gone(err)
		}
		ws, err := sys.WaitStop(tid)
		if err != nil {
			return t.gone(err)
		}
		// With or without PTRACE_O_TRACESYSGOOD.
		if s := ws.StopSignal(); sys.Event(ws) == 0 && (s == unix.SIGTRAP|0x80 || s == unix.SIGTRAP) {
			stops++
		}
	}
	if err := sys.PtraceGetRegs(tid, &r); err != nil {
		return t.gone(err)
	}
	delete(t.threads, tid)
	if e := -int64(r.Rax); e > 0 && e < 4096 {
		return errors.Join(fmt.Errorf("unmap the stub area of pid %d", t.pid), unix.Errno(e))
	}
	return nil
}
