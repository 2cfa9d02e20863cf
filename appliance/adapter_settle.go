package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint"
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
	paths map[pathKey]string // where this host has the files, "" for nowhere
	files blocks
	lost  error // the source has ended before all of them were read
}

// aheadLimit is how long what a process writes is copied ahead of its settling: one that
// writes faster than that goes gets it piece by piece.
const aheadLimit = 3 * time.Second

var errAhead = errors.New("the process writes faster than it can be copied")

// settlePeriod is how long the process is left alone where nothing could be settled.
const settlePeriod = 20 * time.Millisecond

// settle returns when nothing is left of them. What is still missing it waits for.
func (a *arrival) settle(ctx context.Context) error {
	if a.skeleton == nil || a.record.Trap == TrapUFFD {
		return nil
	}
	s := &settling{arrival: a, paths: map[pathKey]string{}}
	s.files.fetch = s.read
	err := a.retry(ctx, func(p *pager.Client) (err error) {
		s.dev, s.ino, s.show, s.views, err = p.Shown(ctx)
		return err
	})
	if err != nil || s.dev == 0 {
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
	s.log.Debug("to be settled", "processes", pids, "of", all, "device", s.dev)
	// What others see of the image comes from the shadows of the process that arrived.
	if i := slices.Index(pids, s.record.PID); i >= 0 {
		pids = append(slices.Delete(pids, i, i+1), s.record.PID)
	}
	for _, pid := range pids {
		if err := s.one(ctx, pid); err != nil && !errors.Is(err, checkpoint.ErrNoProcess) && !errors.Is(err, errSeen) &&
			!errors.Is(err, checkpoint.ErrZombie) && !errors.Is(err, proc.ErrGone) {
			return true, err
		}
	}
	return len(pids) > 0, nil
}

// one settles one process, as far as that can be done now.
func (s *settling) one(ctx context.Context, pid int) (err error) {
	ss, err := checkpoint.Open(pid, checkpoint.Options{Log: s.log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ss.Close()) }()
	told, began := false, time.Now()
	t, err := checkpoint.NewSettler(ss, checkpoint.SettleConfig{
		Dev: s.dev, Log: s.log,
		Backing: func(m proc.Mapping) checkpoint.Backing { return s.backing(ctx, pid, m) },
		Stopped: func(ctx context.Context, parts []checkpoint.SettlePart) (page.Set, error) {
			if told = false; pid == s.record.PID {
				if err := s.alone(pid); err != nil {
					return page.Set{}, err
				}
			}
			told = true
			return s.unveil(ctx, pid, parts)
		},
		Kept: func(parts []checkpoint.SettlePart) {
			if told {
				s.reveil(ctx, pid, parts)
			}
		},
		Early: func(ctx context.Context, parts []checkpoint.SettlePart) error {
			if time.Since(began) > aheadLimit {
				return errAhead
			}
			return s.overwrite(ctx, pid, parts)
		},
	})
	if err != nil {
		return err
	}
	rep, err := t.Settle(ctx, nil)
	s.log.Debug("settled", "pid", pid, "report", rep.String(), "err", err)
	if err == nil && len(rep.Skipped) > 0 && rep.Settled == 0 && rep.Later == 0 {
		// It depends on us until that helps, and on the source: people are to know.
		k := rep.Skipped[0]
		err = fmt.Errorf("%d mappings of process %d are still files of the source: mapping %v of %s: %w", len(rep.Skipped), pid, k.Range, k.Name, k.Why)
	}
	if left, e := t.Left(); err == nil && e == nil && len(left) == 0 {
		err = t.Release(ctx, s.shadows())
	}
	return errors.Join(err, t.Close())
}

// shadows are those of all views: where they have moved away, their places are mapped.
func (s *settling) shadows() (out []page.Range) {
	for _, v := range s.views {
		out = append(out, page.Range{Start: v.Shadow, End: v.Shadow + page.Addr(v.Range.Bytes())})
	}
	return out
}

// errSeen says that others still see the image.
var errSeen = errors.New("another process, which has to be settled first, sees the memory that it arrived with")

// alone fails with errSeen where others than process pid, which stands still, see the
// image: pages that they have not changed they have from its shadows. A child that it
// makes later sees no more of the image than it does itself.
func (s *settling) alone(pid int) error {
	all, err := s.processes()
	if err != nil {
		return err
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
func (s *settling) processes() (pids []int, err error) {
	err = filepath.WalkDir(s.skeleton.Cgroup(), func(name string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		case d.IsDir() || d.Name() != "cgroup.procs":
			return nil
		}
		b, err := os.ReadFile(name)
		for f := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil {
				pids = append(pids, pid)
			}
		}
		return err
	})
	return pids, err
}

// backing is checkpoint.SettleConfig.Backing.
func (s *settling) backing(ctx context.Context, pid int, m proc.Mapping) checkpoint.Backing {
	if file, ok := s.file(m); ok {
		return checkpoint.Backing{
			Path: s.path(ctx, pid, file),
			Read: func(ctx context.Context, offset uint64, buf []byte) error {
				return s.files.read(ctx, file, int64(offset), buf)
			},
		}
	}
	src := page.Range{Start: page.Addr(m.Offset), End: page.Addr(m.Offset + m.Bytes())}
	v, rel, ok := pager.FindView(s.views, src.Start)
	if ok {
		src.End = min(src.End, v.Range.End)
	} else {
		for _, w := range s.views {
			if w.Range.Start > src.Start {
				src.End = min(src.End, w.Range.Start)
				break
			}
		}
	}
	var missing, own page.Set
	err := s.retry(ctx, func(p *pager.Client) (err error) {
		missing, _, own, err = p.Veiled(ctx, src, pid, m.Range)
		return err
	})
	if err != nil {
		s.log.Warn("what is missing of veiled memory", "err", err)
		return checkpoint.Backing{Later: true}
	}
	end := m.Start + page.Addr(src.Bytes())
	if o := own.Intersect(page.Range{Start: m.Start, End: end}); len(o) > 0 && o[0].Start == m.Start {
		return checkpoint.Backing{Bytes: o[0].Bytes()}
	} else if len(o) > 0 {
		end = o[0].Start
		src.End = src.Start + (end - m.Start)
	}
	if !ok {
		return checkpoint.Backing{Bytes: src.Bytes()}
	}
	if rs := missing.Intersect(src); len(rs) > 0 && rs[0].Start == src.Start {
		return checkpoint.Backing{Later: true, Bytes: rs[0].Bytes()}
	} else if len(rs) > 0 {
		src.End = rs[0].Start
	}
	return checkpoint.Backing{Shadow: v.Shadow + rel, Bytes: src.Bytes()}
}

// file is the number of the file that m maps, if it is no view.
func (s *settling) file(m proc.Mapping) (i int, ok bool) {
	i, err := strconv.Atoi(filepath.Base(m.Name))
	return i, err == nil && i < len(s.show.Files)
}

// parts are those of p that are veiled memory, as the pager knows them.
func (s *settling) parts(p []checkpoint.SettlePart) (out []pager.Unveiling) {
	for _, p := range p {
		if p.Ino != s.ino {
			continue
		}
		u := pager.Unveiling{At: p.Range, Src: page.Range{Start: page.Addr(p.Offset), End: page.Addr(p.Offset + p.Bytes())}}
		if v, rel, ok := pager.FindView(s.views, u.Src.Start); ok && v.Shadow+rel == p.Shadow {
			u.Shadow = p.Shadow
		}
		out = append(out, u)
	}
	return out
}

// unveil is checkpoint.SettleConfig.Stopped.
func (s *settling) unveil(ctx context.Context, pid int, parts []checkpoint.SettlePart) (out page.Set, err error) {
	us := s.parts(parts)
	if len(us) == 0 {
		return out, nil
	}
	var gone page.Set
	err = s.retry(ctx, func(p *pager.Client) (err error) {
		gone, err = p.Unveil(ctx, pid, us)
		return err
	})
	if err != nil {
		return out, fmt.Errorf("what the program has given up: %w", err)
	}
	for _, u := range us {
		for _, r := range gone.Intersect(u.Src) {
			if u.Shadow != 0 {
				start := u.Shadow + (r.Start - u.Src.Start)
				out.Add(page.Range{Start: start, End: start + page.Addr(r.Bytes())})
			}
		}
	}
	return out, nil
}

// reveil is checkpoint.SettleConfig.Kept.
func (s *settling) reveil(ctx context.Context, pid int, parts []checkpoint.SettlePart) {
	us := s.parts(parts)
	if len(us) == 0 {
		return
	}
	if err := s.retry(ctx, func(p *pager.Client) error { return p.Reveil(ctx, pid, us) }); err != nil {
		s.log.Error("what the program gives up of veiled memory is not followed", "pid", pid, "err", err)
	}
}
