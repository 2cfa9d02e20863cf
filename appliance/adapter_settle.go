package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// settling makes ordinary memory of what the process, and what it has forked, have
// mapped from the files that the pager shows.
type settling struct {
	*arrival
	dev   uint64
	ino   uint64 // of the image
	show  pager.Show
	views []pager.View
	paths map[pathKey]string // where this host has the files, "" if it has not
	files blocks
	lost  error // the source has ended before all of them were read

	along bool     // pages still arrive
	has   page.Set // that the source has
	// The process that arrived is settled in many rounds.
	own settler
}

// settlePeriod is how long the process is left alone where nothing could be settled, and
// while its pages arrive after each round; settlePause is the longest, where the rounds
// come to nothing.
const (
	settlePeriod = 20 * time.Millisecond
	alongPeriod  = 50 * time.Millisecond
	settlePause  = 2 * time.Second
)

// alongGrain is in what blocks it is asked what is missing while pages arrive.
const alongGrain = 1 << 20

// settle returns when no page is missing and nothing is left of the pager's files in the
// process. What arrived tells, the end of the arrival, is not waited for longer than ctx
// allows. Memory that is shown by the image is settled while pages arrive, where it is
// complete: it would be here twice and more, as what has arrived, what the program has
// seen of it and what it has changed. Files are settled afterwards, which takes nothing
// away from the arrival.
func (a *arrival) settle(ctx context.Context, arrived <-chan error) (err error) {
	s := &settling{arrival: a, paths: map[pathKey]string{}}
	s.files.fetch = s.read
	defer func() { err = errors.Join(err, s.own.close()) }()
	if a.skeleton != nil && a.record.Trap == TrapFUSE {
		if err := s.learn(ctx); err != nil {
			a.log.Debug("it is settled when all pages are here", "err", err)
		} else if len(s.views) > 0 {
			arrived = s.settleAlong(ctx, arrived)
		}
	}
	select {
	case err := <-arrived:
		if err != nil && !errors.Is(err, pager.ErrLost) {
			return err
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if a.skeleton == nil || a.record.Trap == TrapUFFD {
		return nil
	}
	if err := s.learn(ctx); err != nil || s.dev == 0 {
		return err
	}
	for !a.gone() {
		left, err := s.round(ctx)
		if s.lost != nil {
			a.filesGone(s.lost)
			return nil
		}
		if err != nil || !left {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(settlePeriod):
		}
	}
	return nil
}

// learn asks what is shown.
func (s *settling) learn(ctx context.Context) error {
	return s.retry(ctx, func(p *pager.Client) (err error) {
		s.dev, s.ino, s.show, s.views, err = p.Shown(ctx)
		return err
	})
}

// settleAlong settles what is complete until arrived tells, and returns a channel that
// tells the same. Whatever fails meanwhile is tried again, at the latest then.
func (s *settling) settleAlong(ctx context.Context, arrived <-chan error) <-chan error {
	s.along = true
	defer func() {
		s.along = false
		if err := s.own.close(); err != nil {
			s.log.Warn("what settling has left in the process", "err", err)
		}
	}()
	for pause := alongPeriod; ; {
		select {
		case err := <-arrived:
			again := make(chan error, 1)
			again <- err
			return again
		case <-ctx.Done():
			return arrived
		case <-time.After(pause):
		}
		began := time.Now()
		if _, err := s.round(ctx); err != nil {
			// Its threads may be waiting for pages, and all stand still until one cannot.
			s.log.Debug("settling while pages arrive", "err", err)
			pause = min(2*pause, settlePause)
			continue
		}
		pause = max(alongPeriod, time.Since(began)/2)
	}
}

// round settles what can be now, and reports whether something is left.
func (s *settling) round(ctx context.Context) (left bool, err error) {
	all, err := s.processes()
	if err != nil {
		return false, err
	}
	pids, err := checkpoint.MappedBy(s.dev, all)
	if err != nil {
		return false, err
	}
	s.log.Debug("to be settled", "processes", pids, "of", all, "device", s.dev, "along", s.along)
	// What others see of the image comes from the shadows of the process that arrived.
	if i := slices.Index(pids, s.record.PID); i >= 0 {
		pids = append(slices.Delete(pids, i, i+1), s.record.PID)
	}
	spaces := proc.AddressSpaces(all)
	for _, pid := range pids {
		if shared(spaces, pid) {
			continue
		}
		if err := s.one(ctx, pid); err != nil && !errors.Is(err, checkpoint.ErrNoProcess) && !errors.Is(err, errSeen) && !errors.Is(err, pager.ErrBusy) &&
			!errors.Is(err, checkpoint.ErrZombie) && !errors.Is(err, proc.ErrGone) {
			return true, err
		}
	}
	return len(pids) > 0, nil
}

// shared reports whether others have the same memory as process pid, by vfork(2) or clone(2)
// with CLONE_VM. To stop one of them does not stop the others, which go on writing.
func shared(spaces [][]int, pid int) bool {
	return slices.ContainsFunc(spaces, func(g []int) bool { return len(g) > 1 && slices.Contains(g, pid) })
}

// errSeen says that others still see the image.
var errSeen = errors.New("another process, which has to be settled first, sees the memory that it arrived with")

// alone fails with errSeen where others have the memory of process pid, which stands still,
// or, if it is the one that arrived, see the image: pages that they have not changed they
// have from its shadows. A child that it makes later sees no more of the image than it
// does itself.
func (s *settling) alone(pid int) error {
	all, err := s.processes()
	if err != nil {
		return err
	}
	if shared(proc.AddressSpaces(all), pid) {
		return fmt.Errorf("%w (another has the memory of %d)", errSeen, pid)
	}
	if pid != s.record.PID {
		return nil
	}
	others := slices.DeleteFunc(all, func(p int) bool { return p == pid })
	if len(others) == 0 {
		return nil
	}
	if others, err = checkpoint.MappedBy(s.dev, others); err == nil && len(others) > 0 {
		err = fmt.Errorf("%w (%v)", errSeen, others)
	}
	return err
}

// overwrite is checkpoint.SettleConfig.Early.
func (s *settling) overwrite(ctx context.Context, pid int, parts []checkpoint.SettlePart) error {
	if err := s.alone(pid); err != nil {
		return err
	}
	return s.retry(ctx, func(p *pager.Client) error { return p.Overwrite(ctx, pid, s.parts(parts)) })
}

// processes are all in the process's cgroup, and below it.
func (s *settling) processes() ([]int, error) { return cgroup.At(s.skeleton.Cgroup()).AllProcs() }
