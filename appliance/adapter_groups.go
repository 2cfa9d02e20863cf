package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// pagerGroups is where pagers and keepers are, below the root of the v2 tree:
// not in the daemon's cgroup, whose end would be theirs, nor beside the processes
// that they serve, whose groups are killed as a whole.
const pagerGroups = "pageferry-pagers"

// groupLimit is how long a cgroup may stay busy after its processes have ended.
const groupLimit = 5 * time.Second

func groupsOf(id transport.MigrationID) (top, of string, err error) {
	root, err := cgroup.Root()
	if err != nil {
		return "", "", err
	}
	top = filepath.Join(root.Dir(), pagerGroups)
	return top, filepath.Join(top, id.String()), nil
}

// makePagerGroups makes the cgroups of the pager and its keeper, where they are
// not there.
func (a *arrival) makePagerGroups() error {
	_, dir, err := groupsOf(a.id)
	if err != nil {
		return err
	}
	pager, keeper := filepath.Join(dir, "pager"), filepath.Join(dir, "keeper")
	for _, d := range []string{pager, keeper} {
		// Again where the end of another arrival takes the top away just now.
		for range 10 {
			if err = os.MkdirAll(d, 0o755); !errors.Is(err, fs.ErrNotExist) {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("cgroup of the pager: %w", err)
		}
	}
	a.pagerGroup, a.keeperGroup = pager, keeper
	return nil
}

// removePagerGroups removes them when both have ended. What is left there is the keeper
// of a pager that was killed before it could say which that is.
func removePagerGroups(ctx context.Context, id transport.MigrationID) error {
	ctx, cancel := context.WithTimeout(ctx, groupLimit)
	defer cancel()
	top, dir, err := groupsOf(id)
	if err != nil {
		return nil // there are none
	}
	for _, d := range []string{filepath.Join(dir, "pager"), filepath.Join(dir, "keeper"), dir} {
		if g := cgroup.At(d); g.Exists() {
			err = errors.Join(err, g.Kill(), g.Remove(ctx))
		}
	}
	_ = unix.Rmdir(top) // not while there are others
	return err
}

// clearGroups is that where nothing depends on it.
func (a *arrival) clearGroups(ctx context.Context) {
	if err := removePagerGroups(ctx, a.id); err != nil {
		a.log.Warn("cgroups of a pager that has ended", "err", err)
	}
}
