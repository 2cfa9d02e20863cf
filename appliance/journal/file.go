package journal

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func (s *Store) inject(op Op, name string, b []byte) (int, error) {
	if s.opts.Inject == nil {
		return 0, nil
	}
	return s.opts.Inject(op, name, b)
}

// create makes a file that has not got its name yet.
func (s *Store) create(name string) (*os.File, error) {
	if _, err := s.inject(OpCreate, name, nil); err != nil {
		return nil, err
	}
	return os.OpenFile(filepath.Join(s.dir, name+newSuffix),
		os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_DSYNC|unix.O_CLOEXEC, 0o600)
}

// discard removes one that will never get it.
func (s *Store) discard(name string) error {
	return os.Remove(filepath.Join(s.dir, name+newSuffix))
}

// name gives a file its name, which must be free, durably. Where it fails no
// file is left.
func (s *Store) name(name string) error {
	_, err := s.inject(OpRename, name, nil)
	from, to := filepath.Join(s.dir, name+newSuffix), filepath.Join(s.dir, name)
	if err == nil {
		err = unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	}
	if err != nil {
		return errors.Join(&os.LinkError{Op: "rename", Old: from, New: to, Err: err}, s.discard(name))
	}
	if err := s.syncDir(name); err != nil {
		return errors.Join(err, os.Remove(to))
	}
	return nil
}

func (s *Store) remove(name string) error {
	if _, err := s.inject(OpRemove, name, nil); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return s.syncDir(name)
}

func (s *Store) syncDir(name string) error {
	if _, err := s.inject(OpSyncDir, name, nil); err != nil {
		return err
	}
	return syncDir(s.dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// write overwrites or lays down b at off. The file is O_DSYNC: it is durable on
// return.
func (s *Store) write(f *os.File, name string, b []byte, off int64) error {
	n, err := s.inject(OpWrite, name, b)
	if err != nil {
		if n > 0 {
			_, werr := f.WriteAt(b[:n], off)
			err = errors.Join(err, werr)
		}
		return err
	}
	n, err = f.WriteAt(b, off)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}

// allocate sets blocks aside. What follows writes them all, so that none is
// left to be converted later; where the file system cannot allocate, that alone
// must do.
func allocate(f *os.File, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, n)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err == nil, errors.Is(err, unix.EOPNOTSUPP):
			return nil
		}
		return fmt.Errorf("allocate %d bytes: %w", n, err)
	}
}
