package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func ptrace(req, tid int, addr, data uintptr) (uintptr, error) {
	r, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, data, 0, 0)
	if e != 0 {
		return r, e
	}
	return r, nil
}

func ptracePtr(req, tid int, addr uintptr, data unsafe.Pointer) (uintptr, error) {
	r, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(req), uintptr(tid), addr, uintptr(data), 0, 0)
	if e != 0 {
		return r, e
	}
	return r, nil
}

// PtraceSeize attaches without stopping; options are unix.PTRACE_O_*.
func PtraceSeize(tid, options int) error {
	_, err := ptrace(unix.PTRACE_SEIZE, tid, 0, uintptr(options))
	return err
}

// PtraceInterrupt asks a seized thread to stop.
func PtraceInterrupt(tid int) error {
	_, err := ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0)
	return err
}

// PtraceCont lets a stopped thread run, delivering sig unless it is 0.
func PtraceCont(tid int, sig unix.Signal) error {
	_, err := ptrace(unix.PTRACE_CONT, tid, 0, uintptr(sig))
	return err
}

// PtraceListen leaves a thread in its group stop, yet listening for SIGCONT.
func PtraceListen(tid int) error {
	_, err := ptrace(unix.PTRACE_LISTEN, tid, 0, 0)
	return err
}

// PtraceSetOptions replaces the options given at the attach.
func PtraceSetOptions(tid, options int) error {
	_, err := ptrace(unix.PTRACE_SETOPTIONS, tid, 0, uintptr(options))
	return err
}

// PtraceDetach lets go of a stopped thread, delivering sig unless it is 0.
func PtraceDetach(tid int, sig unix.Signal) error {
	_, err := ptrace(unix.PTRACE_DETACH, tid, 0, uintptr(sig))
	return err
}

// PtraceGetRegs reads the general registers of a stopped thread.
func PtraceGetRegs(tid int, r *Regs) error {
	_, err := ptracePtr(unix.PTRACE_GETREGS, tid, 0, unsafe.Pointer(r))
	return err
}

// PtraceSetRegs sets the general registers of a stopped thread.
func PtraceSetRegs(tid int, r *Regs) error {
	_, err := ptracePtr(unix.PTRACE_SETREGS, tid, 0, unsafe.Pointer(r))
	return err
}

// PtraceGetXState reads the extended processor state, in XSAVE standard form,
// into buf and returns its length; buf should have 16 KiB.
func PtraceGetXState(tid int, buf []byte) (int, error) {
	iov := unix.Iovec{Base: unsafe.SliceData(buf), Len: uint64(len(buf))}
	_, err := ptracePtr(unix.PTRACE_GETREGSET, tid, ntX86XState, unsafe.Pointer(&iov))
	return int(iov.Len), err
}

// PtraceSetXState sets the extended processor state. The kernel refuses one
// whose features or size are not its own.
func PtraceSetXState(tid int, buf []byte) error {
	iov := unix.Iovec{Base: unsafe.SliceData(buf), Len: uint64(len(buf))}
	_, err := ptracePtr(unix.PTRACE_SETREGSET, tid, ntX86XState, unsafe.Pointer(&iov))
	return err
}

// PtraceGetSigmask reads the mask that the thread will have when it is back in
// its program: inside sigsuspend and its like, the one that will be restored.
func PtraceGetSigmask(tid int) (mask uint64, err error) {
	_, err = ptracePtr(unix.PTRACE_GETSIGMASK, tid, sigsetSize, unsafe.Pointer(&mask))
	return mask, err
}

// PtraceSetSigmask sets the mask of blocked signals.
func PtraceSetSigmask(tid int, mask uint64) error {
	_, err := ptracePtr(unix.PTRACE_SETSIGMASK, tid, sigsetSize, unsafe.Pointer(&mask))
	return err
}

// PtraceGetSiginfo reads the siginfo of the signal that a thread stopped for.
func PtraceGetSiginfo(tid int) (s Siginfo, err error) {
	_, err = ptracePtr(unix.PTRACE_GETSIGINFO, tid, 0, unsafe.Pointer(&s))
	return s, err
}

// PtraceSetSiginfo replaces the siginfo of the signal that a thread stopped for.
func PtraceSetSiginfo(tid int, s *Siginfo) error {
	_, err := ptracePtr(unix.PTRACE_SETSIGINFO, tid, 0, unsafe.Pointer(s))
	return err
}

