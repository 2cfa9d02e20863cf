package checkpoint

import (
	"context"
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
)

// Pause stops every thread until Resume, by ptrace: should this program end, the
// process runs on. A thread that takes its time is waited for as by Freeze. Calls that
// it was in go on as if nothing had been.
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
	if s.waits == nil && sys.WideNumbers() {
		s.waits = map[int]wait{}
	}
	if err := s.openMemory(); err != nil {
		return err
	}
	return s.stopPatiently(ctx, func() error { return nil })
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
