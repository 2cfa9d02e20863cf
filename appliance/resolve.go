package appliance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
)

// Owners that a person may name; see docs/handover.md, resolve.
const (
	OwnerSource      = "source"
	OwnerDestination = "destination"
)

// ResolveRequest says whose a process is that the two hosts cannot agree on.
type ResolveRequest struct {
	Owner string `json:"owner"` // source or destination
}

// resolveLimit is how long the other host may take to hear of it. Without it the
// decision holds all the same, and it obeys when it is back.
const resolveLimit = 30 * time.Second

// Resolve carries out a person's decision about the migration whose id begins
// with prefix, as far as this host has to do with it, and returns what came of
// it. It is journalled before it is carried out.
func (d *Daemon) Resolve(ctx context.Context, prefix string, req ResolveRequest) (Report, error) {
	if req.Owner != OwnerSource && req.Owner != OwnerDestination {
		return Report{}, &UsageError{Msg: fmt.Sprintf("owner %q: it is source or destination", req.Owner)}
	}
	_, rep, err := d.registry.find(prefix)
	if err != nil {
		return Report{}, err
	}
	id, err := transport.ParseMigrationID(rep.ID)
	if err != nil {
		return rep, err
	}
	ctx, cancel := context.WithTimeout(ctx, resolveLimit)
	defer cancel()
	if err := d.links.resolve(ctx, id, rep, req.Owner); err != nil {
		return rep, fmt.Errorf("migration %s: %w", rep.ID, err)
	}
	// Who runs the migration reports it, in a moment.
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, rep, err = d.registry.find(rep.ID); err != nil || decided(&rep) {
			return rep, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return rep, nil // decided, and still on its way
		}
	}
}

// decided reports whether the outcome is one that nobody has to decide.
func decided(r *Report) bool {
	return r.Role == RoleDestination || r.Finished() && r.Outcome != OutcomeInDoubt && r.Outcome != OutcomeLost
}

// sending is a migration that leaves here, from its beginning until both sides
// know its end. The goroutine that runs it makes all its reports.
type sending struct {
	src *migrate.Source
	// decided has room for one: what came of a decision, for a run that has ended
	// without an outcome of its own.
	decided chan resolved
}

type resolved struct {
	res migrate.Result
	err error
}

// departs notes that src is there to be resolved; the returned function ends that.
func (h *handover) departs(id transport.MigrationID, src *migrate.Source) func() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sending[id] = &sending{src, make(chan resolved, 1)}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.sending, id)
	}
}

// awaitResolve keeps a source whose outcome is for a person to decide, with the
// hold on its process, until somebody has or the daemon ends. Then it replaces the
// report, which was of an end that was none.
func (h *handover) awaitResolve(ctx context.Context, old *migration) {
	h.mu.Lock()
	s := h.sending[old.id]
	h.mu.Unlock()
	select {
	case r := <-s.decided:
		rep, _ := old.snapshot()
		rep.Outcome = ""
		m := newMigration(old.id, RoleSource, rep)
		m.pid = 0 // it keeps nobody from the process
		if err := h.d.registry.add(m); err != nil {
			h.d.log.Error("reporting what was resolved", "migration", old.id, "err", err)
			return
		}
		h.finish(ctx, m, s.src, r.res, r.err)
	case <-ctx.Done():
	}
}

func (h *handover) resolve(ctx context.Context, id transport.MigrationID, rep Report, owner string) error {
	if rep.Role == RoleDestination {
		if owner == OwnerDestination {
			return h.unknown(h.dest.ResolveCommit(ctx, id))
		}
		return h.unknown(h.dest.ResolveAbort(ctx, id))
	}
	if decided(&rep) {
		return fmt.Errorf("it is decided: %s", rep.Outcome) // and the other host is being told, or knows
	}
	h.mu.Lock()
	s := h.sending[id]
	h.mu.Unlock()
	if s == nil && !rep.Finished() {
		return errNotUp
	}
	if s == nil {
		return h.unknown(migrate.ErrNoJournal)
	}
	decide := s.src.ResolveAbort
	if owner == OwnerDestination {
		decide = s.src.ResolveCommit
	}
	res, err := decide(ctx)
	if res.Outcome == "" {
		return err // nothing was decided
	}
	if res.Outcome == migrate.OutcomeInDoubt || res.Outcome == migrate.OutcomeLost {
		return err // as before
	}
	select {
	case s.decided <- resolved{res, err}:
	default: // it is decided already
	}
	return nil
}

var errNotUp = errors.New("it is just being taken up from the journal; try again")

func (h *handover) unknown(err error) error {
	if errors.Is(err, migrate.ErrNoJournal) {
		return errors.New("it is over for both hosts: there is nothing to resolve")
	}
	return err
}
