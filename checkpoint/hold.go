package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Hold freezes the child cgroup and lets go of the threads. From here nothing
// but Thaw lets the process run. On error it is as before.
func (s *Session) Hold(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.hold(ctx); err != nil {
		return &Error{"hold", s.pid, err}
	}
	return nil
}

func (s *Session) hold(ctx context.Context) error {
	if err := s.usable(); err != nil || s.held {
		return err
	}
	if !s.isolated || len(s.threads) == 0 {
		return fmt.Errorf("%w: only an isolated and frozen process can be held", ErrState)
	}
	// A thread in a ptrace stop counts as frozen.
	if err := s.child.Freeze(ctx); err != nil {
		return err
	}
	if err := s.alone(); err != nil {
		return errors.Join(err, s.child.Thaw())
	}
	s.held = true
	inject.Point("frozen")
	_ = s.letGo()
	inject.Point("detached")
	// Leaving the one stop for the other, the group is not frozen for a moment,
	// though nothing of the program runs.
	return s.child.AwaitFrozen(ctx)
}

// alone reports as an error that the child group holds not the process, or not
// the process alone: it would then run when it is let go of, or its children stand
// still for ever.
func (s *Session) alone() error {
	pids, err := s.child.Procs()
	switch {
	case err != nil:
		return err
	case !slices.Contains(pids, s.pid):
		// One that is ending is not listed any more, and yet in the group until
		// its threads are waited for.
		g, err := cgroup.Of(s.pid)
		if err == nil && g == s.child || errors.Is(err, proc.ErrGone) || errors.Is(err, os.ErrNotExist) {
			return proc.ErrGone
		}
		return fmt.Errorf("somebody has moved it out of cgroup %s", s.child.Dir())
	case len(pids) > 1:
		return &RefusedError{s.pid, []string{fmt.Sprintf("it has made children (in its cgroup are %v)", pids)}}
	}
	return nil
}

// childless reports as an error that the frozen process has children. Those that
// it made before it was isolated are not in its group.
func (s *Session) childless() error {
	for _, t := range s.threads {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", s.pid, t.tid))
		if errors.Is(err, os.ErrNotExist) {
			return nil // a kernel without CONFIG_PROC_CHILDREN
		}
		if err != nil {
			return proc.Gone(s.pid, err)
		}
		if kids := strings.Fields(string(b)); len(kids) > 0 {
			return &RefusedError{s.pid, []string{fmt.Sprintf("it has made children since it was looked at: %v", kids)}}
		}
	}
	return nil
}

// Thaw undoes Freeze, Hold and Isolate, in whatever state the process is: it
// runs on as if nothing had been. Idempotent; nothing after Kill. It is
// proc.ErrGone if the process ended by itself.
func (s *Session) Thaw(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.killed || s.closed {
		return nil
	}
	if err := s.thaw(ctx); err != nil {
		return &Error{"thaw", s.pid, err}
	}
	return nil
}

func (s *Session) thaw(ctx context.Context) error {
	if err := s.letGo(); errors.Is(err, unix.ESRCH) {
		// Somebody has killed it, and it is about to end.
		short, cancel := context.WithTimeout(ctx, stopLimit)
		defer cancel()
		_ = s.awaitEnd(short)
	}
	if s.isolated {
		if s.held {
			if err := s.child.Thaw(); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			s.held = false
			inject.Point("thawed")
		}
		if err := s.rejoin(ctx); err != nil {
			return err
		}
	}
	s.find, s.program, s.waits = nil, nil, nil
	s.closeMemory()
	if !s.running() {
		return proc.ErrGone
	}
	return nil
}

// running reports whether the process has not ended: not even a zombie is left
// to run. A pidfd becomes readable at the end (pidfd_open(2)).
func (s *Session) running() bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}, 0)
	return n == 0 || err != nil
}

// Kill ends the process, in whatever state it is, and removes its cgroup. It
// returns when the process has ended. Idempotent.
func (s *Session) Kill(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return &Error{"kill", s.pid, ErrState}
	}
	if err := s.kill(ctx); err != nil {
		return &Error{"kill", s.pid, err}
	}
	return nil
}

func (s *Session) kill(ctx context.Context) error {
	if err := unix.PidfdSendSignal(s.pidfd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	s.killed = true
	// Its tracer would have to take note of every thread's end.
	s.threads = nil
	if s.tr != nil {
		s.tr.Close()
		s.tr = nil
	}
	s.closeMemory()
	if err := s.awaitEnd(ctx); err != nil {
		return err
	}
	if !s.isolated {
		return nil
	}
	if err := s.child.Remove(ctx); err != nil {
		return err
	}
	s.unclaim()
	s.isolated, s.held = false, false
	return nil
}

// awaitEnd waits until the process is a zombie or less.
func (s *Session) awaitEnd(ctx context.Context) error {
	for {
		const milliseconds = 20
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}, milliseconds)
		if n > 0 {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("waiting for its end: %w", err)
		}
	}
}
