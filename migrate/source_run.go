package migrate

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// Run moves the process and returns when it is done or undone. It may be called
// once. The error is nil for OutcomeDone only; the Result says more in any
// case.
//
// Before the commit the end of ctx aborts. After it, Run goes on for ever
// against broken links, and the end of ctx means only that this daemon stops:
// OutcomeInterrupted.
func (s *Source) Run(ctx context.Context) (Result, error) {
	if err := s.take(ctx); err != nil {
		return s.result(OutcomeRefused, err)
	}
	defer s.give()
	if st := s.State(); st != SourceRunning {
		return Result{}, fmt.Errorf("migrate: Run called on a source that is %v", st)
	}
	s.begin(time.Now())
	if err := s.record(SourcePreparing, ""); err != nil {
		return s.result(OutcomeRefused, &Refusal{Reasons: []string{err.Error()}})
	}
	pre, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.mu.Lock()
	s.cancel = cancel
	s.mu.Unlock()
	c, err := s.handover(pre)
	s.mu.Lock()
	s.cancel = nil
	s.mu.Unlock()
	if err != nil {
		return s.abort(ctx, c, err)
	}
	return s.finish(ctx, c)
}

func (s *Source) begin(start time.Time) {
	s.times.start = start
	s.rec.Started = start
	s.mu.Lock()
	s.progress.Started = start
	s.mu.Unlock()
}

// handover goes from preparing to committed. The connection is returned with
// an error, too, so that the destination can be told.
func (s *Source) handover(ctx context.Context) (*control, error) {
	c, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	// The work below ends as soon as the destination is gone: the process
	// stands still meanwhile.
	ctx, stop := follow(ctx, c.ctx)
	defer stop()
	acc, err := s.offer(ctx, c)
	if err != nil {
		return c, err
	}
	if err := s.engine("open", func() error { return s.cfg.Lanes.Open(ctx, acc.Epoch, acc.Key, s.cfg.Process) }); err != nil {
		return c, err
	}
	// With the grace the destination's own word for why it gave up comes first.
	ctx, stopLanes := watchLanes(ctx, s.cfg.Lanes.Lost(), laneGrace)
	defer stopLanes()

	s.touched = true
	if err := s.engine("isolate", func() error { return s.cfg.Process.Isolate(ctx) }); err != nil {
		return c, err
	}
	if err := s.enter(SourceIsolated); err != nil {
		return c, err
	}
	var before *rounds
	if s.rec.Mode.Rounds() {
		if before, err = s.precopy(ctx, c); err != nil {
			return c, err
		}
		if err := s.engine("isolate", func() error { return s.cfg.Process.Isolate(ctx) }); err != nil {
			return c, err
		}
	}
	s.cfg.Lanes.Round(0, false, new(page.Set), new(page.Set))
	s.times.freeze = time.Now()
	var st State
	err = s.engine("freeze", func() (err error) { st, err = s.cfg.Process.Freeze(ctx); return err })
	if err != nil {
		return c, err
	}
	s.times.frozen = time.Now()
	if !st.Stopped.IsZero() {
		s.times.freeze = st.Stopped
	}
	if err := s.enter(SourceFrozen); err != nil {
		return c, err
	}
	if err := s.sendState(ctx, c, st, before); err != nil {
		return c, err
	}
	if err := s.awaitReady(ctx, c); err != nil {
		return c, err
	}
	if err := s.engine("hold", func() error { return s.cfg.Process.Hold(ctx) }); err != nil {
		return c, err
	}
	if err := s.enter(SourceHeld); err != nil {
		return c, err
	}
	s.times.held = time.Now()
	if err := s.hook(ctx, "before-commit", s.cfg.BeforeCommit); err != nil {
		return c, err
	}
	return c, s.commit(ctx)
}

// commit is the point from which the process never runs here again. Whoever
// cancels gets in before it or is told that it is too late.
func (s *Source) commit(ctx context.Context) error {
	s.mu.Lock()
	err := context.Cause(ctx)
	if err == nil {
		s.cancel = nil
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	s.commitTried = true
	if err := s.record(SourceCommitted, ""); err != nil {
		return err
	}
	s.times.committed = time.Now()
	return nil
}

// connect dials and greets.
func (s *Source) connect(ctx context.Context) (*control, error) {
	ctx, stop := context.WithTimeoutCause(ctx, s.t.Hello, fmt.Errorf("%w: no connection in %v", ErrStalled, s.t.Hello))
	defer stop()
	s.kill("dial/before")
	lane, peer, err := s.cfg.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", s.cfg.Address, err)
	}
	c := newControl(lane, peer, s.t.Peer, s.log)
	s.kill("dial/after")
	err = c.greet(ctx, s.cfg.Hello, s.t.Hello)
	if err == nil {
		s.kill("recv/hello")
		err = s.recognize(c)
	}
	if err != nil {
		c.close()
		return nil, fmt.Errorf("connect to %s: %w", s.cfg.Address, err)
	}
	return c, nil
}

// recognize notes who the destination is, or checks that it is still the same.
func (s *Source) recognize(c *control) error {
	if c.hello.PageSize != s.cfg.Hello.PageSize {
		return &Refusal{Reasons: []string{fmt.Sprintf("pages have %d bytes there and %d here", c.hello.PageSize, s.cfg.Hello.PageSize)}}
	}
	name := clip(c.peer.Name, MaxName)
	if s.rec.PeerIncarnation.IsZero() {
		s.rec.PeerIncarnation, s.rec.PeerName = c.hello.Incarnation, name
		s.mu.Lock()
		s.progress.Peer = c.hello.Host
		s.mu.Unlock()
		return nil
	}
	if s.rec.PeerName != name {
		return fmt.Errorf("%w: %q answers where %q did", transport.ErrAuth, name, s.rec.PeerName)
	}
	return nil
}

