package inject

import (
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// faults are the signals that an instruction raises. They stay as the program
// has them: blocked, a fault of the stub would make the kernel throw away the
// program's handler.
const faults = 1<<(unix.SIGSEGV-1) | 1<<(unix.SIGBUS-1) | 1<<(unix.SIGILL-1) |
	1<<(unix.SIGFPE-1) | 1<<(unix.SIGTRAP-1) | 1<<(unix.SIGSYS-1)

// inspect chooses the signal and returns the number of threads.
func (t *Target) inspect(tid int) (threads int, err error) {
	st, err := proc.ReadThreadStatus(t.pid, tid)
	if err != nil {
		return 0, err
	}
	stopped := st.State == 'T'
	t.sig = chooseSignal(st.SigIgnored, st.SigCaught, st.SigBlocked|st.SigPending|st.SharedPending, stopped)
	if st.Seccomp != 0 {
		return 0, fmt.Errorf("thread %d has a seccomp filter, which would judge injected calls: %w", tid, ErrSeccomp)
	}
	return st.Threads, nil
}

// chooseSignal finds a signal that means nothing to the program: ignored, or not
// caught and ignored by default, and neither blocked nor pending, so that one
// that comes from outside meanwhile may be lost. SIGCONT comes last, since it
// undoes stops. A program that catches all of them gets SIGURG: should the
// tracer die, its handler is called once too often, which the handlers of
// SIGURG expect.
func chooseSignal(ignored, caught, busy uint64, stopped bool) unix.Signal {
	can := func(s unix.Signal) bool { return busy&sys.SigBit(int(s)) == 0 }
	for _, s := range []unix.Signal{unix.SIGURG, unix.SIGWINCH, unix.SIGCHLD} {
		if can(s) && caught&sys.SigBit(int(s)) == 0 {
			return s
		}
	}
	for s := unix.Signal(1); s <= 31; s++ {
		if ignored&sys.SigBit(int(s)) == 0 || !can(s) || faults&sys.SigBit(int(s)) != 0 {
			continue
		}
		switch s {
		case unix.SIGKILL, unix.SIGSTOP, unix.SIGCONT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU:
		default:
			return s
		}
	}
	if !stopped && can(unix.SIGCONT) && caught&sys.SigBit(int(unix.SIGCONT)) == 0 {
		return unix.SIGCONT
	}
	return unix.SIGURG
}
