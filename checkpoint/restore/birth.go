package restore

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// held is a process that stands still in our hands.
type held struct {
	pid int // on this host
	t   *inject.Target
}

// birth is who a process is to be.
type birth struct {
	pid, pgid, sid int
	newNS          bool // in a pid namespace of its own
}

// hold makes a stopped process, that still has the seed's memory, do calls.
func (s *Skeleton) hold(pid int) (*held, error) {
	t, err := inject.Adopt(s.tr, pid, seedArea)
	if err != nil {
		return &held{pid: pid}, err
	}
	return &held{pid, t}, nil
}

// reserve makes the process before the image is there, if enough is known.
func (s *Skeleton) reserve() error {
	c := &s.cfg
	if c.PID == 0 {
		return nil
	}
	if c.Monotonic == 0 || c.Boottime == 0 {
		if c.PIDNamespace == NamespaceHost && unix.Kill(c.PID, 0) != unix.ESRCH {
			return about(ErrPIDBusy, "pid %d", c.PID)
		}
		return nil
	}
	now := clocks{c.Monotonic, c.Boottime}
	if !c.ClocksAt.IsZero() {
		d := time.Since(c.ClocksAt)
		now = now.add(clocks{d, d})
	}
	return s.beborn(birth{pid: c.PID, pgid: c.PGID, sid: c.SID}, now)
}

// beborn makes the process, and its pid namespace where it must have one.
func (s *Skeleton) beborn(b birth, now clocks) error {
	b.newNS = s.cfg.PIDNamespace == NamespaceNew
	err := s.bear(b, now)
	if errors.Is(err, ErrPIDBusy) && s.cfg.PIDNamespace == NamespaceAuto {
		s.unborn()
		b.newNS = true
		err = s.bear(b, now)
	}
	return err
}

// bear makes the process as a child of the seed, or of an init that is one, in a
// time namespace in which the clocks show now.
func (s *Skeleton) bear(b birth, now clocks) error {
	sc := newScript(s.seed.t)
	sc.onf("time namespace")
	sc.call(unix.SYS_UNSHARE, unix.CLONE_NEWTIME)
	if err := sc.run(s.seed.pid); err != nil {
		return err
	}
	host, err := hostClocks()
	if err != nil {
		return err
	}
	s.offsets = now.sub(host)
	if err := setOffsets(s.seed.pid, s.offsets); err != nil {
		return fmt.Errorf("time namespace: offsets %v: %w", s.offsets, err)
	}
	parent := s.seed
	switch {
	case b.newNS && b.pid == 1:
		s.target, err = s.fork(s.seed, unix.CLONE_NEWPID, 0)
	case b.newNS:
		if s.init, err = s.fork(s.seed, unix.CLONE_NEWPID, 0); err != nil {
			break
		}
		parent = s.init
		fallthrough
	default:
		if parent, err = s.standIns(parent, b); err == nil {
			s.target, err = s.fork(parent, 0, b.pid)
		}
	}
	if err != nil {
		return err
	}
	s.pid, s.born, s.area = s.target.pid, b, seedArea
	return s.join(b)
}

// fork makes h fork. want is the child's pid, 0 any.
func (s *Skeleton) fork(h *held, flags uint64, want int) (*held, error) {
	sc := newScript(h.t)
	args := sys.CloneArgs{Flags: flags, ExitSignal: uint64(unix.SIGCHLD)}
	if want != 0 {
		args.SetTID, args.SetTIDSize = sc.Bytes(le32(uint32(want))), 1
	}
	sc.onf("pid %d", want)
	sc.call(unix.SYS_CLONE3, put(sc, &args), uint64(sys.SizeOf[sys.CloneArgs]()))
	if err := busy(sc.run(h.pid)); err != nil {
		return nil, err
	}
	if len(sc.Clones()) != 1 {
		return nil, fmt.Errorf("fork of pid %d: %d children", h.pid, len(sc.Clones()))
	}
	return s.hold(sc.Clones()[0])
}

// busy gives the errnos of clone3 with a wanted pid their meaning.
func busy(err error) error {
	switch {
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("%w: %w", ErrPIDBusy, err)
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w: perhaps beyond kernel.pid_max: %w", ErrPIDBusy, err)
	}
	return err
}

