package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

var (
	// ErrResolved is the error of an outcome that a person decided.
	ErrResolved = errors.New("migrate: resolved by hand")
	errRestart  = errors.New("migrate: the source's daemon ended before the commit")
)

// Recover goes on with a migration that an earlier daemon left in the journal:
// what was not committed is undone, what was is brought to its end as Run would
// have. Config.Process is the process that was found again; where it is gone
// its methods return ErrGone. It may be called once, instead of Run.
func (s *Source) Recover(ctx context.Context) (Result, error) {
	if err := s.take(ctx); err != nil {
		return s.result(OutcomeInterrupted, err)
	}
	defer s.give()
	if err := s.load(); err != nil {
		return Result{}, err
	}
	switch st := s.State(); st {
	case SourceCommitted, SourceServing:
		return s.recoverCommitted(ctx)
	case SourceResident:
		return s.complete(ctx, nil)
	case SourceInDoubt, SourceLost:
		return s.reconsider(ctx)
	case SourceAborted:
		cause := errRestart
		if s.rec.Reason != "" {
			cause = errors.New(s.rec.Reason)
		}
		return s.abort(ctx, nil, cause)
	default:
		return s.recoverUncommitted(ctx)
	}
}

// load takes over what the journal says.
func (s *Source) load() error {
	if s.State() != SourceRunning || s.journal != nil {
		return fmt.Errorf("migrate: Recover called on a source that is %v", s.State())
	}
	j, err := s.cfg.Journals.Open(s.cfg.ID, RoleSource)
	if err != nil {
		return err
	}
	rec, err := j.Last()
	var st SourceState
	if err == nil {
		st, err = ParseSourceState(rec.State)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("journal of migration %v: %w", s.cfg.ID, err), j.Close())
	}
	s.journal, s.rec = j, rec
	s.offered, s.touched = true, true
	s.begin(rec.Started)
	s.mu.Lock()
	s.state = st
	s.progress.State, s.progress.Comm = st.String(), rec.Comm
	s.progress.PID, s.progress.Peer = rec.SourcePID, rec.PeerAddress
	s.mu.Unlock()
	return nil
}

// recoverUncommitted undoes. A process that is still held may meanwhile have
// been made the destination's by a person, who could not reach this daemon: the
// destination is asked first, but not for long.
func (s *Source) recoverUncommitted(ctx context.Context) (Result, error) {
	held, err := s.cfg.Process.Held(ctx)
	if err != nil || !held {
		return s.abort(ctx, nil, errRestart)
	}
	if err := s.enter(SourceHeld); err != nil {
		return Result{}, err
	}
	brief, stop := context.WithTimeout(ctx, s.t.Inquiry)
	c, ack, err := s.ask(brief, intentAsk)
	stop()
	if err != nil {
		return s.abort(ctx, nil, errRestart)
	}
	c.close()
	if ack.Known && ack.State != DestAborted {
		s.log.Warn("it goes on at the destination", "state", ack.State, "resolved", ack.Resolved)
		s.rec.Resolved = ack.Resolved
		if err := s.insist(ctx, SourceCommitted, "committed at the destination"); err != nil {
			return s.result(OutcomeInterrupted, fmt.Errorf("%w: %w", ErrInterrupted, err))
		}
		return s.finish(ctx, nil)
	}
	return s.abort(ctx, nil, fmt.Errorf("%w (%w)", errRestart, errGivenUp))
}

// recoverCommitted goes on. A copy that runs although COMMIT is in the journal
// was let run by someone: it must not be a source of pages, nor a second owner.
func (s *Source) recoverCommitted(ctx context.Context) (Result, error) {
	held, err := s.cfg.Process.Held(ctx)
	if held || err != nil { // gone: whatever the destination has is all there is
		return s.finish(ctx, nil)
	}
	c, ack, err := s.ask(ctx, intentAsk)
	if err == nil {
		defer c.close()
		if s.gaveUp(c, ack) {
			return s.takeBack(ctx, nil, fmt.Errorf("%w: it runs here", errGivenUp))
		}
		err = fmt.Errorf("the destination is %v", ack.State)
	}
	return s.doubt(err, "the process runs here although it was committed to the destination")
}

// reconsider asks once more what could not be told, or was lost.
func (s *Source) reconsider(ctx context.Context) (Result, error) {
	was := s.rec.Reason
	c, ack, err := s.ask(ctx, intentCommit)
	if err == nil {
		var v verdict
		v, err = s.judge(c, ack)
		switch v {
		case verdictResident:
			return s.complete(ctx, c)
		case verdictAborted:
			return s.takeBack(ctx, c, err)
		}
		c.close()
		if v == verdictNone && err == nil {
			return s.finish(ctx, nil) // it knows of it after all
		}
	}
	if s.State() == SourceLost {
		return s.lost(ctx, fmt.Errorf("%w: %s", ErrLost, was))
	}
	return s.result(OutcomeInDoubt, fmt.Errorf("%w: %s", ErrInDoubt, was))
}

// Settle goes on telling the destination what was decided, until it has
// forgotten the migration too and the journal is removed. Call it after Run or
// Recover where Result.Unsettled says so; it returns at once where nothing is
// left to do. ErrInDoubt where the destination was resolved the other way.
func (s *Source) Settle(ctx context.Context) error {
	if err := s.take(ctx); err != nil {
		return err
	}
	defer s.give()
	b := backoff{t: s.t}
	for s.unsettled() {
		err := s.settleOnce(ctx)
		if err == nil {
			s.forget()
			return nil
		}
		if errors.Is(err, ErrInDoubt) {
			return err
		}
		s.log.Info("not settled yet", "err", err)
		if !b.wait(ctx) {
			return context.Cause(ctx)
		}
	}
	return nil
}

