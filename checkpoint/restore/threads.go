package restore

import (
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

const threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM

// defaultTimerSlack is a new thread's, in nanoseconds.
const defaultTimerSlack = 50_000

// threadState is what each thread sets of its own. What blocks until a page is
// there comes last: the kernel writes to the rseq area when the thread returns.
func threadState(s *script, p *image.Process, t *image.Thread, lastCap int, own *image.Creds) {
	s.onf("thread %d", t.TID)
	s.call(unix.SYS_SET_TID_ADDRESS, t.ClearTID)
	if t.Robust != 0 {
		s.call(unix.SYS_SET_ROBUST_LIST, t.Robust, t.RobustSz)
	}
	s.call(unix.SYS_PRCTL, unix.PR_SET_NAME, s.String(t.Comm), 0, 0, 0)
	s.onf("personality %#x", p.Personality)
	s.call(unix.SYS_PERSONALITY, uint64(p.Personality))
	if t.AltStack.Flags&sys.SSDisable == 0 && t.AltStack.Size != 0 {
		s.onf("alternate stack of thread %d", t.TID)
		st := sys.StackT{SP: t.AltStack.SP, Flags: t.AltStack.Flags &^ sys.SSOnStack, Size: t.AltStack.Size}
		s.call(unix.SYS_SIGALTSTACK, put(s, &st), 0)
	}
	if t.TimerSlk != 0 && t.TimerSlk != defaultTimerSlack {
		s.onf("timer slack of thread %d", t.TID)
		s.call(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, t.TimerSlk, 0, 0, 0)
	}
	if t.IOPrio != 0 {
		s.onf("i/o priority of thread %d", t.TID)
		s.call(unix.SYS_IOPRIO_SET, sys.IoprioWhoProcess, 0, uint64(t.IOPrio))
	}
	for _, si := range t.Pending {
		var info sys.Siginfo
		copy(info[:], si)
		s.onf("pending signal %d of thread %d", info.Signo(), t.TID)
		s.call(unix.SYS_RT_TGSIGQUEUEINFO, uint64(p.PID), uint64(t.TID), uint64(info.Signo()), s.Bytes(si))
	}
	credentials(s, p, lastCap, own)
	if p.PDeathSig != 0 {
		s.onf("parent death signal of thread %d", t.TID)
		s.call(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uint64(p.PDeathSig), 0, 0, 0)
	}
	if t.Rseq.Ptr != 0 {
		s.onf("rseq of thread %d", t.TID)
		s.call(unix.SYS_RSEQ, t.Rseq.Ptr, uint64(t.Rseq.Size), 0, uint64(t.Rseq.Sig))
	}
}

// setRegisters makes a stopped thread what it was. On the tracer's thread.
func setRegisters(tid int, t *image.Thread) error {
	if err := sys.PtraceSetXState(tid, t.XState); err != nil {
		return about(err, "extended state of thread %d, %d bytes", t.TID, len(t.XState))
	}
	r := regs(&t.Regs)
	if err := sys.PtraceSetRegs(tid, &r); err != nil {
		return about(err, "registers of thread %d", t.TID)
	}
	if err := sys.PtraceSetSigmask(tid, t.SigMask); err != nil {
		return about(err, "signal mask of thread %d", t.TID)
	}
	return nil
}

// regs is the kernel's form. The thread is to go on in its program and not to
// restart a call: that was settled at the capture.
func regs(r *image.Regs) sys.Regs {
	return sys.Regs{
		R15: r.R15, R14: r.R14, R13: r.R13, R12: r.R12, Rbp: r.RBP, Rbx: r.RBX, R11: r.R11, R10: r.R10, R9: r.R9, R8: r.R8,
		Rax: r.RAX, Rcx: r.RCX, Rdx: r.RDX, Rsi: r.RSI, Rdi: r.RDI, Orig_rax: ^uint64(0), Rip: r.RIP, Cs: r.CS, Eflags: r.Flags,
		Rsp: r.RSP, Ss: r.SS, Fs_base: r.FSBase, Gs_base: r.GSBase, Ds: r.DS, Es: r.ES, Fs: r.FS, Gs: r.GS,
	}
}