// standIns makes processes with the numbers of the session and the group that
// the process was in but did not lead, so that it is in such ones again, and
// returns whom it must descend from. They end as soon as it exists. Numbers that
// are taken are left alone: the process is then in the seed's.
func (s *Skeleton) standIns(parent *held, b birth) (*held, error) {
	lead := func(of *held, number int, nr uintptr) (*held, error) {
		h := of
		if !b.newNS || number != 1 {
			var err error
			if h, err = s.fork(of, 0, number); errors.Is(err, ErrPIDBusy) {
				s.cfg.Log.Info("session or group number is taken", "id", s.cfg.ID, "number", number)
				return nil, nil
			} else if err != nil {
				return nil, err
			}
			s.helpers = append(s.helpers, h)
		}
		sc := newScript(h.t)
		sc.onf("stand-in %d", number)
		sc.call(nr, 0, 0)
		return h, sc.run(h.pid)
	}
	if b.sid <= 0 || b.sid == b.pid {
		return parent, nil
	}
	leader, err := lead(parent, b.sid, unix.SYS_SETSID)
	if err != nil || leader == nil {
		return parent, err
	}
	if b.pgid > 0 && b.pgid != b.pid && b.pgid != b.sid {
		if _, err := lead(leader, b.pgid, unix.SYS_SETPGID); err != nil {
			return nil, err
		}
	}
	return leader, nil
}

// join makes the process leader of its session or group, or a member of it.
func (s *Skeleton) join(b birth) error {
	sc := newScript(s.target.t)
	switch {
	case b.sid == b.pid:
		sc.onf("session %d", b.sid)
		sc.call(unix.SYS_SETSID)
	case b.pgid == b.pid:
		sc.onf("process group %d", b.pgid)
		sc.call(unix.SYS_SETPGID, 0, 0)
	case b.pgid > 0:
		// Only where the group is in our session, that is made above.
		sc.call(unix.SYS_SETPGID, 0, uint64(b.pgid)).Optional()
	default:
		sc.Discard()
		return nil
	}
	return sc.run(s.target.pid)
}

// fits reports whether the process that was made before the image came is, or
// can still become, what the image wants: leader of its session or group it can
// become later, member of another's only by birth.
func (s *Skeleton) fits(p *image.Process, now clocks) bool {
	host, err := hostClocks()
	if err != nil || s.target == nil || s.born.pid != p.PID {
		return false
	}
	if ours := host.add(s.offsets); !ours.continues(now) {
		s.cfg.Log.Info("the clocks of the process that was made early do not fit: another is made", "pid", s.pid, "ahead", ours.sub(now).mono)
		return false
	}
	return s.born.pgid == p.PGID && s.born.sid == p.SID || s.born.sid == 0 && s.born.pgid == 0 && (p.SID <= 0 || p.SID == p.PID)
}

// unborn ends the process and what was made for it, but the seed.
func (s *Skeleton) unborn() {
	s.end(s.target, s.tids...)
	for _, h := range append(s.helpers, s.init) {
		s.end(h)
	}
	s.helpers, s.target, s.init, s.tids, s.pid = nil, nil, nil, nil, 0
	_ = s.laid.close()
	s.laid = laid{}
	s.landing.forget()
}

// end kills a held process and waits until it is gone. A leader is only reported
// when its other threads, tids, have been waited for.
func (s *Skeleton) end(h *held, tids ...int) {
	if h == nil {
		return
	}
	_ = unix.Kill(h.pid, unix.SIGKILL)
	s.tr.Do(func() {
		for _, tid := range append(slices.DeleteFunc(slices.Clone(tids), func(t int) bool { return t == h.pid }), h.pid) {
			for {
				if ws, err := sys.Wait(tid); err != nil || ws.Exited() || ws.Signaled() {
					break
				}
			}
		}
	})
	h.forget()
}

// forget closes what we have open of a process that is gone.
func (h *held) forget() {
	if h.t != nil {
		_ = h.t.Drop()
	}
}

