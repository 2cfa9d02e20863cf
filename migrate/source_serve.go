package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// laneGrace is how long after the loss of a page lane RESIDENT may still come.
const laneGrace = 100 * time.Millisecond

// verdict is what the destination's word means for the copy here.
type verdict uint8

const (
	verdictNone     verdict = iota // no word; ask again
	verdictResident                // nothing is needed of it any more
	verdictAborted                 // it may run again
	verdictInDoubt
	verdictLost
)

// finish goes from committed to the end. c is nil where there is no connection
// yet.
func (s *Source) finish(ctx context.Context, c *control) (Result, error) {
	var v verdict
	var err error
	b := backoff{t: s.t}
	for {
		try, cancel := context.WithCancelCause(ctx)
		s.mu.Lock()
		s.nudge = cancel
		decided := s.pending != decideNothing
		s.mu.Unlock()
		if decided {
			cancel(nil)
			c.close()
			return s.decide(ctx)
		}
		v = verdictNone
		needed := true
		if c == nil {
			c, v, needed, err = s.reconnect(try)
		}
		if err == nil && v == verdictNone {
			var heard bool
			v, heard, err = s.attend(try, c, needed)
			if heard {
				b.reset()
			}
		}
		switch v {
		case verdictResident:
			cancel(nil)
			return s.complete(ctx, c)
		case verdictAborted:
			cancel(nil)
			return s.takeBack(ctx, c, err)
		case verdictInDoubt:
			cancel(nil)
			c.close()
			return s.doubt(err, "")
		case verdictLost:
			cancel(nil)
			c.close()
			return s.lose(ctx, err)
		}
		c.close()
		c = nil
		if s.decided() {
			cancel(nil)
			return s.decide(ctx)
		}
		if ctx.Err() != nil {
			cancel(nil)
			_ = s.cfg.Lanes.Close()
			return s.result(OutcomeInterrupted, fmt.Errorf("%w: %w", ErrInterrupted, context.Cause(ctx)))
		}
		if s.copyGone(ctx) {
			err = fmt.Errorf("the frozen copy here has ended, and the destination has to say whether it needs it: %w", err)
		}
		s.log.Warn("the destination is out of reach; trying again", "err", err)
		s.tell(err.Error())
		b.wait(try)
		cancel(nil)
		err = nil
	}
}

// reconnect asks the destination where it stands and opens lanes anew. needed:
// it has yet to be told to commit.
func (s *Source) reconnect(ctx context.Context) (c *control, v verdict, needed bool, err error) {
	c, ack, err := s.ask(ctx, intentCommit)
	if err != nil {
		return nil, verdictNone, false, err
	}
	if v, err = s.judge(c, ack); v != verdictNone {
		return c, v, false, err
	}
	if ack.Epoch != 0 {
		err = s.engine("reopen", func() error { return s.cfg.Lanes.Open(ctx, ack.Epoch, ack.Key, s.cfg.Process) })
	}
	return c, verdictNone, ack.State != DestRunning, err
}

// ask opens a connection with RESUME and returns the answer. On success the
// caller owns the connection.
func (s *Source) ask(ctx context.Context, what intent) (*control, *resumeAckMsg, error) {
	c, err := s.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	ack, err := s.askOn(ctx, c, what)
	if err != nil {
		c.close()
		return nil, nil, err
	}
	return c, ack, nil
}

func (s *Source) askOn(ctx context.Context, c *control, what intent) (*resumeAckMsg, error) {
	err := s.send(c, resumeMsg{
		Migration: wireID(s.cfg.ID), Intent: what, Resolved: s.rec.Resolved, Reason: s.rec.Reason,
	})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeoutCause(ctx, s.t.Prepare, fmt.Errorf("%w: no answer to resume in %v", ErrStalled, s.t.Prepare))
	defer stop()
	r, err := s.recv(ctx, c)
	if err != nil {
		return nil, err
	}
	switch m := r.msg.(type) {
	case *resumeAckMsg:
		return m, nil
	case *retryMsg:
		return nil, fmt.Errorf("%s cannot say yet: %s", c.hello.Host, m.Reason)
	case *refuseMsg:
		return nil, &Refusal{Reasons: m.Reasons}
	}
	return nil, unexpected(r.msg, "resume-ack")
}

