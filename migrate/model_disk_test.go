package migrate

import (
	"fmt"

	"github.com/pageferry/pageferry/transport"
)

// disk is the journal store of one host; it outlives the daemon.
type disk struct {
	incarnation Incarnation
	last        map[transport.MigrationID]*Record
	// fails says how often the next writes of a state, or of "remove", fail;
	// lies is the state whose writes are on the disk all the same.
	fails map[string]int
	lies  string
}

// broken is a failure that a test has planned. Caller holds w.mu.
func (d *disk) broken(what string) bool {
	if d.fails[what] == 0 {
		return false
	}
	d.fails[what]--
	return true
}

func newDisk(n byte) *disk {
	return &disk{incarnation: Incarnation{n}, last: map[transport.MigrationID]*Record{}, fails: map[string]int{}}
}

// fakeJournals is a daemon's view of its disk.
type fakeJournals struct {
	l *life
	d *disk
}

func (j *fakeJournals) Incarnation() Incarnation { return j.d.incarnation }

func (j *fakeJournals) Create(first Record) (Journal, error) {
	j.l.here()
	w := j.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble("create journal"); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoSpace, err)
	}
	if j.d.last[first.Migration] != nil {
		return nil, ErrExists
	}
	j.d.last[first.Migration] = &first
	return &fakeJournal{j, first.Migration}, nil
}

func (j *fakeJournals) Open(id transport.MigrationID, role Role) (Journal, error) {
	j.l.here()
	w := j.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if j.d.last[id] == nil {
		return nil, ErrNoJournal
	}
	return &fakeJournal{j, id}, nil
}

func (j *fakeJournals) List() ([]Record, error) {
	j.l.here()
	w := j.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	var rs []Record
	for _, r := range j.d.last {
		rs = append(rs, *r)
	}
	return rs, nil
}

type fakeJournal struct {
	j  *fakeJournals
	id transport.MigrationID
}

func (f *fakeJournal) Append(r Record) error {
	f.j.l.here()
	w := f.j.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.j.d.broken(r.State) {
		w.logf("  journal of %s fails, lies: %v", r.State, f.j.d.lies == r.State)
		if f.j.d.lies == r.State {
			f.j.d.last[f.id] = &r
		}
		return errInjected
	}
	if err := w.trouble("append to journal: " + r.State); err != nil {
		if w.rng.IntN(2) == 0 {
			w.logf("  and is on the disk all the same")
			f.j.d.last[f.id] = &r
		}
		return err
	}
	f.j.d.last[f.id] = &r
	return nil
}

func (f *fakeJournal) Last() (Record, error) {
	f.j.l.here()
	w := f.j.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	r := f.j.d.last[f.id]
	if r == nil {
		return Record{}, ErrNoJournal
	}
	return *r, nil
}

func (f *fakeJournal) Remove() error {
	f.j.l.here()
	w := f.j.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if f.j.d.broken("remove") {
		return errInjected
	}
	if err := w.trouble("remove journal"); err != nil {
		return err
	}
	delete(f.j.d.last, f.id)
	return nil
}

func (f *fakeJournal) Close() error { return nil }
