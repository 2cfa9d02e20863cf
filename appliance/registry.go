package appliance

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/pageferry/pageferry/transport"
)

var (
	// ErrBusy: the process is already being migrated.
	ErrBusy = errors.New("already migrating")
	// ErrUnknown: no migration has that id.
	ErrUnknown = errors.New("no such migration")
	// ErrAmbiguous: the beginning of an id fits several migrations.
	ErrAmbiguous = errors.New("ambiguous migration id")
)

// migration is one that this daemon takes part in.
type migration struct {
	id   transport.MigrationID
	role Role
	pid  int // at the source; 0 where the process is another migration's

	mu       sync.Mutex
	cancel   func() error // nil until it runs
	canceled bool         // somebody asked for it, perhaps before it ran
	report   Report
	changed  chan struct{} // closed and replaced at every change
}

func newMigration(id transport.MigrationID, role Role, r Report) *migration {
	r.ID, r.Role = id.String(), role
	if r.Rounds == nil {
		r.Rounds = []Round{}
	}
	return &migration{id: id, role: role, pid: r.SourcePID, report: r, changed: make(chan struct{})}
}

// snapshot is the report now, and a channel that is closed when it is outdated.
func (m *migration) snapshot() (Report, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.report
	r.Rounds = slices.Clone(r.Rounds)
	return r, m.changed
}

// update changes the report and wakes who watches. f must not block. A finished
// report is never changed.
func (m *migration) update(f func(r *Report)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.report.Finished() {
		return
	}
	f(&m.report)
	close(m.changed)
	m.changed = make(chan struct{})
}

// registry knows the migrations that run and those whose report is kept.
type registry struct {
	mu       sync.Mutex
	live     []*migration // in the order of their beginning
	finished []Report     // oldest first
	store    reports
}

func openRegistry(dir string, limit int) (*registry, error) {
	r := &registry{store: reports{dir: dir, limit: limit}}
	var err error
	r.finished, err = r.store.load()
	return r, err
}

// add takes a migration in. A source is refused with ErrBusy while its pid is
// being migrated by another one.
func (r *registry) add(m *migration) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.live {
		if m.role == RoleSource && o.role == RoleSource && o.pid == m.pid && m.pid != 0 {
			return fmt.Errorf("process %d: %w as %s; \"pageferry watch %s\" follows it", m.pid, ErrBusy, o.id, o.id)
		}
		if o.id == m.id && o.role == m.role {
			return fmt.Errorf("migration %s: %w", m.id, ErrBusy)
		}
	}
	r.live = append(r.live, m)
	return nil
}

// finish lets go of a migration that has ended, keeps its report, which last completes,
// and then tells those who watch: to them the process is free again.
func (r *registry) finish(m *migration, last func(rep *Report)) error {
	rep, _ := m.snapshot()
	if !rep.Finished() {
		last(&rep)
	}
	err := r.keep(m, rep)
	m.update(func(r *Report) { *r = rep })
	return err
}

// keep replaces a migration by its report.
func (r *registry) keep(m *migration, rep Report) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live = slices.DeleteFunc(r.live, func(o *migration) bool { return o == m })
	// One that was resolved has ended before, or so it seemed.
	r.finished = slices.DeleteFunc(r.finished, func(o Report) bool { return o.ID == rep.ID && o.Role == rep.Role })
	r.finished = append(r.finished, rep)
	if n := len(r.finished) - r.store.limit; n > 0 {
		r.finished = slices.Delete(r.finished, 0, n)
	}
	return r.store.save(&rep)
}

// forget drops a migration without a trace: it never began.
func (r *registry) forget(m *migration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live = slices.DeleteFunc(r.live, func(o *migration) bool { return o == m })
}

// known is the report of a migration of that very id and role.
func (r *registry) known(id transport.MigrationID, role Role) (Report, bool) {
	for _, rep := range r.list() {
		if rep.ID == id.String() && rep.Role == role {
			return rep, true
		}
	}
	return Report{}, false
}

// list is every known migration, oldest first.
func (r *registry) list() []Report {
	r.mu.Lock()
	rs := slices.Clone(r.finished)
	live := slices.Clone(r.live)
	r.mu.Unlock()
	for _, m := range live {
		rep, _ := m.snapshot()
		rs = append(rs, rep)
	}
	return rs
}

// find looks a migration up by its id or an unambiguous beginning of it. The
// migration is nil where only a report is left.
func (r *registry) find(prefix string) (*migration, Report, error) {
	if prefix == "" {
		return nil, Report{}, fmt.Errorf("%w: the id is empty", ErrUnknown)
	}
	r.mu.Lock()
	live, finished := slices.Clone(r.live), slices.Clone(r.finished)
	r.mu.Unlock()

	var m *migration
	var rep Report
	ids := map[string]bool{}
	for i := range finished {
		if strings.HasPrefix(finished[i].ID, prefix) {
			rep = finished[i]
			ids[rep.ID] = true
		}
	}
	for _, o := range live {
		if strings.HasPrefix(o.id.String(), prefix) {
			m = o
			rep, _ = o.snapshot()
			ids[rep.ID] = true
		}
	}
	switch {
	case len(ids) == 0:
		return nil, Report{}, fmt.Errorf("%w as %q; \"pageferry list\" shows what there is", ErrUnknown, prefix)
	case len(ids) > 1:
		return nil, Report{}, fmt.Errorf("%w: %q is the beginning of %d", ErrAmbiguous, prefix, len(ids))
	}
	return m, rep, nil
}

// stop asks a live migration to end as if it had never begun. The error wraps
// migrate.ErrCommitted where that is too late.
func (m *migration) stop() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.role != RoleSource {
		return fmt.Errorf("migration %s: cancel it at the source, host %s, which owns the process", m.id, m.report.Peer)
	}
	if m.cancel != nil {
		if err := m.cancel(); err != nil {
			return fmt.Errorf("migration %s: %w", m.id, err)
		}
	}
	m.canceled = true
	return nil
}

// running notes how the migration is canceled from now on; f must not block.
func (m *migration) running(f func() error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cancel = f
	if m.canceled {
		_ = f() // too early to be too late
	}
}

func (m *migration) wasCanceled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.canceled
}