// gaveUp reports whether the destination will never run its copy: it says so,
// or does not know the migration under the incarnation that knew it.
func (s *Source) gaveUp(c *control, ack *resumeAckMsg) bool {
	if ack.Known {
		return ack.State == DestAborted
	}
	return c.hello.Incarnation == s.rec.PeerIncarnation
}

// judge says what a resume-ack means for a source that has committed.
func (s *Source) judge(c *control, ack *resumeAckMsg) (verdict, error) {
	switch {
	case s.gaveUp(c, ack):
		why := ack.Reason
		if why == "" {
			why = "it knows nothing of the migration any more"
		}
		return verdictAborted, fmt.Errorf("%w: %s", errGivenUp, why)
	case !ack.Known:
		return verdictInDoubt, fmt.Errorf("%w: the journal of %s is another one than the migration began with (%v, it was %v)",
			ErrInDoubt, c.hello.Host, c.hello.Incarnation, s.rec.PeerIncarnation)
	}
	s.note(ack.Stats.arrival())
	switch ack.State {
	case DestResident, DestDone:
		s.running(ack.PID, time.Now())
		s.times.resident = time.Now()
		return verdictResident, nil
	case DestLost:
		return verdictLost, fmt.Errorf("%w: %s", ErrLost, ack.Reason)
	case DestRunning:
		return verdictNone, s.serving(ack.PID, time.Now())
	case DestReady, DestCommitted:
		if s.State() == SourceInDoubt {
			return verdictNone, s.enter(SourceCommitted)
		}
	default:
		return verdictNone, fmt.Errorf("%w: destination is %v of a committed migration", ErrProtocol, ack.State)
	}
	return verdictNone, nil
}

func (s *Source) running(pid int, at time.Time) {
	if s.times.running.IsZero() {
		s.times.running = at
	}
	if pid != 0 {
		s.rec.DestPID = pid
	}
}

// serving notes that it runs there.
func (s *Source) serving(pid int, at time.Time) error {
	s.running(pid, at)
	if s.State() == SourceServing {
		return nil
	}
	err := s.record(SourceServing, "")
	if err == nil || errors.Is(err, ErrIllegal) {
		return err
	}
	s.log.Warn("serving not journalled", "err", err) // COMMIT says enough
	return s.enter(SourceServing)
}

// attend speaks with a destination that has, or is about to have, the process.
// heard: it said something.
func (s *Source) attend(ctx context.Context, c *control, needed bool) (v verdict, heard bool, err error) {
	ctx, stop := watchLanes(ctx, s.cfg.Lanes.Lost(), laneGrace)
	defer stop()
	if needed {
		if err := s.send(c, commitMsg{}); err != nil {
			return verdictNone, false, err
		}
	}
	if !s.switched { // an earlier daemon may have died between the two
		s.switched = true
		if err := s.hook(ctx, "at-switch", s.cfg.AtSwitch); err != nil {
			s.log.Warn("the hook at the switch failed", "err", err)
		}
	}
	for {
		r, err := s.recv(ctx, c)
		if err != nil {
			return verdictNone, heard, err
		}
		heard = true
		switch m := r.msg.(type) {
		case *runningMsg:
			s.res.AcceptMS, s.res.ReleaseMS = micros(m.CommitMicros), micros(m.ReleaseMicros)
			if err := s.serving(m.PID, r.at); err != nil {
				return verdictNone, true, err
			}
		case *residentMsg:
			s.running(m.PID, r.at)
			s.times.resident = r.at
			s.note(m.Stats.arrival())
			return verdictResident, true, nil
		case *abortedMsg:
			return verdictAborted, true, fmt.Errorf("%w: %s", errGivenUp, m.Reason)
		case *lostMsg:
			return verdictLost, true, fmt.Errorf("%w: %s", ErrLost, m.Reason)
		case *progressMsg, *readyMsg: // READY once more, from before a resume
		case *retryMsg:
			return verdictNone, true, errors.New(m.Reason)
		default:
			return verdictNone, true, unexpected(r.msg, "running or resident")
		}
	}
}

