package bulk

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

// fileStore is a Store for coordinators of one machine: a bbolt file for each run, and a
// file with a lock for each process that is held, whatever run holds it.
type fileStore struct {
	db   *bolt.DB
	held string
	lock map[string]*os.File

	shown time.Time // when show was done last
	stale bool      // something has changed since
}

// showEvery bounds how often the copy for others is written.
const showEvery = 200 * time.Millisecond

var itemsBucket = []byte("items")

// lockWait is how long a run waits for the end of another coordinator of it, which may be
// about to end.
const lockWait = time.Second

// OpenFile opens the store of the run name in a directory, or makes it.
func OpenFile(dir, name string) (Store, error) {
	s := &fileStore{held: filepath.Join(dir, "held"), lock: map[string]*os.File{}}
	if err := os.MkdirAll(s.held, 0o700); err != nil {
		return nil, fmt.Errorf("store of run %s: %w", name, err)
	}
	path := filepath.Join(dir, url.PathEscape(name)+".db")
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: lockWait})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("run %s (%s): %w; \"pageferry bulk status\" shows how far it is", name, path, ErrHeld)
	}
	if err != nil {
		return nil, fmt.Errorf("store of run %s: %s: %w", name, path, err)
	}
	s.db = db
	err = db.Update(func(tx *bolt.Tx) error { _, err := tx.CreateBucketIfNotExists(itemsBucket); return err })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("store of run %s: %w", name, err), db.Close())
	}
	return s, nil
}

// ReadFile are the items of a run that may be under way. Nil where there was none.
func ReadFile(dir, name string) ([]Item, error) {
	path := filepath.Join(dir, url.PathEscape(name)+".db")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	// Who carries the run out has the file locked: it leaves a copy after each change.
	data, err := os.ReadFile(path + ".json")
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("run %s: %w", name, err)
	}
	var items []Item
	if err := json.Unmarshal(data, &items); err != nil {
		return nil, fmt.Errorf("run %s: %s.json: %w", name, path, err)
	}
	return items, nil
}

func (s *fileStore) Items(context.Context) (items []Item, err error) {
	err = s.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(itemsBucket).ForEach(func(k, v []byte) error {
			var i Item
			if err := json.Unmarshal(v, &i); err != nil {
				return fmt.Errorf("item %s: %w", k, err)
			}
			items = append(items, i)
			return nil
		})
	})
	if err != nil {
		err = fmt.Errorf("%s: %w", s.db.Path(), err)
	}
	return items, err
}

func (s *fileStore) Put(ctx context.Context, i Item) error {
	data, err := json.Marshal(i)
	if err == nil {
		err = s.db.Update(func(tx *bolt.Tx) error { return tx.Bucket(itemsBucket).Put([]byte(i.ID()), data) })
	}
	if err != nil {
		return fmt.Errorf("keep what is known of %s: %w", &i, err)
	}
	s.stale = true
	return s.show(ctx, false)
}

// show leaves a copy for whoever wants to see how far the run is. It need not be durable.
func (s *fileStore) show(ctx context.Context, now bool) error {
	if !s.stale || !now && time.Since(s.shown) < showEvery {
		return nil
	}
	items, err := s.Items(ctx)
	if err != nil {
		return err
	}
	data, err := json.Marshal(items)
	if err != nil {
		return err
	}
	path := s.db.Path() + ".json"
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	s.shown, s.stale = time.Now(), false
	return os.Rename(path+".new", path)
}

func (s *fileStore) Hold(_ context.Context, id string) error {
	if s.lock[id] != nil {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(s.held, url.PathEscape(id)), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrHeld
		}
		return fmt.Errorf("process %s: %w", id, err)
	}
	s.lock[id] = f
	return nil
}

func (s *fileStore) Drop(_ context.Context, id string) error {
	f := s.lock[id]
	if f == nil {
		return nil
	}
	delete(s.lock, id)
	// Removed while it is locked: whoever opened it before finds that it has no name any
	// more only by looking, so nothing is removed. They are empty.
	return f.Close()
}

func (s *fileStore) Close() error {
	for id := range s.lock {
		_ = s.Drop(context.Background(), id)
	}
	return errors.Join(s.show(context.Background(), true), s.db.Close())
}
