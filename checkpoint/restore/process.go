package restore

import (
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// memoryMap sets what the kernel notes about the address space beside its
// mappings: where code, data, heap, stack and arguments lie, the auxiliary
// vector and the executable: that at path, or the descriptor exe of the process, which
// is closed. No mapping of the seed's executable may be left.
func memoryMap(s *script, p *image.Process, path string, exe int) {
	m := sys.PrctlMMMap{
		StartCode: p.MM.StartCode, EndCode: p.MM.EndCode, StartData: p.MM.StartData, EndData: p.MM.EndData,
		StartBrk: p.MM.StartBrk, Brk: p.MM.Brk, StartStack: p.MM.StartStack,
		ArgStart: p.MM.ArgStart, ArgEnd: p.MM.ArgEnd, EnvStart: p.MM.EnvStart, EnvEnd: p.MM.EnvEnd,
		AuxvSize: uint32(len(p.Auxv)), ExeFD: ^uint32(0),
	}
	if len(p.Auxv) > 0 {
		m.Auxv = s.Bytes(p.Auxv)
	}
	if exe >= 0 {
		m.ExeFD = uint32(exe)
	}
	at := put(s, &m)
	s.onf("memory map and executable %s", path)
	if exe >= 0 {
		s.call(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP, at, uint64(sys.SizeOf[sys.PrctlMMMap]()), 0)
		s.call(unix.SYS_CLOSE, uint64(exe))
	} else if path != "" {
		fd := s.call(unix.SYS_OPENAT, atFDCWD, s.String(path), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		fd.StoreAt32(at + exeFDOffset)
		s.call(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP, at, uint64(sys.SizeOf[sys.PrctlMMMap]()), 0)
		s.call(unix.SYS_CLOSE, 0).Arg(0, fd)
	} else {
		s.call(unix.SYS_PRCTL, unix.PR_SET_MM, unix.PR_SET_MM_MAP, at, uint64(sys.SizeOf[sys.PrctlMMMap]()), 0)
	}
	// Set by Lay, too.
	off := uint64(0)
	if p.THPDisable {
		off = 1
	}
	s.onf("THP setting")
	s.call(unix.SYS_PRCTL, unix.PR_SET_THP_DISABLE, off, 0, 0, 0)
}

// exeFDOffset is where struct prctl_mm_map has its descriptor.
const exeFDOffset = 12*8 + 4

// processState is what all threads share and one sets: signal actions, umask,
// directories and the like. Pending signals come later, for actions flush them.
func processState(s *script, p *image.Process) {
	var actions [65]sys.KernelSigaction
	for _, a := range p.SigActions {
		actions[a.Signal] = sys.KernelSigaction{Handler: a.Handler, Flags: a.Flags, Restorer: a.Restorer, Mask: a.Mask}
	}
	dfl := put(s, &sys.KernelSigaction{})
	for n := 1; n <= 64; n++ {
		if n == int(unix.SIGKILL) || n == int(unix.SIGSTOP) {
			continue
		}
		s.on(func() string { return fmt.Sprintf("action of signal %d", n) })
		at := dfl
		if actions[n] != (sys.KernelSigaction{}) {
			at = put(s, &actions[n])
		}
		s.call(unix.SYS_RT_SIGACTION, uint64(n), at, 0, 8)
	}
	s.onf("umask")
	s.call(unix.SYS_UMASK, uint64(p.Umask))
	if p.Cwd != "" {
		s.onf("working directory %s", p.Cwd)
		s.call(unix.SYS_CHDIR, s.String(p.Cwd))
	}
	if p.Root != "" && p.Root != "/" {
		s.onf("root directory %s", p.Root)
		s.call(unix.SYS_CHROOT, s.String(p.Root))
	}
	if p.ChildSubreaper {
		s.onf("child subreaper")
		s.call(unix.SYS_PRCTL, unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	}
}

// pendingShared queues the signals that wait for any thread of the process.
// They stay pending, for the threads block everything now.
func pendingShared(s *script, p *image.Process) {
	for _, si := range p.Pending {
		var info sys.Siginfo
		copy(info[:], si)
		s.onf("pending signal %d", info.Signo())
		s.call(unix.SYS_RT_SIGQUEUEINFO, uint64(p.PID), uint64(info.Signo()), s.Bytes(si))
	}
}

// outside sets what can be set from outside, without a call of the process: its
// limits, and what says how its threads are scheduled. tids are those of this
// host, in the order of p.Threads.
func (s *Skeleton) outside(p *image.Process, tids []int) error {
	for _, r := range p.Rlimits {
		l := unix.Rlimit{Cur: r.Cur, Max: r.Max}
		if err := unix.Prlimit(tids[0], r.Resource, &l, nil); err != nil {
			return about(err, "resource limit %d", r.Resource)
		}
	}
	if p.OOMScoreAdj != s.seedOOM {
		name := fmt.Sprintf("/proc/%d/oom_score_adj", tids[0])
		if err := os.WriteFile(name, []byte(strconv.Itoa(p.OOMScoreAdj)), 0); err != nil {
			return about(err, "oom_score_adj %d", p.OOMScoreAdj)
		}
	}
	own, err := sys.SchedGetattr(tids[0])
	if err != nil {
		return err
	}
	cpus, err := sys.SchedGetaffinity(tids[0])
	if err != nil {
		return err
	}
	for i := range p.Threads {
		t := &p.Threads[i]
		if err := setPolicy(tids[i], &t.Sched, own); err != nil {
			return about(err, "scheduling policy %d of thread %d", t.Sched.Policy, t.TID)
		}
		if err := setAffinity(tids[i], t.Affinity, cpus); err != nil {
			// A host with fewer processors gives a thread those that it has.
			s.cfg.Log.Warn("affinity not restored", "id", s.cfg.ID, "tid", t.TID, "err", err)
		}
	}
	return nil
}

// setPolicy sets how one thread is scheduled, unless that is how it is: own.
func setPolicy(tid int, a *image.Sched, own sys.SchedAttr) error {
	if a.Policy == own.Policy && a.Flags == own.Flags && a.Nice == own.Nice && a.Priority == own.Priority &&
		a.Policy != unix.SCHED_DEADLINE {
		return nil
	}
	return unix.SchedSetAttr(tid, &unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: a.Policy, Flags: a.Flags, Nice: a.Nice, Priority: a.Priority,
		Runtime: a.Runtime, Deadline: a.Deadline, Period: a.Period,
	}, 0)
}

// setAffinity binds a thread to processors, unless it is: own.
func setAffinity(tid int, words, own []uint64) error {
	if len(words) == 0 || slices.Equal(words, own) {
		return nil
	}
	var set unix.CPUSet
	for i, w := range words {
		for ; w != 0; w &= w - 1 {
			set.Set(64*i + bits.TrailingZeros64(w))
		}
	}
	return unix.SchedSetaffinity(tid, &set)
}
