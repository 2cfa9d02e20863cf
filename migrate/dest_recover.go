package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/transport"
)

// resume answers a RESUME; the connection goes on with converse. An error means
// that the source is to ask again.
func (a *arriving) resume(ctx context.Context, c *control, m *resumeMsg) (resumeAckMsg, error) {
	ctx, stop := follow(ctx, c.ctx)
	defer stop()
	if err := a.take(ctx); err != nil {
		return resumeAckMsg{}, err
	}
	defer a.give()
	if err := c.err(); err != nil { // a newer connection may have been answered
		return resumeAckMsg{}, err
	}
	st := a.State()
	if a.behind {
		return resumeAckMsg{}, errBehind
	}
	if st == DestEmpty {
		// Its offer was not taken up, and is not going to be: the connection that it came
		// on is an old one. Nothing was journalled, so a restart would know nothing either.
		return resumeAckMsg{}, nil
	}
	if st == DestAborted {
		// It could not be ended or forgotten so far: until it is, the source must
		// not hear of it.
		if err := a.abort(ctx, "", false); err != nil {
			return resumeAckMsg{}, err
		}
	}
	early := st == DestPrepared || st == DestReady
	switch m.Intent {
	case intentAsk:
		// It lets its process run when it hears that we gave ours up.
		if early {
			if err := a.abort(ctx, "given up: "+m.Reason, true); err != nil {
				return resumeAckMsg{}, err
			}
		}
	case intentAbort:
		if early || st == DestAborted || (m.Resolved && !a.rec.Resolved && st != DestDone) {
			if err := a.abort(ctx, "aborted by the source: "+m.Reason, m.Resolved); err != nil {
				return resumeAckMsg{}, err
			}
		}
	case intentDone:
		if err := a.sourceDone(ctx, m.Resolved); err != nil {
			return resumeAckMsg{}, err
		}
	case intentCommit:
		if st == DestPrepared {
			return resumeAckMsg{}, fmt.Errorf("%w: commit while %v", ErrProtocol, st)
		}
	}
	return a.ack(ctx, m.Intent)
}

// ack says where it stands. A source that has committed gets the key for new
// lanes where it still has pages to serve.
func (a *arriving) ack(ctx context.Context, what intent) (resumeAckMsg, error) {
	p := a.snapshot()
	ack := resumeAckMsg{
		Known: true, State: a.State(), Resolved: a.rec.Resolved, PID: p.PID,
		Reason: clip(p.Reason, MaxReason), Stats: p.ArrivalStats.onAir(),
	}
	if ack.Reason == "" {
		ack.Reason = a.rec.Reason
	}
	switch ack.State {
	case DestReady, DestCommitted, DestRunning:
		if what != intentCommit {
			break
		}
		err := a.engine("epoch", func() (err error) {
			ack.Epoch, ack.Key, err = a.arrival.NewEpoch(ctx)
			return err
		})
		if err != nil {
			return ack, err
		}
	}
	return ack, nil
}

// sourceDone: the copy at the source is dead. Caller has the turn.
func (a *arriving) sourceDone(ctx context.Context, resolved bool) error {
	switch st := a.State(); st {
	case DestResident, DestLost:
		return a.settle(ctx)
	case DestRunning:
		a.rec.PeerGone = true
		return a.record(DestRunning, "the source has ended its copy")
	case DestReady, DestCommitted:
		if !resolved {
			return fmt.Errorf("%w: done while %v", ErrProtocol, st)
		}
		a.rec.PeerGone, a.rec.Resolved = true, true
		return a.commit(ctx, nil, nil)
	case DestDone:
		return nil
	default:
		return fmt.Errorf("%w: done while %v", ErrProtocol, st)
	}
}

// errBehind: takeUp has not worked yet.
var errBehind = errors.New("migrate: what an earlier daemon left is not taken up yet")

// Recover takes up all that an earlier daemon left in the journal. What was not
// ready is aborted, what was is kept frozen until its source is heard, what was
// committed is let run. What cannot be done at once is tried again in the
// background. The error names journals that are damaged; the others are
// recovered all the same.
func (d *Destination) Recover(ctx context.Context) error {
	recs, err := d.cfg.Journals.List()
	for _, rec := range recs {
		if rec.Role != RoleDestination {
			continue
		}
		if rerr := d.recoverOne(ctx, rec); rerr != nil {
			err = errors.Join(err, fmt.Errorf("migration %v: %w", rec.Migration, rerr))
		}
	}
	return err
}

func (d *Destination) recoverOne(ctx context.Context, rec Record) error {
	st, err := ParseDestState(rec.State)
	if err != nil {
		return err
	}
	a := newArriving(d, rec.Migration)
	a.rec, a.state, a.pid, a.behind = rec, st, rec.DestPID, true
	a.peerName, a.peerInc = rec.PeerName, rec.PeerIncarnation
	a.progress.State, a.progress.Started, a.progress.Comm = rec.State, rec.Started, rec.Comm
	a.progress.Peer, a.progress.PID, a.progress.Reason = rec.PeerName, rec.DestPID, rec.Reason
	a.progress.Mode, a.progress.SourcePID = rec.Mode, rec.SourcePID
	if a.journal, err = d.cfg.Journals.Open(rec.Migration, RoleDestination); err != nil {
		return err
	}
	if !d.add(a) {
		return errors.Join(ErrExists, a.journal.Close())
	}
	if err := a.take(ctx); err != nil {
		return err
	}
	defer a.give()
	if err := a.takeUp(ctx); err != nil {
		a.log.Error("not taken up yet; tried again", "state", st, "err", err)
		a.tell(err.Error())
		if d.begin() {
			go func() {
				defer d.wg.Done()
				a.takeUpLater()
			}()
		}
	}
	return nil
}

