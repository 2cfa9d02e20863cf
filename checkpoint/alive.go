package checkpoint

import (
	"os"

	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Alive returns proc.ErrGone once the process has ended, reaped or not. It is
// bound to the process that Open saw, not to its number.
func (s *Session) Alive() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return &Error{"look at", s.pid, ErrState}
	}
	for {
		// A pidfd becomes readable when its process ends (pidfd_open(2)).
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(s.pidfd), Events: unix.POLLIN}}, 0)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return &Error{"look at", s.pid, os.NewSyscallError("poll", err)}
		case n > 0:
			return &Error{"look at", s.pid, proc.ErrGone}
		default:
			return nil
		}
	}
}