// offer asks whether the destination takes the process.
func (s *Source) offer(ctx context.Context, c *control) (*acceptMsg, error) {
	s.offered = true
	o := s.cfg.Offer
	if s.cfg.Clocks != nil {
		var err error
		if o.Monotonic, o.Boottime, err = s.cfg.Clocks(); err != nil {
			return nil, err
		}
	}
	if err := s.send(c, offerMsg{Migration: wireID(s.cfg.ID), Offer: o}); err != nil {
		return nil, err
	}
	ctx, stop := context.WithTimeoutCause(ctx, s.t.Prepare, fmt.Errorf("%w: no answer to the offer in %v", ErrStalled, s.t.Prepare))
	defer stop()
	r, err := s.recv(ctx, c)
	if err != nil {
		return nil, err
	}
	switch m := r.msg.(type) {
	case *acceptMsg:
		return m, nil
	case *refuseMsg:
		s.offered = false // it keeps nothing of what it refuses
		return nil, &Refusal{Reasons: m.Reasons}
	}
	return nil, unexpected(r.msg, "accept or refuse")
}

// abort brings the process back: first it runs, then everyone is told. It takes
// ownership of c, which may be nil.
func (s *Source) abort(ctx context.Context, c *control, cause error) (Result, error) {
	defer c.close()
	acked := errors.Is(cause, errGivenUp)
	if s.commitTried {
		// COMMIT may be on the disk, and would be believed by the next daemon.
		var err error
		if acked, err = s.uncommit(ctx, c, cause); err != nil {
			return s.doubt(cause, "neither COMMIT nor ABORTED could be journalled ("+err.Error()+
				"), and the destination cannot be reached: the process stays frozen")
		}
	}
	if s.touched {
		if err := s.undo(ctx, "thaw", s.cfg.Process.Thaw); err != nil && !errors.Is(err, ErrGone) {
			_ = s.cfg.Lanes.Close()
			return s.result(OutcomeInDoubt, fmt.Errorf("%w: %w; and the process here is still frozen: %w", ErrInDoubt, cause, err))
		} else if err != nil {
			cause = fmt.Errorf("%w (%w)", cause, ErrGone)
		}
	}
	_ = s.cfg.Lanes.Close()
	if err := s.record(SourceAborted, cause.Error()); err != nil {
		s.log.Warn("abort not journalled; the next start aborts again", "err", err)
		_ = s.enter(SourceAborted)
	}
	if s.offered && !acked {
		var theirs string
		if acked, theirs = s.tellAborted(ctx, c, cause); theirs != "" {
			cause = fmt.Errorf("%w; %w: %s", cause, errGivenUp, theirs)
		}
	}
	outcome := OutcomeAborted
	var refusal *Refusal
	if errors.As(cause, &refusal) && !s.touched {
		outcome = OutcomeRefused
	}
	if !s.offered || acked {
		s.forget()
	}
	return s.result(outcome, cause)
}

// tellAborted says so on a connection that is still there, and reports whether
// the destination has given its copy up, and why where that is news: clearing
// away takes it longer than us to find that a lane is lost.
func (s *Source) tellAborted(ctx context.Context, c *control, cause error) (acked bool, theirs string) {
	if c == nil || c.err() != nil {
		return false, ""
	}
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), s.t.Settle)
	defer stop()
	ours := clip(cause.Error(), MaxReason)
	if err := s.send(c, abortMsg{Reason: ours}); err != nil && len(c.in) == 0 {
		return false, ""
	}
	for {
		r, err := s.recv(ctx, c)
		if err != nil {
			return false, ""
		}
		if m, ok := r.msg.(*abortedMsg); ok {
			if strings.Contains(m.Reason, ours[:min(len(ours), MaxReason/4)]) {
				return true, "" // our own word
			}
			return true, m.Reason
		}
	}
}

// uncommit makes sure that a COMMIT which may or may not be on the disk will
// never count: by a later record, or by the destination's giving up. Returns
// whether the latter happened.
func (s *Source) uncommit(ctx context.Context, c *control, cause error) (bool, error) {
	b := backoff{t: s.t}
	for {
		err := s.record(SourceAborted, cause.Error())
		if err == nil {
			return false, nil
		}
		if acked, _ := s.tellAborted(ctx, c, cause); acked {
			return true, nil
		}
		c.close()
		c = nil
		if nc, ack, aerr := s.ask(ctx, intentAsk); aerr == nil {
			nc.close()
			if s.gaveUp(nc, ack) {
				return true, nil
			}
		}
		if !b.wait(ctx) {
			return false, err
		}
	}
}

// follow returns a context that ends with either.
func follow(ctx, other context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(other, func() { cancel(context.Cause(other)) })
	return ctx, func() { stop(); cancel(nil) }
}

// watchLanes returns a context that ends when a page lane has been lost for as
// long as grace: lanes also end because all is done, or was given up, and the word
// of that may be on its way.
func watchLanes(ctx context.Context, lost <-chan error, grace time.Duration) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		var err error
		select {
		case err = <-lost:
		case <-ctx.Done():
			return
		}
		if err == nil {
			err = transport.ErrPeer
		}
		if grace > 0 {
			t := time.NewTimer(grace)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
				return
			}
		}
		cancel(fmt.Errorf("page lane lost: %w", err))
	}()
	return ctx, func() { cancel(nil); <-done }
}
