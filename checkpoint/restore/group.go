package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
)

// parentGroup returns the group that Config.CgroupParent names.
func parentGroup(parent string) (cgroup.Group, error) {
	root, err := cgroup.Root()
	if err != nil {
		return cgroup.Group{}, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	return cgroup.At(filepath.Join(root.Dir(), parent)), nil
}

// ownGroup makes the group of one process. Until filled is called, which can be
// done more than once, no Sweep takes it for one that is left over.
func ownGroup(c *Config) (_ cgroup.Group, filled func(), err error) {
	filled = func() {}
	parent, err := parentGroup(c.CgroupParent)
	if err != nil {
		return parent, filled, err
	}
	g := cgroup.At(filepath.Join(parent.Dir(), c.ID))
	// Again where a Sweep takes the empty parent away just now.
	for range 10 {
		if filled, err = makeGroup(parent, g); !errors.Is(err, fs.ErrNotExist) {
			break
		}
	}
	return g, filled, err
}

func makeGroup(parent, g cgroup.Group) (filled func(), err error) {
	filled = func() {}
	if err := os.MkdirAll(parent.Dir(), 0o755); err != nil {
		return filled, err
	}
	lock, err := lockGroup(parent, unix.LOCK_SH)
	if err != nil {
		return filled, err
	}
	if err := os.Mkdir(g.Dir(), 0o755); err != nil {
		lock.Close()
		if errors.Is(err, fs.ErrExist) {
			err = fmt.Errorf("a process of that id is being rebuilt or was: %w", err)
		}
		return filled, err
	}
	return func() { lock.Close() }, nil
}

// lockGroup keeps Prepare and Sweep apart, also those of other programs.
func lockGroup(g cgroup.Group, how int) (*os.File, error) {
	f, err := os.Open(g.Dir())
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			return f, nil
		}
		if err != unix.EINTR {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", g.Dir(), err)
		}
	}
}

// toldToFreeze reports whether the group was told to stand still, which it then
// does, or is about to.
func toldToFreeze(g cgroup.Group) (bool, error) {
	b, err := os.ReadFile(filepath.Join(g.Dir(), "cgroup.freeze"))
	return strings.TrimSpace(string(b)) == "1", err
}

// killAll ends everything in the group, which may be gone.
func killAll(g cgroup.Group) error {
	if err := g.Kill(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill what is in %s: %w", g.Dir(), err)
	}
	return nil
}

// parkedMark is an extended attribute of the cgroup of a process that was parked:
// whole, and nobody's tracee. What has none was only half built.
const parkedMark = "trusted.pageferry.parked"

// markParked sets parkedMark. A kernel without attributes of cgroups goes
// without.
func markParked(g cgroup.Group) error {
	if err := unix.Setxattr(g.Dir(), parkedMark, []byte{'1'}, 0); err != nil && err != unix.ENOTSUP {
		return fmt.Errorf("mark cgroup %s: %w", g.Dir(), err)
	}
	return nil
}

// wasParked reads parkedMark.
func wasParked(g cgroup.Group) (bool, error) {
	_, err := unix.Getxattr(g.Dir(), parkedMark, nil)
	switch err {
	case nil, unix.ENOTSUP:
		return true, nil
	case unix.ENODATA:
		return false, nil
	}
	return false, &fs.PathError{Op: "getxattr", Path: g.Dir(), Err: err}
}
