package restore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// state is how far a skeleton has come.
type state uint8

const (
	seeded state = iota
	rebuilt
	parked
	released
	aborted
)

var stateNames = [...]string{"seeded", "rebuilt", "parked", "released", "aborted"}

func (s state) String() string { return stateNames[s] }

// Skeleton is a process that is being rebuilt.
type Skeleton struct {
	cfg   Config
	group cgroup.Group

	mu    sync.Mutex // held by every call; guards all below
	state state
	pid   int // of the process on this host, 0 before it is born

	tr      *proc.Tracer // nil once parked, and in a reattached skeleton
	seed    *held        // the daemon's child, that everything descends from
	init    *held        // of the new pid namespace, nil in the caller's
	helpers []*held      // stand-ins for session and group leaders
	target  *held        // the process
	tids    []int        // of its threads, in the order of the image
	born    birth        // what target was made as
	area    page.Range   // where target has its stub area
	laid    laid         // what target has of the process's memory already
	landing landing      // by which pages get there
	offsets clocks       // of its time namespace
	from    elsewhere    // files that are not here

	seedOOM     int         // oom_score_adj that children of the seed begin with
	creds       image.Creds // of the seed
	stopped     bool        // the image says SIGSTOPped
	oneByOne    bool        // by a test: as if the kernel took no vector of ranges to give up
	vectors     int         // that it took: for the same test
	countTimers bool        // by a test: as if the kernel could not be asked for a timer's number
}

// What the seed and the init of a pid namespace are called.
const (
	seedName = "pageferry-seed"
	initName = "pageferry-init"
)

// seedOptions are those of every tracee. With EXITKILL nothing that is half
// built outlives the tracer.
const seedOptions = unix.PTRACE_O_EXITKILL | unix.PTRACE_O_TRACESYSGOOD |
	unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACECLONE

// Prepare makes everything that can be made without the image: cgroup, seed,
// tracer and, where cfg.PID and the clocks are known, the process itself, empty.
// It fails with ErrPIDBusy if cfg insists on a pid that is taken.
func Prepare(ctx context.Context, cfg Config) (_ *Skeleton, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.ensureDefaults()
	s := &Skeleton{cfg: cfg}
	group, filled, err := ownGroup(&cfg)
	if err != nil {
		return nil, fmt.Errorf("restore: prepare %s: %w", cfg.ID, err)
	}
	defer filled()
	s.group = group
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("restore: prepare %s: %w", cfg.ID, err), s.abort(context.WithoutCancel(ctx)))
		}
	}()
	cfg.KillPoint("restore/prepare/before")
	s.tr = proc.NewTracer()
	if err := s.plant(); err != nil {
		return nil, err
	}
	filled()
	if err := s.reserve(); err != nil {
		return nil, err
	}
	cfg.KillPoint("restore/prepare/after")
	return s, ctx.Err()
}

// plant starts the seed and holds it.
func (s *Skeleton) plant() error {
	exe, err := unix.MemfdCreate(seedName, unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memfd_create: %w", err)
	}
	defer unix.Close(exe)
	if n, err := unix.Write(exe, seedELF()); err != nil || n != len(seedELF()) {
		return fmt.Errorf("write the seed: %w", err)
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	dir, err := os.Open(s.group.Dir())
	if err != nil {
		return err
	}
	defer dir.Close()
	var pid int
	s.tr.Do(func() {
		// On the tracer's thread, for a parent death signal goes by thread:
		// until it is traced nothing else would end the seed with the daemon.
		pid, err = syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(exe), []string{seedName}, &syscall.ProcAttr{
			Dir: "/", Env: []string{}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd()},
			Sys: &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, UseCgroupFD: true, CgroupFD: int(dir.Fd())},
		})
		if err != nil {
			return
		}
		s.seed = &held{pid: pid}
		err = seize(pid)
	})
	if err != nil {
		return fmt.Errorf("start the seed: %w", err)
	}
	if err := s.widen(pid); err != nil {
		return err
	}
	if s.seed, err = s.hold(pid); err != nil {
		return err
	}
	// Nobody is going to wait for the seed's children.
	sc := newScript(s.seed.t)
	sc.call(unix.SYS_RT_SIGACTION, uint64(unix.SIGCHLD), put(sc, &sys.KernelSigaction{Handler: sys.SigIgn}), 0, 8)
	return sc.run(pid)
}

// seize stops a running process and makes it ours. On the tracer's thread.
func seize(pid int) error {
	if err := sys.PtraceSeize(pid, seedOptions); err != nil {
		return fmt.Errorf("ptrace pid %d: %w", pid, err)
	}
	if err := sys.PtraceInterrupt(pid); err != nil {
		return fmt.Errorf("interrupt pid %d: %w", pid, err)
	}
	for {
		ws, err := sys.Wait(pid)
		if err != nil {
			return fmt.Errorf("wait for pid %d: %w", pid, err)
		}
		if !ws.Stopped() {
			return fmt.Errorf("pid %d: %w (status %#x)", pid, proc.ErrGone, uint32(ws))
		}
		if sys.Event(ws) == unix.PTRACE_EVENT_STOP {
			return nil
		}
		if err := sys.PtraceCont(pid, 0); err != nil {
			return err
		}
	}
}

// widen lifts the limits under which the process is rebuilt, as far as we may.
// Its own are set in the end.
func (s *Skeleton) widen(pid int) error {
	files := uint64(1 << 20)
	if b, err := os.ReadFile("/proc/sys/fs/nr_open"); err == nil {
		if n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64); err == nil {
			files = n
		}
	}
	for _, r := range []int{unix.RLIMIT_AS, unix.RLIMIT_DATA, unix.RLIMIT_STACK, unix.RLIMIT_FSIZE, unix.RLIMIT_MEMLOCK,
		unix.RLIMIT_NPROC, unix.RLIMIT_SIGPENDING, unix.RLIMIT_MSGQUEUE, unix.RLIMIT_CPU, unix.RLIMIT_NOFILE} {
		l := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
		if r == unix.RLIMIT_NOFILE {
			l = unix.Rlimit{Cur: files, Max: files}
		}
		err := unix.Prlimit(pid, r, &l, nil)
		if err == unix.EPERM { // without CAP_SYS_RESOURCE only to the hard limit
			if err = unix.Prlimit(pid, r, nil, &l); err == nil {
				l.Cur = l.Max
				err = unix.Prlimit(pid, r, &l, nil)
			}
		}
		if err != nil {
			return fmt.Errorf("lift resource limit %d of the seed: %w", r, err)
		}
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
	if err != nil {
		return err
	}
	if s.seedOOM, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return err
	}
	st, err := proc.ReadStatus(pid)
	if err != nil {
		return err
	}
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("secure bits: %w", err)
	}
	s.creds = image.Creds{
		UID: st.UID, GID: st.GID, Groups: st.Groups, CapInh: st.CapInh, CapPrm: st.CapPrm, CapEff: st.CapEff,
		CapBnd: st.CapBnd, CapAmb: st.CapAmb, SecureBits: uint32(bits), NoNewPrivs: st.NoNewPrivs,
	}
	return nil
}

// PID is the process's as this host sees it; 0 until it exists.
func (s *Skeleton) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pid
}

// Cgroup is the path of the process's cgroup in the file system.
func (s *Skeleton) Cgroup() string { return s.group.Dir() }
