package pager

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// endLimit is how long a killed process may take to end.
const endLimit = 10 * time.Second

// Start runs a pager and its keeper. When ctx ends before it is ready, both are
// killed.
func Start(ctx context.Context, cfg Config) (*Client, error) { return start(ctx, cfg, 0, nil) }

// Takeover starts a new pager in the place of a dead one, whose keeper is the
// process keeperPID; 0 means the one recorded in cfg.Dir. Lanes must be attached
// again, in a new epoch. The old keeper is ended. When it fails the keeper is
// there still, and Takeover can be tried again.
func Takeover(ctx context.Context, cfg Config, keeperPID int) (*Client, error) {
	w, err := readState(cfg.Dir)
	if err != nil && (keeperPID == 0 || !errors.Is(err, fs.ErrNotExist)) {
		return nil, fmt.Errorf("pager: who kept the memory is not known: %w", err)
	}
	if err == nil {
		if fd, err := openProcess(w.PID, w.Start); err == nil {
			defer unix.Close(fd)
			if !over(fd, w.PID) {
				return nil, fmt.Errorf("pager %d is alive: connect to it, or kill it first", w.PID)
			}
		}
	}
	before := append([]former{w.former()}, w.Before...)
	if keeperPID != 0 && keeperPID != w.Keeper {
		before = []former{{Keeper: keeperPID}}
	}
	// The last one's keeper has everything. It is not there where that pager was killed
	// while it began; then the one before is.
	var gone []error
	for _, f := range before {
		fd, err := openProcess(f.Keeper, f.KeeperStart)
		if err == nil {
			defer unix.Close(fd)
			if !waitProcess(fd, 0) {
				return start(ctx, cfg, f.Keeper, before)
			}
			err = ErrGone
		}
		if !errors.Is(err, ErrGone) {
			return nil, fmt.Errorf("pager: keeper %d: %w", f.Keeper, err)
		}
		gone = append(gone, fmt.Errorf("keeper %d: %w", f.Keeper, err))
	}
	return nil, fmt.Errorf("%w: %w: the missing pages are lost", ErrNoKeeper, errors.Join(gone...))
}

func start(ctx context.Context, cfg Config, oldKeeper int, before []former) (*Client, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	ours, theirs, err := controlPair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	c, err := fileConn(ours)
	if err != nil {
		return nil, err
	}
	cmd, err := command(cfg)
	if err != nil {
		c.c.Close()
		return nil, err
	}
	cmd.ExtraFiles = []*os.File{theirs} // controlFD
	if cfg.Log == nil {
		// It has no log where there is no space: that must not keep it from work.
		if f, err := openLog(cfg.Dir); err == nil {
			defer f.Close()
			cmd.Stderr = f
		}
	}
	if cfg.Cgroup != "" {
		dir, err := os.Open(cfg.Cgroup)
		if err != nil {
			c.c.Close()
			return nil, fmt.Errorf("pager: cgroup: %w", err)
		}
		defer dir.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	if err := cmd.Start(); err != nil {
		c.c.Close()
		return nil, fmt.Errorf("pager: start: %w", err)
	}
	_ = theirs.Close()
	hctx, stop := whileAlive(ctx, cmd.Process.Pid)
	w, err := hello(hctx, c, settings{
		ID: cfg.ID, Dir: cfg.Dir, KeeperCgroup: cfg.KeeperCgroup, TLS: cfg.TLS, Window: cfg.Window,
		Chunk: cfg.Chunk, BulkLanes: cfg.BulkLanes, StallTimeout: cfg.StallTimeout, OldKeeper: oldKeeper,
		HeadStart: cfg.HeadStart, IdleSleep: cfg.IdleSleep, ShowDir: cfg.ShowDir, Before: before,
	}, cmd.Process.Pid)
	stop()
	var pidfd int
	if err == nil {
		pidfd, err = openProcess(w.PID, w.Start)
	}
	if err != nil {
		killUnready(cmd, oldKeeper)
		c.c.Close()
		return nil, err
	}
	for _, f := range before {
		go f.reap()
	}
	return newClient(cfg, c, w, pidfd, func() { _ = cmd.Wait() }), nil
}

// killUnready ends a pager that did not become ready, and its keeper, which is
// its only child.
func killUnready(cmd *exec.Cmd, not int) {
	// Stopped first, so that it cannot replace the keeper we kill.
	_ = cmd.Process.Signal(syscall.SIGSTOP)
	for _, k := range childrenOf(cmd.Process.Pid) {
		if k != not {
			_ = endByPID(k, 0)
		}
	}
	_ = cmd.Process.Kill()
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	select { // it may wait for an answer of its own mount
	case <-ended:
	case <-time.After(endLimit):
	}
}

// childrenOf lists the children of every thread of pid.
func childrenOf(pid int) (out []int) {
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range tasks {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		rest := string(b)
		for {
			var k, n int
			if c, _ := fmt.Sscanf(rest, "%d%n", &k, &n); c < 1 {
				break
			}
			out = append(out, k)
			i := 0
			for i < len(rest) && rest[i] == ' ' {
				i++
			}
			for i < len(rest) && rest[i] != ' ' {
				i++
			}
			rest = rest[i:]
		}
	}
	return out
}

// command is the pager's command line; the padding behind the id leaves room for
// the keeper's.
func command(cfg Config) (*exec.Cmd, error) {
	words := cfg.Command
	if len(words) == 0 {
		exe, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("pager: own executable: %w", err)
		}
		words = []string{exe, "pager"}
	}
	cmd := exec.Command(words[0], append(append([]string(nil), words[1:]...), cfg.ID.String())...)
	// A session of its own: a signal to the daemon's group is not for it. No
	// parent death signal: it survives the daemon.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if cfg.Log != nil {
		cmd.Stderr = cfg.Log
	}
	cmd.Dir = "/"
	return cmd, nil
}