// takeUp brings an arrival from the journal to where it can go on. Caller has
// the turn.
func (a *arriving) takeUp(ctx context.Context) error {
	err := a.tryTakeUp(ctx)
	a.behind = err != nil
	return err
}

func (a *arriving) tryTakeUp(ctx context.Context) error {
	st := a.State()
	if st == DestDone {
		return a.forget(DestDone)
	}
	gone := false
	if a.theArrival() == nil {
		err := a.engine("adopt", func() error {
			v, err := a.d.cfg.Host.Adopt(ctx, a.id)
			if err == nil {
				a.setArrival(v)
			}
			return err
		})
		if gone = errors.Is(err, ErrGone); err != nil && !gone {
			return err
		}
	}
	switch st {
	case DestPrepared:
		return a.abort(ctx, "the destination's daemon ended before it was ready", false)
	case DestAborted:
		return a.abort(ctx, "", false)
	case DestReady:
		if gone {
			return a.abort(ctx, "the destination has lost its copy before the commit", true)
		}
	case DestCommitted, DestRunning:
		if gone {
			return a.record(DestLost, "it was released, and is gone without having ended by itself")
		}
		if st == DestCommitted && !a.heard && !a.rec.Resolved && !a.rec.PeerGone {
			a.releaseLater()
			return nil
		}
		return a.commit(ctx, nil, nil)
	case DestResident:
		if a.rec.PeerGone {
			return a.settle(ctx)
		}
	case DestLost: // waits for the source, or a person
		a.tell(a.rec.Reason)
	}
	return nil
}

// releaseLater lets a process run whose COMMIT an earlier daemon has journalled,
// when the source had the time to say otherwise: a person may have taken the
// process back there while this host was away, and it may not have run here yet.
// The source says COMMIT again as soon as it reaches this daemon. Caller has the
// turn.
func (a *arriving) releaseLater() {
	if !a.d.begin() {
		return
	}
	a.heard = true // or nothing was, in that time
	go func() {
		defer a.d.wg.Done()
		t := time.NewTimer(a.d.t.Inquiry + a.d.t.BackoffMax)
		defer t.Stop()
		for waiting := true; waiting; {
			st, changed := a.look()
			if st != DestCommitted { // released, or given up
				return
			}
			select {
			case <-t.C:
				waiting = false
			case <-changed:
			case <-a.d.ctx.Done():
				return
			}
		}
		if a.take(a.d.ctx) != nil {
			return
		}
		var err error
		if a.State() == DestCommitted {
			err = a.takeUp(a.d.ctx)
		}
		a.give()
		if err != nil {
			a.takeUpLater()
		}
	}()
}

// takeUpLater goes on trying.
func (a *arriving) takeUpLater() {
	b := backoff{t: a.d.t}
	for b.wait(a.d.ctx) && a.take(a.d.ctx) == nil {
		err := a.takeUp(a.d.ctx)
		a.give()
		if err == nil {
			return
		}
		a.log.Error("not taken up yet", "err", err)
		a.tell(err.Error())
	}
}

// ResolveCommit is a person's word that the process belongs here although its
// source is not heard. That can only be where every page is here; a source that
// comes back obeys, by killing its copy, or freezing it where it has run on.
func (d *Destination) ResolveCommit(ctx context.Context, id transport.MigrationID) error {
	a := d.find(id)
	if a == nil {
		return ErrNoJournal
	}
	if err := a.take(ctx); err != nil {
		return err
	}
	defer a.give()
	if a.behind {
		return errBehind
	}
	switch st := a.State(); st {
	case DestReady:
		if p := a.refresh(); p.PagesResident < p.PagesTotal || (p.PagesTotal == 0 && a.rec.Mode != ModeStop) {
			return fmt.Errorf("migrate: only %d of %d pages are here; without its source the process cannot run: abort it here",
				p.PagesResident, p.PagesTotal)
		}
		a.rec.Resolved = true
		err := a.commit(ctx, nil, nil)
		if err == nil && a.State() == DestAborted {
			err = errors.New("migrate: COMMIT could not be journalled; it was aborted instead")
		}
		return err
	case DestCommitted, DestRunning, DestResident:
		// The journal stays until the source has said DONE: one that came to
		// hear of nothing would take its own copy back.
		a.rec.Resolved = true
		if err := a.record(st, ErrResolved.Error()); err != nil || st != DestCommitted {
			return err
		}
		return a.commit(ctx, nil, nil)
	case DestLost:
		return errors.New("migrate: it is lost here; resolve at the source, whose copy is that of the switch")
	default:
		return fmt.Errorf("migrate: nothing to resolve: the destination is %v", st)
	}
}

// ResolveAbort is a person's word that the process belongs to its source: the
// copy here is ended, wherever it stands. A source that comes back obeys and
// lets its own run.
func (d *Destination) ResolveAbort(ctx context.Context, id transport.MigrationID) error {
	a := d.find(id)
	if a == nil {
		return ErrNoJournal
	}
	if err := a.take(ctx); err != nil {
		return err
	}
	defer a.give()
	st := a.State()
	if st == DestAborted && a.theArrival() != nil { // once more
		return a.abort(ctx, "", false)
	}
	if st == DestAborted || st == DestDone || st == DestEmpty {
		return fmt.Errorf("migrate: nothing to resolve: the destination is %v", st)
	}
	if a.behind {
		return errBehind
	}
	a.rec.Resolved = true
	return a.abort(ctx, ErrResolved.Error(), true)
}
