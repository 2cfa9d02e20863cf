package checkpoint

import (
	"encoding/binary"
	"slices"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"golang.org/x/sys/unix"
)

// taskCommLen is TASK_COMM_LEN, affinityBytes a cpu_set_t.
const (
	taskCommLen   = 16
	affinityBytes = 128
)

// threadCalls appends the calls by which a thread tells about itself, and returns
// what takes their results into th.
func (c *capture) threadCalls(b *inject.Batch, i int) (decode func() error) {
	th := &c.p.Threads[i]
	tid := b.Call(unix.SYS_GETTID)
	clear := b.Space(8)
	b.Call(unix.SYS_PRCTL, unix.PR_GET_TID_ADDRESS, clear.Addr())
	alt := b.Space(sys.SizeOf[sys.StackT]())
	b.Call(unix.SYS_SIGALTSTACK, 0, alt.Addr())
	comm := b.Space(taskCommLen)
	b.Call(unix.SYS_PRCTL, unix.PR_GET_NAME, comm.Addr())
	robust := b.Space(16)
	b.Call(unix.SYS_GET_ROBUST_LIST, 0, robust.Addr(), robust.Addr()+8).Optional()
	slack := b.Call(unix.SYS_PRCTL, unix.PR_GET_TIMERSLACK).Optional()
	attr := b.Space(sys.SizeOf[sys.SchedAttr]())
	b.Call(unix.SYS_SCHED_GETATTR, 0, attr.Addr(), uint64(sys.SizeOf[sys.SchedAttr]()), 0)
	cpus := b.Space(affinityBytes)
	affinity := b.Call(unix.SYS_SCHED_GETAFFINITY, 0, affinityBytes, cpus.Addr()).Optional()
	prio := b.Call(unix.SYS_IOPRIO_GET, sys.IoprioWhoProcess, 0).Optional()
	creds := b.Space(24 + 2*sys.SizeOf[sys.CapData]())
	b.Call(unix.SYS_GETRESUID, creds.Addr(), creds.Addr()+4, creds.Addr()+8)
	b.Call(unix.SYS_GETRESGID, creds.Addr()+12, creds.Addr()+16, creds.Addr()+20)
	b.Call(unix.SYS_CAPGET, b.Bytes(sys.AsBytes(&sys.CapHeader{Version: sys.CapVersion3})), creds.Addr()+24)

	return func() error {
		le := binary.LittleEndian
		v, err := tid.Ret()
		if err != nil {
			return err
		}
		th.TID = int(v)
		th.ClearTID = le.Uint64(clear.Bytes())
		st, _ := sys.FromBytes[sys.StackT](alt.Bytes())
		th.AltStack = image.AltStack{SP: st.SP, Flags: st.Flags, Size: st.Size}
		th.Comm = text(comm.Bytes())
		th.Robust, th.RobustSz = le.Uint64(robust.Bytes()), le.Uint64(robust.Bytes()[8:])
		th.TimerSlk, _ = slack.Ret()
		a, _ := sys.FromBytes[sys.SchedAttr](attr.Bytes())
		th.Sched = image.Sched{Policy: a.Policy, Flags: a.Flags, Nice: a.Nice, Priority: a.Priority,
			Runtime: a.Runtime, Deadline: a.Deadline, Period: a.Period}
		if n, err := affinity.Ret(); err == nil {
			for at := 0; at+8 <= min(int(n), affinityBytes); at += 8 {
				th.Affinity = append(th.Affinity, le.Uint64(cpus.Bytes()[at:]))
			}
		}
		if p, err := prio.Ret(); err == nil && int(p) != defaultIOPrio(&th.Sched) {
			th.IOPrio = int(p)
		}
		if i == 0 {
			c.creds = slices.Clone(creds.Bytes())
		} else if !slices.Equal(c.creds, creds.Bytes()) {
			c.refuse("thread %d has other credentials than the main thread", th.HostTID)
		}
		return nil
	}
}