// controlPair is a connected pair of SEQPACKET sockets.
func controlPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("pager: socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[1]), "control"), nil
}

// hello has the first conversation of a connection. pid is who must answer.
func hello(ctx context.Context, c *conn, body any, pid int) (w who, err error) {
	o := opWho
	if body != nil {
		o = opHello
	}
	stop := context.AfterFunc(ctx, func() { _ = c.c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	fail := func(err error) (who, error) {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return who{}, fmt.Errorf("pager %d: %w", pid, err)
	}
	if err := c.send(packet{ID: 0, Op: o}, body); err != nil {
		return fail(err)
	}
	for {
		p, files, err := c.recv()
		closeAll(files)
		if err != nil {
			return fail(fmt.Errorf("%w before it was ready: %w", ErrGone, err))
		}
		if p.Op != opReply {
			continue // an event for all
		}
		if p.Err != "" {
			return fail(errorOf(p.Err, p.Code))
		}
		if w, err = decode[who](p); err != nil {
			return fail(err)
		}
		return w, nil
	}
}

// Connect finds the living pager of cfg.Dir, or fails with ErrNoPager.
func Connect(ctx context.Context, cfg Config) (*Client, error) {
	cfg = cfg.WithDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	w, err := readState(cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNoPager, cfg.Dir)
	}
	if err != nil {
		return nil, err
	}
	if w.ID != cfg.ID {
		return nil, fmt.Errorf("pager: %s belongs to migration %s, not %s", cfg.Dir, w.ID, cfg.ID)
	}
	// The keeper of a dead pager holds its socket open: look first.
	pidfd, err := openProcess(w.PID, w.Start)
	if err == nil && over(pidfd, w.PID) {
		unix.Close(pidfd)
		err = ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("%w: pager %d: %w", ErrNoPager, w.PID, err)
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unixpacket", filepath.Join(cfg.Dir, socketName))
	if err != nil {
		unix.Close(pidfd)
		return nil, fmt.Errorf("%w: %w", ErrNoPager, err)
	}
	c := newConn(nc.(*net.UnixConn))
	if w, err = greet(ctx, c, w.PID, pidfd); err != nil {
		c.c.Close()
		unix.Close(pidfd)
		return nil, err
	}
	return newClient(cfg, c, w, pidfd, nil), nil
}

// greet is hello with a pager that may die meanwhile: its keeper has the socket
// open, so that nothing else would end the wait.
func greet(ctx context.Context, c *conn, pid, pidfd int) (who, error) {
	ctx, stop := whileAlive(ctx, pid)
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	w, err := hello(ctx, c, nil, pid)
	cancel()
	stop()
	if err != nil && over(pidfd, pid) {
		err = fmt.Errorf("%w: %w: pager %d died: %w", ErrNoPager, ErrGone, pid, err)
	}
	return w, err
}
