package checkpoint

import (
	"context"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"golang.org/x/sys/unix"
)

// Pause stops every thread until Resume, by ptrace: should this program end, the
// process runs on. Calls that it was in go on as if nothing had been.
func (s *Session) Pause(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.pause(ctx); err != nil {
		return &Error{"pause", s.pid, err}
	}
	return nil
}

func (s *Session) pause(ctx context.Context) error {
	if err := s.usable(); err != nil {
		return err
	}
	if s.held || len(s.threads) > 0 {
		return fmt.Errorf("%w: frozen already", ErrState)
	}
	if s.waits == nil {
		s.waits = waits{}
	}
	return s.stop(ctx)
}

// waits are calls with a timeout of which the kernel does not know, after a stop,
// how much of it is left: they begin anew. Whoever is stopped again and again
// before it is over would wait for ever.
type waits map[int]wait // by thread

type wait struct {
	mark  uint64
	since time.Time // the first stop
}

// keep lets the call of a thread that has just stopped return what it does when the
// time is over, if it is. Whether it is the call of the last stop, or another with
// the same arguments, is told by a mark in the half of the timeout's register that
// the kernel does not look at, for the timeout is an int: epoll_wait(2). The
// program's next call loads it anew.
func (w waits) keep(tid int, how *inject.Interrupted) {
	r := &how.Kernel
	if w == nil || how.Nr != unix.SYS_EPOLL_WAIT && how.Nr != unix.SYS_EPOLL_PWAIT || int32(r.R10) <= 0 {
		return
	}
	timeout, mark := uint64(uint32(r.R10)), r.R10>>32
	now := w[tid]
	if mark == 0 || mark != now.mark {
		now = wait{mark: now.mark&(1<<20-1) + 1, since: time.Now()}
		w[tid] = now
	}
	r.R10 = now.mark<<32 | timeout
	if time.Since(now.since) >= time.Duration(timeout)*time.Millisecond {
		r.R10 = timeout
		r.Rax, r.Orig_rax = 0, ^uint64(0) // no event, and nothing to restart
	}
}

// Resume lets a process run that Pause has stopped. Idempotent.
func (s *Session) Resume() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.letGo(); err != nil && !s.running() {
		return &Error{"resume", s.pid, err}
	}
	return nil
}