// complete kills the copy. Takes ownership of c, which may be nil.
func (s *Source) complete(ctx context.Context, c *control) (Result, error) {
	defer func() { c.close() }()
	// Durable first: once DONE is heard the destination knows nothing of the
	// migration, which would otherwise mean that it was aborted.
	if err := s.insist(ctx, SourceResident, ""); err != nil {
		_ = s.cfg.Lanes.Close()
		return s.result(OutcomeInterrupted, fmt.Errorf("%w: %w", ErrInterrupted, err))
	}
	_ = s.cfg.Lanes.Close()
	if err := s.hook(context.WithoutCancel(ctx), "source-exit", s.cfg.OnSourceExit); err != nil {
		s.log.Warn("the hook before the copy's end failed", "err", err)
	}
	if err := s.undo(ctx, "kill", s.cfg.Process.Kill); err != nil && !errors.Is(err, ErrGone) {
		s.log.Error("the frozen copy could not be killed; tried again later", "err", err)
		res, _ := s.result(OutcomeDone, nil)
		res.Reason = "the frozen copy at the source could not be killed yet: " + err.Error()
		return res, nil
	}
	if err := s.enter(SourceDone); err != nil {
		return s.result(OutcomeDone, nil)
	}
	if c != nil && c.err() == nil {
		settle, stop := context.WithTimeout(context.WithoutCancel(ctx), s.t.Settle)
		if s.sayDone(settle, c) {
			s.forget()
		}
		stop()
	}
	return s.result(OutcomeDone, nil)
}

// sayDone reports whether the destination has forgotten the migration.
func (s *Source) sayDone(ctx context.Context, c *control) bool {
	if err := s.send(c, doneMsg{}); err != nil {
		return false
	}
	for {
		r, err := s.recv(ctx, c)
		if err != nil {
			return false
		}
		if _, ok := r.msg.(*settledMsg); ok {
			return true
		}
	}
}

// takeBack lets the process run here again after the destination has given its
// copy up, durably and without having released it (or a person said so).
func (s *Source) takeBack(ctx context.Context, c *control, cause error) (Result, error) {
	defer c.close()
	_ = s.cfg.Lanes.Close()
	if err := s.record(SourceAborted, cause.Error()); err != nil {
		// The next start would ask again, and hear the same.
		s.log.Warn("abort not journalled", "err", err)
		if err := s.enter(SourceAborted); err != nil {
			return s.doubt(cause, "")
		}
	}
	if err := s.undo(ctx, "thaw", s.cfg.Process.Thaw); err != nil {
		if errors.Is(err, ErrGone) {
			s.forget()
			return s.result(OutcomeLost, fmt.Errorf("%w: %w; and here: %w", ErrLost, cause, err))
		}
		return s.result(OutcomeInDoubt, fmt.Errorf("%w: %w; and the process here is still frozen: %w", ErrInDoubt, cause, err))
	}
	s.forget()
	return s.result(OutcomeAborted, cause)
}

// doubt ends with the copy held and everything kept.
func (s *Source) doubt(cause error, more string) (Result, error) {
	_ = s.cfg.Lanes.Close()
	if more != "" {
		cause = fmt.Errorf("%w: %s: %w", ErrInDoubt, more, cause)
	} else if !errors.Is(cause, ErrInDoubt) {
		cause = fmt.Errorf("%w: %w", ErrInDoubt, cause)
	}
	if err := s.record(SourceInDoubt, cause.Error()); err != nil {
		s.log.Warn("in doubt, and not journalled", "err", err)
		_ = s.enter(SourceInDoubt)
	}
	return s.result(OutcomeInDoubt, cause)
}
