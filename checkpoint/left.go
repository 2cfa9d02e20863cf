package checkpoint

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/proc"
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
		// EBUSY while anything is in it.
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		return fs.SkipDir
	})
	return errors.Join(append(errs, err)...)
}

// ended reports whether the process is gone for certain.
func ended(pid int, start uint64) bool {
	st, err := proc.ReadStat(pid)
	if err != nil {
		return errors.Is(err, proc.ErrGone)
	}
	return st.StartTime != start || st.State == 'Z' || st.State == 'X'
}
