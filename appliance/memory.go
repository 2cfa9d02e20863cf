package appliance

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/transport"
)

// What becomes of the files that show the source's memory when every page is here.
const (
	ShownDrop = "drop" // they go, and with them the source's copy
	// ShownKeep: they stay until Release. What they show is the memory as it was frozen,
	// of which the destination has no copy as soon as the process writes: so the source
	// keeps its own, frozen, and the migration is not over before.
	ShownKeep = "keep"
)

func shownText(keep bool) string {
	if keep {
		return ShownKeep
	}
	return ShownDrop
}

// ErrNotShown: there are no files that show the memory of a migration.
var ErrNotShown = errors.New("its memory cannot be read here")

// Memory says where the source's memory of a migration can be read, as it was frozen.
// Whoever is told so and reads waits for the pager, which this daemon must not.
type Memory struct {
	ID   string `json:"id"`
	Comm string `json:"comm"`
	// PID is the process here, 0 before it runs.
	PID  int    `json:"pid"`
	Peer string `json:"peer"` // the host that it comes from
	// Dir is where mem, maps, vma, files, status and resident are.
	Dir           string `json:"dir"`
	PagesTotal    uint64 `json:"pages_total"`
	PagesResident uint64 `json:"pages_resident"`
	// Kept: until Release, not until the last page is here.
	Kept bool `json:"kept"`
}

// arriving is the migration whose id begins with prefix, if it is on its way here.
func (d *Daemon) arriving(prefix string) (Report, transport.MigrationID, error) {
	_, rep, err := d.registry.find(prefix)
	if err != nil {
		return rep, transport.MigrationID{}, err
	}
	switch {
	case rep.Role != RoleDestination:
		err = fmt.Errorf("it leaves this host; ask on %s, where it arrives", rep.Peer)
	case rep.Finished() && rep.Outcome == OutcomeDone:
		err = fmt.Errorf("it has arrived, and what showed the source's memory is gone; process %d has all of its memory (migrate --shown keep keeps the source's)", rep.DestPID)
	case rep.Finished():
		err = fmt.Errorf("it is over: %s", rep.Outcome)
	}
	if err != nil {
		return rep, transport.MigrationID{}, fmt.Errorf("migration %s: %w: %w", rep.ID, ErrNotShown, err)
	}
	id, err := transport.ParseMigrationID(rep.ID)
	return rep, id, err
}

// Memory says where the memory of the migration whose id begins with prefix can be
// read. The error wraps ErrNotShown where it cannot.
func (d *Daemon) Memory(ctx context.Context, prefix string) (Memory, error) {
	rep, id, err := d.arriving(prefix)
	if err != nil {
		return Memory{}, err
	}
	m, err := d.links.shown(ctx, id)
	if err != nil {
		return Memory{}, fmt.Errorf("migration %s: %w", rep.ID, err)
	}
	m.ID, m.Comm, m.PID, m.Peer = rep.ID, rep.Comm, rep.DestPID, rep.Peer
	return m, nil
}

// Release ends ShownKeep of the migration whose id begins with prefix: from here on it
// is as if it had been begun without. Idempotent.
func (d *Daemon) Release(_ context.Context, prefix string) (Report, error) {
	rep, id, err := d.arriving(prefix)
	if err != nil {
		return rep, err
	}
	if err := d.links.unkeep(id); err != nil {
		return rep, fmt.Errorf("migration %s: %w", rep.ID, err)
	}
	if m, _, err := d.registry.find(rep.ID); err == nil && m != nil {
		m.update(func(r *Report) { r.Kept = false })
		rep, _ = m.snapshot()
	}
	return rep, nil
}

func (h *handover) shown(ctx context.Context, id transport.MigrationID) (Memory, error) {
	return h.host.Shown(ctx, id)
}

func (h *handover) unkeep(id transport.MigrationID) error { return h.host.Unkeep(id) }

// statsLimit is how long a pager may take to say how far it is: one that is dead is
// being replaced, and nobody waits for that.
const statsLimit = time.Second

var errNotArriving = fmt.Errorf("%w: it is not under way here", ErrNotShown)

func (h *host) arrival(id transport.MigrationID) *arrival {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.arrivals[id]
}

// Shown implements Host.
func (h *host) Shown(ctx context.Context, id transport.MigrationID) (m Memory, err error) {
	a := h.arrival(id)
	if a == nil {
		return m, errNotArriving
	}
	a.mu.Lock()
	r, why, st, p := a.record, a.noShow, a.stats, a.pager
	a.mu.Unlock()
	m.Dir = h.showDir(id)
	switch {
	case fusemem.Mounted(m.Dir):
		ctx, cancel := context.WithTimeout(ctx, statsLimit)
		defer cancel()
		if p != nil {
			if now, err := p.Stats(ctx); err == nil {
				st = now
			}
		}
		m.Kept, m.PagesTotal, m.PagesResident = r.Keep, st.PagesTotal, st.PagesResident
		return m, nil
	case r.Trap == TrapUFFD && h.noFUSE != nil:
		why = fmt.Errorf("this host cannot show it as files: %w", h.noFUSE)
	case r.Trap == TrapUFFD:
		why = errors.New("it was sent with --trap uffd")
	case why != nil:
	case r.Resident || r.Free:
		why = errors.New("every page is here, and what showed the source's memory is gone")
	default:
		why = errors.New("there is something to read from the switch on, which is still to come")
	}
	return Memory{}, fmt.Errorf("%w: %w", ErrNotShown, why)
}

// Unkeep implements Host.
func (h *host) Unkeep(id transport.MigrationID) error {
	a := h.arrival(id)
	if a == nil {
		return errNotArriving
	}
	return a.unkeep()
}

// unkeep lets Resident return when every page is here.
func (a *arrival) unkeep() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.record.Keep {
		return nil
	}
	a.record.Keep = false
	if err := a.saveRecord(); err != nil { // or the next daemon would keep it again
		a.record.Keep = true
		return fmt.Errorf("arrival: %w", err)
	}
	close(a.unkept)
	return nil
}

// keep waits, where what is shown is to be kept, until that ends. The process does not
// stand on the pager as long: it has its memory, and nothing of it is trapped.
func (a *arrival) keep(ctx context.Context) error {
	a.mu.Lock()
	keep := a.record.Keep && !a.record.Gone && fusemem.Mounted(a.host.showDir(a.id))
	var err error
	if keep && !a.record.Free {
		// Noted before it is done: no page is missing, so that a pager that dies from here
		// on takes nothing with it.
		a.record.Free = true
		err = a.saveRecord()
	}
	a.mu.Unlock()
	if !keep || err != nil {
		return err
	}
	if err := a.retry(ctx, func(p *pager.Client) error { return p.Free(ctx) }); err != nil {
		return err
	}
	a.log.Info("every page is here; the source's copy is kept for who reads it", "directory", a.host.showDir(a.id), "until", "pageferry release")
	select {
	case <-a.unkept:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
