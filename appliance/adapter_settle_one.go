package appliance

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// aheadLimit is how long what a process writes is copied ahead of its settling: one that
// writes faster than that goes gets it piece by piece.
const aheadLimit = 3 * time.Second

var errAhead = errors.New("the process writes faster than it can be copied")

// settler settles one process, as often as it is asked to.
type settler struct {
	*checkpoint.Settler
	session *checkpoint.Session
	known   pager.Veiled // as of this round
	began   time.Time    // this round
	told    bool         // the pager, of this stop
}

func (o *settler) close() (err error) {
	if o.Settler != nil {
		err = o.Settler.Close()
	}
	if o.session != nil {
		err = errors.Join(err, o.session.Close())
	}
	*o = settler{}
	return err
}

// one settles one process, as far as that can be done now.
func (s *settling) one(ctx context.Context, pid int) (err error) {
	o := new(settler)
	keep := pid == s.record.PID
	if keep {
		o = &s.own
	}
	defer func() {
		if !keep || err != nil {
			err = errors.Join(err, o.close())
		}
	}()
	if o.Settler == nil {
		if err := s.open(ctx, o, pid); err != nil {
			return err
		}
	}
	if err := s.know(ctx, o, pid); err != nil {
		return fmt.Errorf("what is missing of veiled memory: %w", err)
	}
	o.began = time.Now()
	rep, err := o.Settle(ctx, nil)
	s.log.Debug("settled", "pid", pid, "report", rep.String(), "err", err)
	if err == nil && len(rep.Skipped) > 0 && rep.Settled == 0 && rep.Later == 0 {
		// It depends on us until that helps, and on the source: people are to know.
		k := rep.Skipped[0]
		err = fmt.Errorf("%d mappings of process %d are still files of the source: mapping %v of %s: %w", len(rep.Skipped), pid, k.Range, k.Name, k.Why)
	}
	if left, e := o.Left(); err == nil && e == nil && len(left) == 0 {
		keep = false
		err = o.Release(ctx, s.shadows())
	}
	return err
}

// know asks the pager.
func (s *settling) know(ctx context.Context, o *settler, pid int) error {
	grain := uint64(0)
	if s.along {
		grain = alongGrain
	}
	has := len(s.views) > 0 && s.has.Empty()
	err := s.retry(ctx, func(p *pager.Client) (err error) {
		o.known, err = p.Veiled(ctx, pid, grain, has)
		return err
	})
	if err == nil && has {
		s.has = o.known.Has
	}
	return err
}

// open makes a Settler of process pid.
func (s *settling) open(ctx context.Context, o *settler, pid int) (err error) {
	if o.session, err = checkpoint.Open(pid, checkpoint.Options{Log: s.log}); err != nil {
		return err
	}
	cfg := checkpoint.SettleConfig{
		Dev: s.dev, Log: s.log,
		Backing: func(m proc.Mapping) checkpoint.Backing { return s.backing(ctx, o, pid, m) },
		Stopped: func(ctx context.Context, parts []checkpoint.SettlePart) (page.Set, error) {
			o.told = false
			if err := s.alone(pid); err != nil {
				return page.Set{}, err
			}
			zero, err := s.unveil(ctx, pid, parts)
			o.told = !errors.Is(err, pager.ErrBusy)
			return zero, err
		},
		Certain: func(ctx context.Context, parts []checkpoint.SettlePart) error {
			us := s.parts(parts)
			if len(us) == 0 {
				return nil
			}
			return s.retry(ctx, func(p *pager.Client) error { return p.Certain(ctx, pid, us) })
		},
		Kept: func(parts []checkpoint.SettlePart) {
			if o.told {
				s.reveil(context.WithoutCancel(ctx), pid, parts) // it runs on with what it had
			}
		},
		Early: func(ctx context.Context, parts []checkpoint.SettlePart) error {
			if time.Since(o.began) > aheadLimit {
				return errAhead
			}
			return s.overwrite(ctx, pid, parts)
		},
		Replaced: func(parts []checkpoint.SettlePart) { s.replaced(ctx, pid, parts) },
	}
	if s.along {
		// Threads wait for pages all the time, and one that does cannot stop.
		cfg.Patience, cfg.Tries = 20*time.Millisecond, 5
	}
	o.Settler, err = checkpoint.NewSettler(o.session, cfg)
	return err
}

// shadows are those of all views: where they have moved away, their places are mapped.
func (s *settling) shadows() (out []page.Range) {
	for _, v := range s.views {
		out = append(out, page.Range{Start: v.Shadow, End: v.Shadow + page.Addr(v.Range.Bytes())})
	}
	return out
}

// backing is checkpoint.SettleConfig.Backing.
func (s *settling) backing(ctx context.Context, o *settler, pid int, m proc.Mapping) checkpoint.Backing {
	if file, ok := s.file(m); ok && s.along {
		return checkpoint.Backing{Later: true}
	} else if ok {
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
	end := m.Start + page.Addr(src.Bytes())
	if own := o.known.Own.Intersect(page.Range{Start: m.Start, End: end}); len(own) > 0 && own[0].Start == m.Start {
		return checkpoint.Backing{Bytes: own[0].Bytes()}
	} else if len(own) > 0 {
		end = own[0].Start
		src.End = src.Start + (end - m.Start)
	}
	if !ok {
		return checkpoint.Backing{Bytes: src.Bytes()}
	}
	if rs := o.known.Missing.Intersect(src); len(rs) > 0 && rs[0].Start == src.Start {
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
func (s *settling) unveil(ctx context.Context, pid int, parts []checkpoint.SettlePart) (zero page.Set, err error) {
	us := s.parts(parts)
	if len(us) == 0 {
		return zero, nil
	}
	var gone page.Set
	err = s.retry(ctx, func(p *pager.Client) (err error) {
		gone, err = p.Unveil(ctx, pid, us)
		return err
	})
	if err != nil {
		return zero, fmt.Errorf("what the program has given up: %w", err)
	}
	var all []page.Range
	for _, u := range us {
		if u.Shadow == 0 {
			continue
		}
		for _, r := range append(gone.Intersect(u.Src), s.has.Gaps(u.Src)...) {
			start := u.Shadow + (r.Start - u.Src.Start)
			all = append(all, page.Range{Start: start, End: start + page.Addr(r.Bytes())})
		}
	}
	return page.NewSet(all...), nil
}

// replaced is checkpoint.SettleConfig.Replaced.
func (s *settling) replaced(ctx context.Context, pid int, parts []checkpoint.SettlePart) {
	if pid != s.record.PID {
		return // the page cache is that of all
	}
	src := emptied(s.parts(parts))
	if len(src) == 0 {
		return
	}
	if err := s.retry(ctx, func(p *pager.Client) error { return p.Replaced(ctx, src) }); err != nil {
		s.log.Debug("the page cache keeps memory that is not needed", "err", err)
	}
}

// emptied are the addresses of the source whose shadows are empty when us have been
// replaced. Not where a mapping has grown over what another shows still: that shadow has
// stayed.
func emptied(us []pager.Unveiling) (src []page.Range) {
	for _, u := range us {
		if u.Shadow != 0 {
			src = append(src, u.Src)
		}
	}
	return src
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
