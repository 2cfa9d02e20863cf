package inject

import (
	"github.com/pageferry/pageferry/internal/sys"
	"golang.org/x/sys/unix"
)

// From <linux/errno.h> of the kernel, which user space never sees: what a call
// leaves in rax when a signal or a stop interrupted it.
const (
	ERESTARTSYS           = 512
	ERESTARTNOINTR        = 513
	ERESTARTNOHAND        = 514
	ERESTART_RESTARTBLOCK = 516
)

// Interrupted is how a thread goes on after a stop.
type Interrupted struct {
	// Kernel are the registers to leave behind in an event or signal stop. A
	// call that was interrupted is marked so, and the kernel restarts it or
	// fails it with EINTR when the thread leaves the stop, by the rules for
	// the signals that it finds then.
	Kernel sys.Regs
	// Ready are registers that need no help of the kernel: the call is made
	// again.
	Ready sys.Regs
	// Fresh are likewise, in a process that lacks the kernel's restart block:
	// there a call with a timeout begins anew.
	Fresh sys.Regs
	// Code is the ERESTART* of the call, 0 if none was interrupted.
	Code int
	// Nr is the call's number, where Code is not 0.
	Nr uint64
	// Mark is what SetMark has left in the call, 0 for none: then it is the same
	// call still, restarted.
	Mark uint32
}

// markShift: the kernel takes the lower half of rax for the number of a call, and
// restarts it with all of it (do_syscall_x64 and arch_do_signal_or_restart; since
// 5.14, see sys.WideNumbers). What is in the upper half is there at the next stop if
// it is the same call, and not when that has returned: then rax is its result. No
// program can see it.
const markShift = 32

// SetMark marks the call that a thread goes on with, by a number from 1 to 2^31-1.
func (in *Interrupted) SetMark(mark uint32) {
	in.Mark = mark
	in.Kernel.Orig_rax = in.Nr | uint64(mark)<<markShift
}

// Answer makes the thread go on as if the call had returned v.
func (in *Interrupted) Answer(v int64) {
	in.Kernel.Rax, in.Kernel.Orig_rax = uint64(v), ^uint64(0)
}

// interruptedNr are the calls that answer EINTR whenever a stop wakes them
// (signal(7), "interrupted by a stop signal"), plus those that do so on a socket
// with a timeout. None has done anything by then, so all can be made again.
var interruptedNr = map[uint64]bool{
	unix.SYS_READ: true, unix.SYS_WRITE: true, unix.SYS_READV: true, unix.SYS_WRITEV: true,
	unix.SYS_CONNECT: true, unix.SYS_ACCEPT: true, unix.SYS_ACCEPT4: true,
	unix.SYS_SENDTO: true, unix.SYS_RECVFROM: true, unix.SYS_SENDMSG: true, unix.SYS_RECVMSG: true,
	unix.SYS_RECVMMSG: true, unix.SYS_SENDMMSG: true,
	unix.SYS_SEMOP: true, unix.SYS_SEMTIMEDOP: true, unix.SYS_RT_SIGTIMEDWAIT: true,
	unix.SYS_IO_GETEVENTS: true, unix.SYS_EPOLL_WAIT: true, unix.SYS_EPOLL_PWAIT: true, unix.SYS_EPOLL_PWAIT2: true,
}

// Interpret says how a thread that stopped with registers r goes on.
func Interpret(r sys.Regs) Interrupted {
	in := Interrupted{Kernel: r, Ready: r, Fresh: r}
	in.Ready.Orig_rax, in.Fresh.Orig_rax = ^uint64(0), ^uint64(0)
	if int64(r.Orig_rax) < 0 {
		return in
	}
	in.Nr, in.Mark = r.Orig_rax&(1<<markShift-1), uint32(r.Orig_rax>>markShift)
	switch code := -int64(r.Rax); code {
	case ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK:
		in.Code = int(code)
	case int64(unix.EINTR):
		if !interruptedNr[in.Nr] {
			return in
		}
		// Had a handler run, rax would no longer say EINTR: it was the stop.
		in.Code = ERESTARTNOHAND
		in.Kernel.Rax = minus(ERESTARTNOHAND)
	default:
		return in
	}
	in.Kernel.Orig_rax = in.Nr
	const syscallLen = 2
	in.Ready.Rip -= syscallLen
	in.Ready.Rax = in.Nr
	in.Fresh.Rip, in.Fresh.Rax = in.Ready.Rip, in.Ready.Rax
	if in.Code == ERESTART_RESTARTBLOCK {
		in.Ready.Rax = unix.SYS_RESTART_SYSCALL
	}
	return in
}

func minus(n int64) uint64 { return uint64(-n) }
