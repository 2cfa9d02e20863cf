package journal

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
)

// DefaultDir is where a daemon keeps its store.
const DefaultDir = "/var/lib/pageferry"

var (
	// ErrBusy: another daemon has the store.
	ErrBusy = errors.New("journal: the store is in use by another daemon")
	// ErrDamaged: a file of the store is not what was written to it.
	ErrDamaged = errors.New("journal: damaged")
)

// Op is an operation on the store's files, for Options.Inject.
type Op string

const (
	OpCreate  Op = "create"   // of a file
	OpWrite   Op = "write"    // of a slot, or of the whole file at its creation
	OpRename  Op = "rename"   // a new file to its name
	OpSyncDir Op = "sync-dir" // after a name was made or removed
	OpRemove  Op = "remove"
)

// Options of a store. The zero value is the default.
type Options struct {
	// Inject is called before every operation; nil for none. An error fails the
	// operation; of a write the first n bytes reach the file before it does.
	Inject func(op Op, name string, b []byte) (n int, err error)
}

// Store is a directory of journals. Close it at the end.
type Store struct {
	dir         string
	opts        Options
	lock        *os.File
	incarnation migrate.Incarnation
}

var _ migrate.Journals = (*Store)(nil)

const (
	incarnationName = "incarnation"
	lockName        = "lock"
	newSuffix       = ".new" // of a file that has not got its name yet
)

// Open takes the store in dir, which is made where it is missing.
func Open(dir string, opts Options) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	s := &Store{dir: dir, opts: opts}
	var err error
	if s.lock, err = os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600); err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: %s", ErrBusy, dir)
		}
		return nil, fmt.Errorf("journal: lock %s: %w", dir, err)
	}
	if err = s.sweep(); err == nil {
		err = s.loadIncarnation()
	}
	if err != nil {
		s.lock.Close()
		return nil, err
	}
	return s, nil
}

// Close lets another daemon have the store. Journals that are open stay usable;
// close them first.
func (s *Store) Close() error { return s.lock.Close() }

// Incarnation names the store.
func (s *Store) Incarnation() migrate.Incarnation { return s.incarnation }

// sweep removes what a crash left before it had a name.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), newSuffix) {
			if err := os.Remove(filepath.Join(s.dir, e.Name())); err != nil {
				return fmt.Errorf("journal: %w", err)
			}
		}
	}
	return nil
}

func (s *Store) loadIncarnation() error {
	path := filepath.Join(s.dir, incarnationName)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s.newIncarnation()
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	raw, err := hex.DecodeString(string(bytes.TrimSpace(b)))
	if err != nil || len(raw) != len(s.incarnation) {
		return fmt.Errorf("%w: %s is no incarnation; without the right one migrations under way are in doubt: "+
			"restore it, or remove it to begin anew", ErrDamaged, path)
	}
	copy(s.incarnation[:], raw)
	return nil
}

func (s *Store) newIncarnation() error {
	rand.Read(s.incarnation[:]) // never fails
	f, err := s.create(incarnationName)
	if err != nil {
		return fmt.Errorf("journal: incarnation: %w", err)
	}
	defer f.Close()
	if err := s.write(f, incarnationName, []byte(s.incarnation.String()+"\n"), 0); err != nil {
		return errors.Join(fmt.Errorf("journal: incarnation: %w", err), s.discard(incarnationName))
	}
	if err := s.name(incarnationName); err != nil {
		return fmt.Errorf("journal: incarnation: %w", err)
	}
	// The directory itself may be new, too.
	return syncDir(filepath.Dir(filepath.Clean(s.dir)))
}

func fileName(id transport.MigrationID, role migrate.Role) string {
	return id.String() + "." + string(role)
}

// parseName is the inverse of fileName.
func parseName(name string) (id transport.MigrationID, role migrate.Role, ok bool) {
	hexID, r, ok := strings.Cut(name, ".")
	role = migrate.Role(r)
	if !ok || (role != migrate.RoleSource && role != migrate.RoleDestination) {
		return id, "", false
	}
	raw, err := hex.DecodeString(hexID)
	if err != nil || len(raw) != len(id) {
		return id, "", false
	}
	return transport.MigrationID(raw), role, true
}

// Create implements migrate.Journals.
func (s *Store) Create(first migrate.Record) (migrate.Journal, error) {
	name := fileName(first.Migration, first.Role)
	if _, _, ok := parseName(name); !ok {
		return nil, fmt.Errorf("journal: role %q", first.Role)
	}
	j := &Journal{store: s, name: name, id: first.Migration, role: first.Role, good: -1}
	b, err := j.blank(first)
	if err != nil {
		return nil, err
	}
	if j.file, err = s.create(name); err != nil {
		return nil, spaceError(name, err)
	}
	if err := allocate(j.file, int64(len(b))); err != nil {
		return nil, spaceError(name, errors.Join(err, j.file.Close(), s.discard(name)))
	}
	if err := s.write(j.file, name, b, 0); err != nil {
		return nil, spaceError(name, errors.Join(err, j.file.Close(), s.discard(name)))
	}
	if err := s.name(name); err != nil {
		return nil, spaceError(name, errors.Join(err, j.file.Close()))
	}
	return j, nil
}

// spaceError says ErrNoSpace where that is what it is.
func spaceError(name string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("journal %s: %w: %w", name, migrate.ErrNoSpace, err)
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("journal %s: %w", name, migrate.ErrExists)
	}
	return fmt.Errorf("journal %s: %w", name, err)
}

// Open implements migrate.Journals.
func (s *Store) Open(id transport.MigrationID, role migrate.Role) (migrate.Journal, error) {
	name := fileName(id, role)
	j := &Journal{store: s, name: name, id: id, role: role, good: -1}
	var err error
	j.file, err = os.OpenFile(filepath.Join(s.dir, name), os.O_RDWR|unix.O_DSYNC|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", migrate.ErrNoJournal, name)
	}
	if err != nil {
		return nil, fmt.Errorf("journal %s: %w", name, err)
	}
	if err := j.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("journal %s: %w", name, err), j.file.Close())
	}
	return j, nil
}

// List implements migrate.Journals.
func (s *Store) List() ([]migrate.Record, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("journal: %w", err)
	}
	var recs []migrate.Record
	var errs []error
	for _, e := range entries {
		id, role, ok := parseName(e.Name())
		if !ok {
			continue
		}
		j, err := s.Open(id, role)
		if errors.Is(err, migrate.ErrNoJournal) {
			continue // removed meanwhile
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		rec, err := j.Last()
		if err = errors.Join(err, j.Close()); err != nil {
			errs = append(errs, err)
			continue
		}
		recs = append(recs, rec)
	}
	return recs, errors.Join(errs...)
}
