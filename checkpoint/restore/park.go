package restore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
)

// Park freezes the cgroup, and then lets go of every thread: they leave their
// stops straight into the freezer and execute nothing. From here on nothing of
// ours holds the process, and nothing but Release lets it run. If it fails,
// nothing is left, as after Abort.
func (s *Skeleton) Park(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != rebuilt {
		return fmt.Errorf("restore: park a skeleton that is %v: %w", s.state, ErrState)
	}
	s.cfg.KillPoint("restore/park/before")
	if err := s.park(ctx); err != nil {
		return errors.Join(fmt.Errorf("restore: park pid %d: %w", s.pid, err), s.abort(context.WithoutCancel(ctx)))
	}
	s.state = parked
	s.cfg.KillPoint("restore/park/after")
	return nil
}

func (s *Skeleton) park(ctx context.Context) error {
	if err := s.group.Freeze(ctx); err != nil {
		return err
	}
	var err error
	s.tr.Do(func() {
		for _, tid := range s.tids {
			if err = sys.PtraceDetach(tid, 0); err != nil {
				err = fmt.Errorf("detach from thread %d: %w", tid, err)
				return
			}
		}
	})
	if err != nil {
		return err
	}
	s.tr.Close()
	s.tr = nil
	if s.stopped {
		// Taken up before the first instruction after the thaw.
		if err := unix.Kill(s.pid, unix.SIGSTOP); err != nil {
			return fmt.Errorf("SIGSTOP: %w", err)
		}
	}
	if err := s.group.AwaitFrozen(ctx); err != nil {
		return err
	}
	return markParked(s.group)
}

// Release lets the process run, or, if it was stopped at the source, stand in
// its stop. It may be called again. The process is in a cgroup of its own, that
// no service's end takes down; Sweep removes that when the process has ended.
// It is proc.ErrGone where somebody has killed it before it was released.
func (s *Skeleton) Release(context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != parked && s.state != released {
		return fmt.Errorf("restore: release a skeleton that is %v: %w", s.state, ErrState)
	}
	if s.state == parked {
		pids, err := s.group.Procs()
		if err == nil && !slices.Contains(pids, s.pid) {
			err = proc.ErrGone
		}
		if err != nil {
			return fmt.Errorf("restore: release pid %d: %w", s.pid, err)
		}
	}
	s.cfg.KillPoint("restore/release/before")
	if err := s.group.Thaw(); err != nil {
		return fmt.Errorf("restore: release pid %d: %w", s.pid, err)
	}
	s.state = released
	s.cfg.KillPoint("restore/release/after")
	return nil
}

// Abort ends the process and all that was made for it. It is refused after
// Release, and may be called again.
func (s *Skeleton) Abort(ctx context.Context) error {
	// Without the lock: whoever holds it may wait for a process that waits for
	// a page. A released one must not be touched, hence the look at it.
	if !s.mu.TryLock() {
		if err := killAll(s.group); err != nil {
			return fmt.Errorf("restore: abort: %w", err)
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	if s.state == released {
		return fmt.Errorf("restore: abort a process that was released: %w", ErrState)
	}
	return s.abort(ctx)
}

// End is Abort for a process that may have been released: it was decided that
// another copy of it is the one that lives.
func (s *Skeleton) End(ctx context.Context) error {
	if err := killAll(s.group); err != nil {
		return fmt.Errorf("restore: end: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.abort(ctx)
}

// abort is Abort under the lock.
func (s *Skeleton) abort(ctx context.Context) error {
	if s.state == aborted {
		return nil
	}
	err := errors.Join(killAll(s.group), s.laid.close())
	s.landing.forget()
	if s.tr != nil {
		// The tracer's end lets go of the dead, so that they are reaped.
		s.tr.Close()
		s.tr = nil
	}
	for _, h := range append(s.helpers, s.seed, s.init, s.target) {
		if h != nil {
			h.forget()
			err = errors.Join(err, reap(ctx, h.pid))
		}
	}
	if s.target == nil && s.pid != 0 {
		err = errors.Join(err, reap(ctx, s.pid))
	}
	err = errors.Join(err, s.group.Remove(ctx))
	if err != nil {
		return fmt.Errorf("restore: abort: %w", err)
	}
	s.helpers, s.seed, s.init, s.target, s.tids = nil, nil, nil, nil, nil
	s.state = aborted
	return nil
}

// Reap waits until the process has ended if it is our child, so that it does not
// stay as a zombie: that is so where the caller adopts orphans (a subreaper, or
// the init of a container). Else it returns at once.
func (s *Skeleton) Reap(ctx context.Context) error {
	return reap(ctx, s.PID())
}

// reap waits for the end of pid if it is our child.
func reap(ctx context.Context, pid int) error {
	for {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WALL, nil)
		switch {
		case err == unix.EINTR:
		case err == unix.ECHILD, err == unix.ESRCH:
			return nil
		case err != nil:
			return fmt.Errorf("wait for pid %d: %w", pid, err)
		case info.Signo != 0:
			return nil
		default:
			if err := ended(ctx, pid); err != nil {
				return err
			}
		}
	}
}

// ended returns when the process has ended.
func ended(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err == unix.ESRCH {
		return nil
	} else if err != nil {
		return fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	defer unix.Close(fd)
	for {
		const limit = 100 // ms, for ctx
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, limit)
		if n > 0 {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("poll pidfd of %d: %w", pid, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
}
