package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

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

// ownGroup makes the group of one process.
func ownGroup(c *Config) (cgroup.Group, error) {
	parent, err := parentGroup(c.CgroupParent)
	if err != nil {
		return parent, err
	}
	if err := os.MkdirAll(parent.Dir(), 0o755); err != nil {
		return parent, err
	}
	g := cgroup.At(filepath.Join(parent.Dir(), c.ID))
	if err := os.Mkdir(g.Dir(), 0o755); err != nil {
		return g, fmt.Errorf("a process of that id is being rebuilt or was: %w", err)
	}
	return g, nil
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
