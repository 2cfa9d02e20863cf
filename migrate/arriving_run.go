package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// prepare goes from empty to prepared and answers ACCEPT. On error nothing is
// left. Caller has the turn.
func (a *arriving) prepare(ctx context.Context, c *control, o Offer) error {
	ctx, stop := follow(ctx, c.ctx)
	defer stop()
	if c.hello.PageSize != a.d.cfg.Hello.PageSize {
		return &Refusal{Reasons: []string{fmt.Sprintf("pages have %d bytes there and %d here", c.hello.PageSize, a.d.cfg.Hello.PageSize)}}
	}
	// Journalled first, so that whatever Prepare leaves behind is found.
	if err := a.record(DestPrepared, ""); err != nil {
		return err
	}
	err := a.engine("prepare", func() error {
		v, err := a.d.cfg.Host.Prepare(ctx, a.id, o)
		if err == nil {
			a.setArrival(v)
		}
		return err
	})
	if err == nil {
		err = a.d.send(c, acceptMsg{Epoch: 1, Key: a.arrival.LaneKey()})
	}
	if err == nil {
		return nil
	}
	return errors.Join(err, a.abort(ctx, err.Error(), false))
}

// rebuild goes from prepared to ready. The source's silence or ABORT ends it.
// Caller has the turn.
func (a *arriving) rebuild(ctx context.Context, c *control) error {
	ctx, stop := follow(ctx, c.ctx)
	defer stop()
	r, err := a.rounds(ctx, c)
	if err != nil {
		return err
	}
	switch m := r.msg.(type) {
	case *stateMsg:
	case *abortMsg:
		return fmt.Errorf("aborted by the source: %s", m.Reason)
	default:
		return unexpected(r.msg, "state")
	}
	mem, err := decodeMemory(r.blobs[1])
	if err != nil {
		return err
	}
	rest := make(chan []Memory, 1)
	st := State{Image: r.blobs[0], Memory: mem, Rest: func(ctx context.Context) ([]Memory, error) {
		select {
		case m := <-rest:
			return m, nil
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}}
	begun := time.Now()
	if err := a.whileListening(ctx, c, rest, func(ctx context.Context) error {
		return a.engine("rebuild", func() error { return a.arrival.Rebuild(ctx, st, a.rec.Mode.Whole()) })
	}); err != nil {
		return err
	}
	took := time.Since(begun)
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if err := a.record(DestReady, ""); err != nil {
		return err
	}
	return a.d.send(c, readyMsg{RebuildMicros: uint64(took.Microseconds())})
}

// said is what a connection was told of the states that change by themselves.
type said struct{ running, resident bool }

// converse is speak, and says what a process lacks that runs while nobody speaks.
func (a *arriving) converse(ctx context.Context, c *control) error {
	if a.State() == DestRunning {
		a.tell("")
	}
	err := a.speak(ctx, c)
	a.mu.Lock()
	lone := a.state == DestRunning && a.conn == c
	a.mu.Unlock()
	if lone && err != nil && ctx.Err() == nil {
		a.tell(clip(fmt.Sprintf("the source, %s, is away, and with it what has not arrived yet: %v", c.peer.Name, err), MaxReason))
	}
	return err
}

// speak speaks with the source of an arrival that is ready or more, until the
// connection or the migration ends.
func (a *arriving) speak(ctx context.Context, c *control) error {
	tick := time.NewTicker(a.d.t.Progress)
	defer tick.Stop()
	var told said
	var last ArrivalStats
	for {
		st, changed := a.look()
		over, err := a.announce(c, st, &told)
		if over || err != nil {
			return err
		}
		select {
		case r := <-c.in:
			a.d.kill("recv/" + r.msg.kind().String())
			over, err := a.handle(ctx, c, r.msg, &told)
			if over || err != nil {
				return err
			}
		case <-changed:
		case <-tick.C:
			if st != DestRunning {
				break // nothing may stand in the way of a COMMIT
			}
			if now := a.refresh(); now != last {
				last = now
				a.tell("")
				if err := c.send(progressMsg{Stats: now.onAir()}); err != nil {
					return err
				}
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-c.ctx.Done():
			if len(c.in) == 0 {
				return c.err()
			}
		}
	}
}

// announce tells what happened here without the source's doing. over: there is
// no more to say.
func (a *arriving) announce(c *control, st DestState, told *said) (over bool, err error) {
	if (st == DestRunning || st == DestResident) && !told.running {
		told.running = true
		if err := a.d.send(c, runningMsg{PID: a.snapshot().PID}); err != nil {
			return true, err
		}
	}
	switch st {
	case DestResident:
		if !told.resident {
			told.resident = true
			p := a.snapshot()
			return false, a.d.send(c, residentMsg{PID: p.PID, Stats: p.ArrivalStats.onAir()})
		}
	case DestAborted:
		if a.theArrival() != nil {
			return false, nil // not ended yet, and the source would let its copy run
		}
		return true, a.d.send(c, abortedMsg{Reason: a.snapshot().Reason})
	case DestLost:
		return true, a.d.send(c, lostMsg{Reason: a.snapshot().Reason})
	}
	return false, nil
}

// handle does what a message asks for.
func (a *arriving) handle(ctx context.Context, c *control, m message, told *said) (over bool, err error) {
	ctx, stop := follow(ctx, c.ctx)
	defer stop()
	if err := a.take(ctx); err != nil {
		return true, err
	}
	defer a.give()
	switch m := m.(type) {
	case *commitMsg:
		switch a.State() {
		case DestReady, DestCommitted:
			err := a.commit(ctx, c, told)
			return err != nil, a.retryLater(c, err)
		}
		return false, nil // said already, or about to be
	case *abortMsg:
		return a.abortedBySource(ctx, c, m.Reason)
	case *doneMsg:
		if st := a.State(); st != DestResident {
			return true, fmt.Errorf("%w: done while %v", ErrProtocol, st)
		}
		if err := a.settle(ctx); err != nil {
			return true, err
		}
		return true, a.d.send(c, settledMsg{})
	}
	return true, unexpected(m, "commit, abort or done")
}

// retryLater tells the source that its word was not obeyed yet.
func (a *arriving) retryLater(c *control, err error) error {
	if err == nil {
		return nil
	}
	a.log.Error("the source's word could not be obeyed yet", "err", err)
	return errors.Join(err, a.d.send(c, retryMsg{Reason: clip(err.Error(), MaxReason)}))
}

func (a *arriving) abortedBySource(ctx context.Context, c *control, reason string) (bool, error) {
	switch st := a.State(); st {
	case DestReady, DestAborted:
		if err := a.abort(ctx, "aborted by the source: "+reason, false); err != nil {
			return true, a.retryLater(c, err)
		}
		return true, a.d.send(c, abortedMsg{Reason: clip(reason, MaxReason)})
	default:
		return true, fmt.Errorf("%w: abort while %v", ErrProtocol, st)
	}
}

// commit goes from ready, or committed, to running. c is told, where there is
// one. Caller has the turn.
func (a *arriving) commit(ctx context.Context, c *control, told *said) error {
	begun := time.Now()
	if a.State() == DestReady {
		if err := a.record(DestCommitted, ""); err != nil {
			// It may be on the disk or not. Nothing was released: what helps is
			// another try, or a later record that says the opposite.
			if again := a.record(DestCommitted, ""); again != nil {
				if aerr := a.abort(ctx, "COMMIT could not be journalled: "+err.Error(), true); aerr != nil {
					return errors.Join(err, aerr)
				}
				return nil // the state says it
			}
		}
	}
	journalled := time.Now()
	if err := a.release(ctx); err != nil {
		return err
	}
	if a.State() == DestLost {
		return nil
	}
	released := time.Now()
	if c != nil {
		told.running = true
		err := a.d.send(c, runningMsg{
			PID:           a.pid,
			CommitMicros:  uint64(journalled.Sub(begun).Microseconds()),
			ReleaseMicros: uint64(released.Sub(journalled).Microseconds()),
		})
		if err != nil {
			a.log.Warn("running, and the source does not know", "err", err)
		}
	}
	if err := a.record(DestRunning, ""); err != nil {
		a.log.Warn("running not journalled", "err", err) // COMMIT says enough
		if err := a.enter(DestRunning, ""); err != nil {
			return err
		}
	}
	a.await()
	return nil
}

// release lets the process run, or finds that it is lost. Caller has the turn,
// and COMMIT is durable.
func (a *arriving) release(ctx context.Context) error {
	err := a.undo(ctx, "release", func(ctx context.Context) (err error) {
		a.pid, err = a.arrival.Release(ctx)
		return err
	})
	if errors.Is(err, ErrGone) {
		return a.insist(ctx, DestLost, "it ended before it was released: "+err.Error())
	}
	if err != nil {
		return fmt.Errorf("committed, but not released yet: %w", err)
	}
	a.mu.Lock()
	a.progress.PID = a.pid
	a.mu.Unlock()
	return nil
}

// await begins to wait for the last page. Caller has the turn.
func (a *arriving) await() {
	if a.waiter != nil || !a.d.begin() {
		return
	}
	ctx, cancel := context.WithCancel(a.d.ctx)
	done := make(chan struct{})
	a.awaited, a.waiter = cancel, done
	go func() {
		defer a.d.wg.Done()
		defer close(done)
		defer cancel()
		a.waitResident(ctx)
	}()
}

// stopWaiting ends that. Caller has the turn.
func (a *arriving) stopWaiting() {
	if a.waiter != nil {
		a.awaited()
		<-a.waiter
		a.awaited, a.waiter = nil, nil
	}
}

func (a *arriving) waitResident(ctx context.Context) {
	b := backoff{t: a.d.t}
	v := a.theArrival()
	for {
		err := a.engine("fetch", func() error { return v.Fetch(ctx) })
		if err == nil {
			err = a.engine("resident", func() error { return v.Resident(ctx) })
		}
		if ctx.Err() != nil {
			return
		}
		if err == nil || errors.Is(err, ErrGone) {
			a.waited(ctx, err)
			return
		}
		a.log.Error("not resident yet", "err", err)
		a.tell(err.Error())
		if !b.wait(ctx) {
			return
		}
	}
}

// waited is the end of waitResident: every page is here, or the process was
// lost.
func (a *arriving) waited(ctx context.Context, err error) {
	a.refresh()
	if a.take(ctx) != nil {
		return
	}
	defer a.give()
	if err != nil {
		_ = a.insist(ctx, DestLost, err.Error())
		return
	}
	if a.insist(ctx, DestResident, "") != nil {
		return
	}
	if a.rec.PeerGone {
		if err := a.settle(ctx); err != nil {
			a.log.Warn("not settled; the next start does", "err", err)
		}
	}
}

// settle ends a migration that both sides, or a person, know the end of. Caller
// has the turn.
func (a *arriving) settle(ctx context.Context) error {
	if v := a.theArrival(); v != nil {
		if err := a.undo(ctx, "finish", v.Finish); err != nil && !errors.Is(err, ErrGone) {
			return fmt.Errorf("migration %v: %w", a.id, err)
		}
		if err := v.Close(); err != nil {
			a.log.Warn("handles of a finished arrival", "err", err)
		}
		a.setArrival(nil)
	}
	// Only then is the source told: it will never ask again.
	if err := a.forget(DestDone); err != nil {
		return err
	}
	return a.enter(DestDone, "")
}
