package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/checkpoint/store"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// RestoreOptions is how a process is made of a checkpoint, without a daemon.
type RestoreOptions struct {
	Dir          string // the checkpoint's
	PIDNamespace string // auto (default), host or new
	// Lazy lets it run at once: a pager serves its memory from Dir, and ends
	// when all of it was read.
	Lazy bool
	// RunDir holds the pager's socket. Default /run/pageferry.
	RunDir string
	Logger *slog.Logger // nil discards
}

// LazyTail is the command that a lazy restore leaves behind to see the pager to
// its end; its arguments are for FinishLazy.
const LazyTail = "restore-tail"

// Restore makes a running process and returns its pid. On error nothing is left.
func Restore(ctx context.Context, opts RestoreOptions) (pid int, err error) {
	c, err := store.Open(opts.Dir)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	id, err := newMigrationID()
	if err != nil {
		return 0, err
	}
	so := store.RestoreOptions{PIDNamespace: opts.PIDNamespace, ID: id.String(), Log: opts.Logger}
	if !opts.Lazy {
		if pid, err = store.Restore(ctx, c, so); err != nil {
			return 0, err
		}
		return pid, disband(ctx, so.ID)
	}
	if opts.RunDir == "" {
		opts.RunDir = "/run/pageferry"
	}
	t, err := startLazy(ctx, filepath.Join(opts.RunDir, "restores", id.String()), id, c)
	if err != nil {
		return 0, err
	}
	so.Trap = t
	if pid, err = store.Restore(ctx, c, so); err != nil {
		return 0, errors.Join(err, t.abort(context.WithoutCancel(ctx)))
	}
	// From here the process depends on the pager, which lives without us.
	if err := t.client.Close(); err != nil {
		return pid, err
	}
	return pid, t.leave()
}

// lazy is the trap of a lazy restore: a pager that reads from the checkpoint.
type lazy struct {
	client *pager.Client
	cfg    pager.Config
}

func startLazy(ctx context.Context, dir string, id transport.MigrationID, c *store.Checkpoint) (_ *lazy, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	t := &lazy{cfg: pager.Config{ID: id, Dir: dir}}
	if t.client, err = pager.Start(ctx, t.cfg); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	spaces := map[page.Space][]pager.FileRange{}
	for _, e := range c.Index {
		spaces[e.Space] = append(spaces[e.Space], pager.FileRange{Range: e.Range, Offset: e.Offset})
	}
	for space, index := range spaces {
		slices.SortFunc(index, func(a, b pager.FileRange) int { return cmp.Compare(a.Range.Start, b.Range.Start) })
		if err := t.client.AttachFile(ctx, pager.PageFile{File: c.Pages, Space: space, Index: index, Sums: c.Sums}); err != nil {
			return nil, errors.Join(err, t.abort(context.WithoutCancel(ctx)))
		}
	}
	return t, nil
}

// Adopt implements restore.Trap.
func (t *lazy) Adopt(ctx context.Context, a restore.Adoption) error {
	defer a.Close()
	if err := t.client.Adopt(ctx, pagerAdoption(a)); err != nil {
		return err
	}
	return t.client.Fetch(ctx)
}

// pagerAdoption says the same to the pager.
func pagerAdoption(a restore.Adoption) pager.Adoption {
	pa := pager.Adoption{Space: a.Space, PID: a.PID, UFFD: a.UFFD, Mem: a.Mem,
		Lazy: a.Memory.Lazy, Eager: a.Memory.Eager, Hot: a.Memory.Hot, Veil: a.Veil, Kept: a.Kept}
	for _, r := range a.Regions {
		kind := pager.Trapped
		if r.Kind == restore.RegionWrite {
			kind = pager.Written
		}
		pa.Regions = append(pa.Regions, pager.Region{Range: r.Range, Kind: kind, Shared: r.Shared, Shadow: r.Shadow, File: r.File, Offset: r.Offset})
	}
	for _, v := range a.Views {
		pa.Views = append(pa.Views, pager.View{Range: v.Range, Shadow: v.Shadow})
	}
	return pa
}

// WaitEager implements restore.Trap.
func (t *lazy) WaitEager(ctx context.Context) error { return t.client.WaitEager(ctx) }

func (t *lazy) abort(ctx context.Context) error {
	return errors.Join(t.client.Abort(ctx), os.RemoveAll(t.cfg.Dir))
}

// leave starts the process that sees the pager to its end.
func (t *lazy) leave() error {
	cmd := exec.Command("/proc/self/exe", LazyTail, t.cfg.Dir, t.cfg.ID.String())
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("the process runs and its pages arrive, but %s stays: %w", t.cfg.Dir, err)
	}
	go func() { _ = cmd.Wait() }() // for a caller that lives longer than it
	return nil
}

// FinishLazy waits until the pager of a lazy restore has brought every page,
// and removes what is left of it.
func FinishLazy(ctx context.Context, dir, id string) error {
	mid, err := transport.ParseMigrationID(id)
	if err != nil {
		return &UsageError{Msg: fmt.Sprintf("%q is no id", id)}
	}
	cfg := pager.Config{Dir: dir, ID: mid}
	err = seeOff(ctx, cfg)
	if err != nil && !errors.Is(err, pager.ErrGone) && !errors.Is(err, pager.ErrLost) {
		return err
	}
	err = errors.Join(err, disband(ctx, id), os.RemoveAll(dir))
	_ = os.Remove(filepath.Dir(dir)) // stays while there are others
	return err
}

// seeOff waits until a pager has every page in place, and lets it end.
func seeOff(ctx context.Context, cfg pager.Config) error {
	c, err := pager.Connect(ctx, cfg)
	if err != nil {
		return err
	}
	defer c.Close()
	err = c.WaitResident(ctx)
	if err != nil && !errors.Is(err, pager.ErrLost) {
		return err
	}
	if ferr := c.Finish(ctx); ferr != nil && !errors.Is(ferr, pager.ErrGone) {
		return errors.Join(err, ferr)
	}
	return err
}

// disband takes a process out of the cgroup that was made to rebuild it, into that
// of whoever restored it: there is no daemon that would remove it at its end.
func disband(ctx context.Context, id string) error {
	if err := restore.Disband(ctx, restore.Config{ID: id}); err != nil {
		return fmt.Errorf("the process runs, but stays in a cgroup of its own: %w", err)
	}
	return nil
}