// settleOnce returns nil when the destination knows.
func (s *Source) settleOnce(ctx context.Context) error {
	what := intentAbort
	switch s.State() {
	case SourceResident:
		if err := s.undo(ctx, "kill", s.cfg.Process.Kill); err != nil && !errors.Is(err, ErrGone) {
			return err
		}
		if err := s.enter(SourceDone); err != nil {
			return err
		}
		what = intentDone
	case SourceDone, SourceLost: // lost: where nothing is left here
		what = intentDone
	case SourceAborted:
	default: // could not be thawed
		if err := s.undo(ctx, "thaw", s.cfg.Process.Thaw); err != nil && !errors.Is(err, ErrGone) {
			return err
		}
		if err := s.record(SourceAborted, ""); err != nil {
			return err
		}
	}
	c, ack, err := s.ask(ctx, what)
	if err != nil {
		return err
	}
	defer c.close()
	if what == intentDone || !ack.Known || ack.State == DestAborted {
		return nil
	}
	return s.conflict(ctx, ack)
}

// conflict: it runs here, and a person made the destination its owner. Both may
// have run. The copy here is held, so that one is left; nothing is discarded.
func (s *Source) conflict(ctx context.Context, ack *resumeAckMsg) error {
	err := fmt.Errorf("%w: the destination is %v, resolved by hand, while it was aborted here; the copy here is frozen",
		ErrInDoubt, ack.State)
	if herr := s.undo(ctx, "hold", func(ctx context.Context) error { return s.cfg.Process.Hold(ctx) }); herr != nil {
		err = fmt.Errorf("%w (or should be: %w)", err, herr)
	}
	if _, derr := s.doubt(err, ""); derr != nil {
		return derr
	}
	return err
}

// ResolveCommit is a person's word that the process belongs to the destination:
// the copy here is killed. ResolveAbort is the word that it belongs here: it
// runs on, and the destination's copy is ended when it is reached. Both are
// journalled first. They return with the outcome, which a Run or Recover that
// is under way returns as well.
func (s *Source) ResolveCommit(ctx context.Context) (Result, error) {
	return s.resolve(ctx, decideCommit)
}

func (s *Source) ResolveAbort(ctx context.Context) (Result, error) {
	return s.resolve(ctx, decideAbort)
}

func (s *Source) resolve(ctx context.Context, d decision) (Result, error) {
	// Again and again: who has the turn may just have come to where it can be told.
	for {
		if err := s.interrupt(d); err != nil {
			return Result{}, err
		}
		brief, stop := context.WithTimeout(ctx, resolvePause)
		err := s.take(brief)
		stop()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return Result{}, context.Cause(ctx)
		}
	}
	defer s.give()
	if s.State() == SourceRunning && s.journal == nil {
		if err := s.load(); err != nil {
			return Result{}, err
		}
	}
	s.mu.Lock()
	s.pending = decideNothing
	st := s.state
	if st.resolvable() && (st != SourceCommitted || d == decideAbort) {
		s.pending = d
	}
	s.mu.Unlock()
	switch {
	case st == SourceCommitted && d == decideCommit:
		return Result{}, errEarly
	case st.resolvable():
		return s.decide(ctx)
	case st == SourceAborted:
		return s.result(OutcomeAborted, ErrResolved)
	case st == SourceDone, st == SourceResident:
		return s.result(OutcomeDone, nil)
	}
	return Result{}, fmt.Errorf("migrate: nothing to resolve: the source is %v", st)
}

const resolvePause = 100 * time.Millisecond

// interrupt tells d to whoever has the turn, where it matters to what that does.
func (s *Source) interrupt(d decision) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch st := s.state; {
	case st == SourceCommitted && d == decideCommit:
		return errEarly
	case st.resolvable():
		s.pending = d
		if s.nudge != nil {
			s.nudge(ErrResolved)
		}
	case s.cancel != nil && d == decideAbort:
		s.cancel(ErrCancelled) // nothing is committed yet
	}
	return nil
}

var errEarly = errors.New("migrate: the destination has not said that it runs the process, and the copy here is the only sure one; " +
	"resolve at the destination first, or abort here")

func (s *Source) decided() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pending != decideNothing
}

// decide carries out what a person resolved.
func (s *Source) decide(ctx context.Context) (Result, error) {
	s.mu.Lock()
	d := s.pending
	s.pending = decideNothing
	s.mu.Unlock()
	s.rec.Resolved = true
	if d == decideCommit {
		s.rec.Reason = "resolved: it belongs to the destination"
		return s.complete(ctx, nil)
	}
	cause := fmt.Errorf("%w: it belongs to the source", ErrResolved)
	if err := s.record(SourceAborted, cause.Error()); err != nil {
		s.rec.Resolved = false
		return s.doubt(err, "")
	}
	_ = s.cfg.Lanes.Close()
	brief, stop := context.WithTimeout(ctx, s.t.Settle)
	err := s.settleOnce(brief)
	stop()
	if errors.Is(err, ErrInDoubt) {
		return s.result(OutcomeInDoubt, err)
	}
	if terr := s.undo(ctx, "thaw", s.cfg.Process.Thaw); terr != nil {
		return s.result(OutcomeInDoubt, fmt.Errorf("%w: %w; and the process here: %w", ErrInDoubt, cause, terr))
	}
	if err == nil {
		s.forget()
	}
	return s.result(OutcomeAborted, cause)
}
