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
	_, rep, err = d.registry.find(rep.ID)
	return rep, err
}

// sending is a migration that leaves here, from its beginning until both sides
// know its end.
type sending struct {
	src  *migrate.Source
	over chan struct{} // closed when it was resolved after its report was made
}

// departs notes that src is there to be resolved; the returned function ends that.
func (h *handover) departs(id transport.MigrationID, src *migrate.Source) func() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sending[id] = &sending{src, make(chan struct{})}
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.sending, id)
	}
}

// awaitResolve keeps a source whose outcome is for a person to decide, with the
// hold on its process, until somebody has or the daemon ends.
func (h *handover) awaitResolve(ctx context.Context, id transport.MigrationID) {
	h.mu.Lock()
	s := h.sending[id]
	h.mu.Unlock()
	select {
	case <-s.over:
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
	if rep.Finished() && rep.Outcome != OutcomeInDoubt && rep.Outcome != OutcomeLost {
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
	if !rep.Finished() {
		return nil // whoever runs it reports it
	}
	if res.Outcome == migrate.OutcomeInDoubt || res.Outcome == migrate.OutcomeLost {
		return err // as before
	}
	// The old report is of an end that was none.
	rep.Outcome = ""
	m := newMigration(id, RoleSource, rep)
	m.pid = 0 // it keeps nobody from the process
	if aerr := h.d.registry.add(m); aerr != nil {
		return aerr
	}
	m.update(func(r *Report) { r.result(res) })
	h.d.end(m, outcomeOf(m, res, err), err)
	if res.Unsettled && h.d.begin(func(ctx context.Context) { h.settle(ctx, m, s.src); close(s.over) }) == nil {
		return nil
	}
	close(s.over)
	return nil
}

var errNotUp = errors.New("it is just being taken up from the journal; try again")

func (h *handover) unknown(err error) error {
	if errors.Is(err, migrate.ErrNoJournal) {
		return errors.New("it is over for both hosts: there is nothing to resolve")
	}
	return err
}