// emancipate ends the seed and the stand-ins and lets the init, if there is one,
// begin its life. From here on the process is the child of whoever adopts it.
func (s *Skeleton) emancipate() error {
	for _, h := range append(s.helpers, s.seed) {
		s.end(h)
	}
	s.helpers, s.seed = nil, nil
	if s.init == nil {
		return nil
	}
	h := s.init
	sc := newScript(h.t)
	sc.call(unix.SYS_PRCTL, unix.PR_SET_NAME, sc.String(initName), 0, 0, 0)
	if err := sc.run(h.pid); err != nil {
		return err
	}
	if err := h.t.Close(h.pid); err != nil {
		return err
	}
	h.t = nil
	var err error
	s.tr.Do(func() {
		var r sys.Regs
		if err = sys.PtraceGetRegs(h.pid, &r); err != nil {
			return
		}
		r.Rip, r.Orig_rax, r.Rax = seedReapAt, ^uint64(0), 0
		if err = sys.PtraceSetRegs(h.pid, &r); err == nil {
			err = sys.PtraceDetach(h.pid, 0)
		}
	})
	if err != nil {
		return fmt.Errorf("init of the pid namespace: %w", err)
	}
	return nil
}

// makeThreads makes the other threads of the process, with the numbers that
// they had.
func (s *Skeleton) makeThreads(p *image.Process) error {
	s.tids = []int{s.target.pid}
	if err := s.widenTable(p); err != nil {
		return err
	}
	if len(p.Threads) == 1 {
		return nil
	}
	sc := newScript(s.target.t)
	for i := range p.Threads[1:] {
		t := &p.Threads[1+i]
		sc.on(func() string { return fmt.Sprintf("thread %d", t.TID) })
		args := sys.CloneArgs{Flags: threadFlags, SetTID: sc.Bytes(le32(uint32(t.TID))), SetTIDSize: 1}
		sc.call(unix.SYS_CLONE3, put(sc, &args), uint64(sys.SizeOf[sys.CloneArgs]()))
	}
	err := busy(sc.run(s.target.pid))
	s.tids = append(s.tids, sc.Clones()...)
	if err == nil && len(s.tids) != len(p.Threads) {
		err = fmt.Errorf("%d of %d threads", len(s.tids), len(p.Threads))
	}
	return err
}

// widenTable makes the descriptor table as large as it is going to be. Once
// threads share it, every step of its growth waits for an RCU grace period,
// which takes milliseconds.
func (s *Skeleton) widenTable(p *image.Process) error {
	most := uint64(helperFDs)
	if n := len(p.FDs); n > 0 {
		most = max(most, uint64(p.FDs[n-1].Num))
	}
	most += uint64(len(p.FDs)) + 64 // where helpers of the rebuild are
	sc := newScript(s.target.t)
	sc.onf("descriptor table of %d", most)
	// Only an optimisation: a limit that is in the way shows when it matters.
	sc.call(unix.SYS_DUP3, 0, most, unix.O_CLOEXEC).Optional()
	sc.call(unix.SYS_CLOSE, most).Optional()
	return sc.run(s.target.pid)
}

// relocate moves the stub area out of the way of taken, what the process will
// have.
func (s *Skeleton) relocate(taken []page.Range) error {
	whole := s.area
	if s.laid.maps == nil {
		whole.Start = min(whole.Start, seedText.Start)
	}
	if !overlapsAny(whole, taken) {
		return nil
	}
	to, ok := hole(areaBytes, append(append(taken, whole), s.laid.occupied()...))
	if !ok {
		return fmt.Errorf("%w: no room for %d bytes", ErrUnsupported, areaBytes)
	}
	sc := newScript(s.target.t)
	sc.onf("stub area at %v", to)
	sc.call(unix.SYS_MMAP, uint64(to.Start), to.Bytes(), unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED_NOREPLACE, minus(1), 0)
	if err := sc.run(s.target.pid); err != nil {
		return err
	}
	// Closing it unmaps the old area and leaves the thread ready for the new.
	if err := s.target.t.Close(s.target.pid); err != nil {
		return err
	}
	t, err := inject.Adopt(s.tr, s.target.pid, to)
	if err != nil {
		s.target.t = nil
		return err
	}
	s.target.t, s.area = t, to
	return nil
}

// lastCapability is the highest number of a capability that this kernel knows.
func lastCapability() (int, error) {
	b, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return 0, err
	}
	var n int
	if _, err := fmt.Sscan(string(b), &n); err != nil || n < 0 || n > 63 {
		return 0, fmt.Errorf("cap_last_cap is %q", b)
	}
	return n, nil
}