// PtraceGetEventMsg reads what an event stop carries: of a fork, the new tid.
func PtraceGetEventMsg(tid int) (msg uint64, err error) {
	_, err = ptracePtr(unix.PTRACE_GETEVENTMSG, tid, 0, unsafe.Pointer(&msg))
	return msg, err
}

// PtracePeekSiginfo returns the pending signals of the thread, or those of its
// whole process, in the order of their queue, and leaves them there.
func PtracePeekSiginfo(tid int, shared bool) ([]Siginfo, error) {
	var out []Siginfo
	for {
		var buf [4]Siginfo
		a := peekSiginfoArgs{Off: uint64(len(out)), Nr: int32(len(buf))}
		if shared {
			a.Flags = ptracePeekSiginfoShared
		}
		n, err := ptracePtr(unix.PTRACE_PEEKSIGINFO, tid, uintptr(unsafe.Pointer(&a)), unsafe.Pointer(&buf))
		if err != nil {
			return out, err
		}
		out = append(out, buf[:n]...)
		// Fewer than asked for is not the end: the kernel also stops where a signal
		// waits for the caller (kernel/ptrace.c, ptrace_peek_siginfo).
		if n == 0 {
			return out, nil
		}
	}
}

// PtraceGetRseq reads where the thread has registered its restartable sequences.
func PtraceGetRseq(tid int) (c RseqConfiguration, err error) {
	_, err = ptracePtr(unix.PTRACE_GET_RSEQ_CONFIGURATION, tid, unsafe.Sizeof(c), unsafe.Pointer(&c))
	if err == unix.EIO {
		err = &NotSupported{"PTRACE_GET_RSEQ_CONFIGURATION", "5.13", err}
	}
	return c, err
}

// PtraceGetSyscallUserDispatch reads whether the thread has its system calls
// diverted (PR_SET_SYSCALL_USER_DISPATCH).
func PtraceGetSyscallUserDispatch(tid int) (c SyscallUserDispatch, err error) {
	_, err = ptracePtr(unix.PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, unsafe.Sizeof(c), unsafe.Pointer(&c))
	if err == unix.EIO {
		err = &NotSupported{"PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG", "6.4", err}
	}
	return c, err
}

// Wait waits for a change of one tracee, threads included, and retries when
// interrupted.
func Wait(tid int) (unix.WaitStatus, error) {
	ws, _, err := wait(tid, 0)
	return ws, err
}

// WaitNow is Wait that does not block; ok says whether there was a change.
func WaitNow(tid int) (ws unix.WaitStatus, ok bool, err error) {
	return wait(tid, unix.WNOHANG)
}

func wait(tid, flags int) (ws unix.WaitStatus, ok bool, err error) {
	for {
		pid, err := unix.Wait4(tid, &ws, unix.WALL|flags, nil)
		if err == unix.EINTR {
			continue
		}
		return ws, pid == tid && err == nil, err
	}
}

// WaitStop waits until a tracee stops. It leaves the end of a tracee to others:
// ECHILD then, since the tracer may be its parent too, who wants to be told.
func WaitStop(tid int) (unix.WaitStatus, error) {
	ws, _, err := waitStop(tid, 0)
	return ws, err
}

// WaitStopNow is WaitStop that does not block; ok says whether it has stopped.
func WaitStopNow(tid int) (ws unix.WaitStatus, ok bool, err error) {
	return waitStop(tid, unix.WNOHANG)
}

func waitStop(tid, flags int) (ws unix.WaitStatus, ok bool, err error) {
	for {
		var info Siginfo
		_, _, e := unix.Syscall6(unix.SYS_WAITID, unix.P_PID, uintptr(tid), uintptr(unsafe.Pointer(&info)),
			uintptr(unix.WSTOPPED|unix.WALL|flags), 0, 0)
		switch {
		case e == unix.EINTR:
			continue
		case e != 0:
			return 0, false, e
		case info.Signo() == 0:
			return 0, false, nil
		}
		// As wait4 encodes a stop.
		const stopped = 0x7f
		return unix.WaitStatus(info.status()<<8 | stopped), true, nil
	}
}
