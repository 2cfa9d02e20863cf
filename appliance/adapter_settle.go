package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
}

// settlePeriod is how long the process is left alone where nothing could be settled.
const settlePeriod = 20 * time.Millisecond

// settle returns when nothing is left of them. What is still missing it waits for.
func (a *arrival) settle(ctx context.Context) error {
	if a.skeleton == nil || a.record.Trap != TrapFUSE {
		return nil
	}
	s := &settling{arrival: a}
	err := a.retry(ctx, func(p *pager.Client) (err error) {
		s.dev, s.ino, s.show, s.views, err = p.Shown(ctx)
		return err
	})
	if err != nil || s.dev == 0 {
		return err
	}
	for tries := 0; ; tries++ {
		left, err := s.round(ctx)
		if err != nil || !left {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(settlePeriod):
		}
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
	s.log.Debug("to be settled", "processes", pids, "of", all, "device", s.dev)
	for _, pid := range pids {
		if err := s.one(ctx, pid); err != nil && !errors.Is(err, checkpoint.ErrNoProcess) &&
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
	t, err := checkpoint.NewSettler(ss, checkpoint.SettleConfig{
		Dev: s.dev, Log: s.log,
		Backing: func(m proc.Mapping) checkpoint.Backing { return s.backing(ctx, pid, m) },
		Stopped: func(ctx context.Context, parts []checkpoint.SettlePart) (page.Set, error) {
			return s.unveil(ctx, pid, parts)
		},
		Kept: func(parts []checkpoint.SettlePart) { s.reveil(ctx, pid, parts) },
	})
	if err != nil {
		return err
	}
	rep, err := t.Settle(ctx, nil)
	s.log.Debug("settled", "pid", pid, "report", rep.String(), "err", err)
	for _, k := range rep.Skipped {
		s.log.Warn("a mapping cannot be settled", "pid", pid, "mapping", k.Range, "file", k.Name, "why", k.Why)
	}
	return errors.Join(err, t.Close())
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
		return checkpoint.Backing{Read: func(ctx context.Context, offset uint64, buf []byte) error {
			return s.retry(ctx, func(p *pager.Client) error { return p.Read(ctx, file, int64(offset), buf) })
		}}
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
