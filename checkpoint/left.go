package checkpoint

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// SweepLeft removes the child cgroups of processes that ended while no session
// had them. It goes through the whole cgroup tree, since nothing else says any
// more where such a process was.
func SweepLeft() error {
	root, err := cgroup.Root()
	if errors.Is(err, cgroup.ErrNoTree) {
		return nil
	} else if err != nil {
		return err
	}
	return sweepLeft(root.Dir())
}

func sweepLeft(top string) error {
	var errs []error
	err := filepath.WalkDir(top, func(dir string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed meanwhile
			return nil
		case err != nil:
			return err
		case !e.IsDir():
			return nil
		}
		pid, start, ok := LeftGroup(e.Name())
		if !ok || !ended(pid, start) {
			return nil
		}
		if err := removeLeft(dir); err != nil {
			errs = append(errs, err)
		}
		return fs.SkipDir
	})
	return errors.Join(append(errs, err)...)
}

// removeLeft leaves alone what a session has claimed or anything lives in: the
// number in its name may be one of another PID namespace.
func removeLeft(dir string) error {
	s := &Session{child: cgroup.At(dir), claim: -1}
	err := s.claimChild()
	if err == nil {
		err = os.Remove(dir)
		s.unclaim()
	}
	if errors.Is(err, ErrBusy) || errors.Is(err, unix.EBUSY) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ended reports whether the process is gone for certain.
func ended(pid int, start uint64) bool {
	st, err := proc.ReadStat(pid)
	if err != nil {
		return errors.Is(err, proc.ErrGone)
	}
	return st.StartTime != start || st.State == 'Z' || st.State == 'X'
}
