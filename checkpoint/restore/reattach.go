package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
)

// Reattach finds what an earlier daemon left of the skeleton of cfg.ID: parked,
// if its cgroup is frozen, or released. ErrNoSkeleton if there is none; what was
// only half built died with the daemon, and its cgroup is removed.
func Reattach(ctx context.Context, cfg Config) (*Skeleton, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.ensureDefaults()
	parent, err := parentGroup(cfg.CgroupParent)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	s := &Skeleton{cfg: cfg, group: cgroup.At(filepath.Join(parent.Dir(), cfg.ID)), state: released}
	frozen, err := toldToFreeze(s.group)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("restore: reattach %s: %w", cfg.ID, ErrNoSkeleton)
	} else if err != nil {
		return nil, fmt.Errorf("restore: reattach %s: %w", cfg.ID, err)
	}
	if frozen {
		s.state = parked
	}
	whole, err := wasParked(s.group)
	if err != nil {
		return nil, fmt.Errorf("restore: reattach %s: %w", cfg.ID, err)
	}
	if !whole {
		return nil, s.discard(ctx)
	}
	// A tracer's death ends its tracees in a moment, not at once.
	for wait := time.Millisecond; ; wait *= 2 {
		dying, err := s.find()
		if err != nil {
			return nil, fmt.Errorf("restore: reattach %s: %w", cfg.ID, err)
		}
		if !dying || wait > time.Second {
			break
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait):
		}
	}
	if s.pid == 0 {
		return nil, s.discard(ctx)
	}
	return s, nil
}

// discard removes what is of no use, and says that there was nothing else.
func (s *Skeleton) discard(ctx context.Context) error {
	err := errors.Join(killAll(s.group), s.group.Remove(ctx))
	return errors.Join(fmt.Errorf("restore: reattach %s: %w", s.cfg.ID, ErrNoSkeleton), err)
}

// find looks for the process in its cgroup and reports whether something there
// is just ending. A process that was released may have children: it is the one
// with the pid of the Config, or the oldest that is none of ours.
func (s *Skeleton) find() (dying bool, err error) {
	pids, err := s.group.Procs()
	if err != nil {
		return false, err
	}
	slices.Sort(pids)
	s.pid = 0
	for _, pid := range pids {
		st, err := proc.ReadStatus(pid)
		if errors.Is(err, proc.ErrGone) {
			dying = true
			continue
		} else if err != nil {
			return false, err
		}
		if (st.SigPending|st.SharedPending)&sys.SigBit(int(unix.SIGKILL)) != 0 || st.State == 'Z' || st.State == 'X' {
			dying = true
			continue
		}
		wanted := s.cfg.PID != 0 && len(st.NSPID) > 0 && st.NSPID[len(st.NSPID)-1] == s.cfg.PID
		if st.Name != initName && st.Name != shortSeedName && (s.pid == 0 || wanted) {
			s.pid = pid
		}
	}
	return dying, nil
}

// shortSeedName is seedName as far as the kernel keeps it.
const shortSeedName = "pageferry-seed"

// Sweep removes the cgroups of processes that have ended. It is cheap; call it
// now and then. While a Prepare of the same parent makes a group, it does nothing.
func Sweep(cfg Config) error {
	cfg.ensureDefaults()
	parent, err := parentGroup(cfg.CgroupParent)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	es, err := os.ReadDir(parent.Dir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	lock, err := lockGroup(parent, unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) || errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	defer lock.Close()
	for _, e := range es {
		if !e.IsDir() {
			continue
		}
		// Refused with EBUSY while there is a process in it.
		_ = os.Remove(filepath.Join(parent.Dir(), e.Name()))
	}
	_ = os.Remove(parent.Dir()) // not while there are others
	return nil
}

// Disband moves what runs in the group of a process that was released into the
// caller's own, and removes the group: for a process that nobody watches over. No
// Reattach finds it then.
func Disband(ctx context.Context, cfg Config) error {
	cfg.ensureDefaults()
	parent, err := parentGroup(cfg.CgroupParent)
	if err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	own, err := cgroup.Of(os.Getpid())
	if err != nil {
		return fmt.Errorf("restore: disband %s: %w", cfg.ID, err)
	}
	g := cgroup.At(filepath.Join(parent.Dir(), cfg.ID))
	for { // it may fork meanwhile
		pids, err := g.Procs()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("restore: disband %s: %w", cfg.ID, err)
		}
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			if err := own.Move(pid); err != nil && !errors.Is(err, proc.ErrGone) {
				return fmt.Errorf("restore: disband %s: %w", cfg.ID, err)
			}
		}
	}
	if err := g.Remove(ctx); err != nil {
		return fmt.Errorf("restore: disband %s: %w", cfg.ID, err)
	}
	_ = os.Remove(parent.Dir()) // not while there are others
	return nil
}
