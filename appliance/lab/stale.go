package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
)

const cgroupPrefix = "pageferry-lab-"

// claim makes the lab's directory and takes its lock, which says for as long as
// this process lives that the lab is in use. baseLock orders it against
// removeStale: a directory without a holder is stale.
func (l *Lab) claim() error {
	unlock, err := baseLock()
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	defer unlock()
	dir := filepath.Join(baseDir, l.cfg.Name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("lab %s: %w", l.cfg.Name, err)
	}
	f, err := tryLock(filepath.Join(dir, "lock"))
	if err != nil {
		_ = os.RemoveAll(dir)
		return fmt.Errorf("lab %s: %w", l.cfg.Name, err)
	}
	l.dir, l.lock = dir, f
	return nil
}

// baseLock keeps two programs from making and cleaning labs at one time. The
// lock is on the directory itself, which may be removed by whoever held it
// before: then it is taken anew.
func baseLock() (unlock func(), err error) {
	for {
		if err := os.MkdirAll(baseDir, 0o700); err != nil {
			return nil, err
		}
		d, err := os.Open(baseDir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
			d.Close()
			return nil, err
		}
		held, err1 := d.Stat()
		now, err2 := os.Stat(baseDir)
		if err1 == nil && err2 == nil && os.SameFile(held, now) {
			return func() { d.Close() }, nil
		}
		d.Close()
	}
}

func tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// removeStale removes what labs left whose program was killed. What cannot be
// removed is left for the next time: it is in nobody's way.
func removeStale() {
	unlock, err := baseLock()
	if err != nil {
		return
	}
	defer unlock()
	entries, err := os.ReadDir(baseDir)
	if err != nil {
		return
	}
	root, err := cgroup.Root()
	if err != nil {
		return
	}
	for _, e := range entries {
		dir := filepath.Join(baseDir, e.Name())
		f, err := tryLock(filepath.Join(dir, "lock"))
		if err != nil {
			continue // in use
		}
		if removeCgroups(filepath.Join(root.Dir(), cgroupPrefix+e.Name())) == nil {
			_ = os.RemoveAll(dir)
		}
		f.Close()
	}
}

// removeCgroups kills everything in a cgroup and below, and removes it. A
// cgroup that is not there is no error.
func removeCgroups(top string) error {
	if _, err := os.Stat(top); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// cgroup.kill reaches frozen processes too (cgroup-v2.rst).
	if err := os.WriteFile(filepath.Join(top, "cgroup.kill"), []byte("1"), 0); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	var dirs []string
	_ = filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs) // children first
	for _, d := range dirs {
		// The dead leave their cgroup when they are reaped, which is not ours
		// to wait for where their parent is an init that died with them.
		deadline := time.Now().Add(10 * time.Second)
		for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
			err := os.Remove(d)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return fmt.Errorf("lab: %w", err)
			}
			_ = os.WriteFile(filepath.Join(top, "cgroup.kill"), []byte("1"), 0)
			time.Sleep(wait)
		}
	}
	return nil
}