// defaultIOPrio is what ioprio_get says of a thread that never set one: it
// follows from policy and nice value (block/ioprio.c).
func defaultIOPrio(s *image.Sched) int {
	const classShift, rt, be, idle = 13, 1, 2, 3
	level := int(s.Nice+20) / 5
	switch s.Policy {
	case unix.SCHED_FIFO, unix.SCHED_RR, unix.SCHED_DEADLINE:
		return rt<<classShift | level
	case unix.SCHED_IDLE:
		return idle<<classShift | level
	}
	return be<<classShift | level
}

// registers notes how a thread goes on at the destination.
func (c *capture) registers(th *image.Thread, how inject.Interrupted, mask uint64) {
	th.SigMask = mask
	r := how.Fresh
	if how.Code == inject.ERESTART_RESTARTBLOCK {
		nr := how.Nr
		if nr == unix.SYS_RESTART_SYSCALL {
			nr = c.restarted(&how.Ready)
		}
		th.RestartB = &image.RestartB{SyscallNr: nr}
		r.Rax = nr
		if nr == unix.SYS_RESTART_SYSCALL {
			r = how.Kernel
			r.Rax, r.Orig_rax = negative(unix.EINTR), ^uint64(0)
		}
	}
	if how.Code != 0 {
		c.interrupted = append(c.interrupted, interrupted{th, how})
	}
	th.Regs = image.Regs{
		R15: r.R15, R14: r.R14, R13: r.R13, R12: r.R12, RBP: r.Rbp, RBX: r.Rbx, R11: r.R11, R10: r.R10, R9: r.R9, R8: r.R8,
		RAX: r.Rax, RCX: r.Rcx, RDX: r.Rdx, RSI: r.Rsi, RDI: r.Rdi, OrigRAX: r.Orig_rax, RIP: r.Rip, CS: r.Cs, Flags: r.Eflags,
		RSP: r.Rsp, SS: r.Ss, FSBase: r.Fs_base, GSBase: r.Gs_base, DS: r.Ds, ES: r.Es, FS: r.Fs, GS: r.Gs,
	}
}

func negative(e unix.Errno) uint64 { return uint64(-int64(e)) }

// interrupted is a thread that the freeze found in a call.
type interrupted struct {
	th  *image.Thread
	how inject.Interrupted
}

// settle fails calls with EINTR in the image where the kernel would: a signal
// with a handler is pending, and the call or the handler does not ask for a
// restart. Otherwise pause would miss the signal that came while the process was
// frozen. At the source the kernel does this by itself.
func (c *capture) settle() {
	actions := map[int]image.SigAction{}
	for _, a := range c.p.SigActions {
		actions[a.Signal] = a
	}
	taken := uint64(0) // shared signals that some thread takes
	for i := range c.p.Threads {
		th := &c.p.Threads[i]
		sig := next(th.Pending, th.SigMask, actions)
		if sig == 0 {
			if sig = next(c.p.Pending, th.SigMask|taken, actions); sig != 0 {
				taken |= sys.SigBit(sig)
			}
		}
		if sig == 0 {
			continue
		}
		for _, in := range c.interrupted {
			if in.th != th {
				continue
			}
			again := in.how.Code == inject.ERESTARTNOINTR ||
				in.how.Code == inject.ERESTARTSYS && actions[sig].Flags&sys.SARestart != 0
			if !again {
				th.Regs.RAX, th.Regs.RIP = negative(unix.EINTR), in.how.Kernel.Rip
				th.RestartB = nil
			}
		}
	}
}

// next is the first signal of a queue whose handler would be called, or 0.
func next(queue [][]byte, blocked uint64, actions map[int]image.SigAction) int {
	best := 0
	for _, raw := range queue {
		info, ok := sys.FromBytes[sys.Siginfo](raw)
		sig := info.Signo()
		if !ok || sig < 1 || sig > 64 || blocked&sys.SigBit(sig) != 0 || actions[sig].Handler <= sys.SigIgn {
			continue
		}
		if best == 0 || sig < best {
			best = sig
		}
	}
	return best
}
