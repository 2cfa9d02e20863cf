package migrate

import (
	"context"
	"errors"
	"fmt"
)

// lose ends with the copy held and everything kept, like doubt.
func (s *Source) lose(ctx context.Context, cause error) (Result, error) {
	_ = s.cfg.Lanes.Close()
	if err := s.record(SourceLost, cause.Error()); err != nil {
		s.log.Warn("lost, and not journalled", "err", err)
		_ = s.enter(SourceLost)
	}
	return s.lost(ctx, cause)
}

// lost ends with what is kept for a person to resolve. Where the copy here is
// gone as well there is nothing to resolve: the destination is told so, and both
// forget the migration.
func (s *Source) lost(ctx context.Context, cause error) (Result, error) {
	if s.copyGone(ctx) {
		s.nothing = true
		cause = fmt.Errorf("%w; the frozen copy here has ended too", cause)
		brief, stop := context.WithTimeout(context.WithoutCancel(ctx), s.t.Settle)
		err := s.settleOnce(brief)
		stop()
		if err == nil {
			s.forget()
		} else {
			s.log.Info("not settled yet", "err", err)
		}
	}
	return s.result(OutcomeLost, cause)
}

// copyGone reports whether the frozen copy has ended. While the destination runs
// the process that alone decides nothing: it may have every page by now, and
// finds out by asking for one.
func (s *Source) copyGone(ctx context.Context) bool {
	_, err := s.cfg.Process.Held(ctx)
	return errors.Is(err, ErrGone)
}

// unsettled reports whether the other side has to learn something yet.
func (s *Source) unsettled() bool {
	return s.journal != nil && (s.nothing || !s.State().resolvable())
}
