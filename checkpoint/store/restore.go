package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// RestoreOptions is how a process is made of a checkpoint.
type RestoreOptions struct {
	// PIDNamespace is "auto" (the default), "host" or "new"; see restore.Config.
	PIDNamespace string
	// ID names the process's cgroup; it must be unique on this host.
	ID string
	// Trap serves the memory of a lazy restore. Nil puts every page in place
	// before the process runs.
	Trap restore.Trap
	Log  *slog.Logger // nil discards
}

// Restore makes a running process of c and returns its pid. On error nothing is
// left of it.
func Restore(ctx context.Context, c *Checkpoint, opt RestoreOptions) (pid int, err error) {
	trap := opt.Trap
	if trap == nil {
		trap = &placer{c: c}
	}
	sk, err := restore.Prepare(ctx, restore.Config{
		PIDNamespace: opt.PIDNamespace, ID: opt.ID, Log: opt.Log,
		PID: c.Image.Processes[c.Image.Root].PID,
	})
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, sk.Abort(context.WithoutCancel(ctx)))
		}
	}()
	if err := sk.Rebuild(ctx, c.Image, c.Memory, trap); err != nil {
		return 0, err
	}
	if err := sk.Park(ctx); err != nil {
		return 0, err
	}
	if err := sk.Release(ctx); err != nil {
		return 0, err
	}
	return sk.PID(), nil
}

// placer is the trap of an eager restore: it fills the memory as soon as it is
// registered, so nothing ever faults.
type placer struct {
	c     *Checkpoint
	files []*os.File
}

func (p *placer) close() {
	for _, f := range p.files {
		f.Close()
	}
	p.files = nil
}

// WaitEager has nothing to wait for: Adopt filled everything.
func (p *placer) WaitEager(context.Context) error { return nil }

// Adopt fills every page of the space that the checkpoint has content for. What
// is missing then is zero: with the userfaultfd closed the kernel says so, and
// nothing that touches such a page on the way waits for somebody who is not there.
func (p *placer) Adopt(_ context.Context, a restore.Adoption) error {
	p.files = append(p.files, a.UFFD, a.Mem)
	defer p.close()
	return p.c.each(func(e Extent) bool { return e.Space == a.Space }, func(at Extent, data []byte) error {
		// The restore may have left pages out (droppable mappings), and what
		// lies side by side in the file may not do so in memory.
		part := func(r page.Range) []byte { return data[r.Start-at.Start : r.End-at.Start] }
		for _, r := range a.Memory.Lazy.Intersect(at.Range) {
			if err := place(a, r, part(r)); err != nil {
				return err
			}
		}
		for _, r := range a.Memory.Eager.Intersect(at.Range) {
			// A write to a trapped page would wait for somebody to fill it.
			if trapped(a.Regions, r.Start) {
				if err := place(a, r, part(r)); err != nil {
					return err
				}
				continue
			}
			if _, err := a.Mem.WriteAt(part(r), int64(r.Start)); err != nil {
				return fmt.Errorf("store: write %v of process %d: %w", r, a.PID, err)
			}
		}
		return nil
	})
}

// trapped reports whether the mapping at a, which a range of eager pages does not
// leave, is registered with the userfaultfd.
func trapped(rs []restore.Region, a page.Addr) bool {
	i := sort.Search(len(rs), func(i int) bool { return rs[i].End > a })
	return i < len(rs) && rs[i].Start <= a && rs[i].Kind == restore.RegionUFFD
}

// within is how many of n bytes from start lie in one mapping: UFFDIO_COPY does
// not go from one into the next.
func within(rs []restore.Region, start page.Addr, n int) int {
	i := sort.Search(len(rs), func(i int) bool { return rs[i].End > start })
	if i == len(rs) || rs[i].Start > start {
		return n
	}
	return int(min(uint64(n), uint64(rs[i].End-start)))
}

func place(a restore.Adoption, at page.Range, data []byte) error {
	for len(data) > 0 {
		n, err := sys.UffdCopy(int(a.UFFD.Fd()), uint64(at.Start), data[:within(a.Regions, at.Start, len(data))], 0)
		if n > 0 {
			data, at.Start = data[n:], at.Start+page.Addr(n)
			continue
		}
		if err != nil && !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("store: fill %v of process %d: %w", at, a.PID, err)
		}
	}
	return nil
}
