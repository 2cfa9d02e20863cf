package checkpoint

import (
	"context"
	"errors"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// A mapping of many pages cannot be replaced by one mremap within a stop: the kernel
// unmaps what is in the way in the same call, 0.2 us a page. So it is moved aside first,
// which takes 0.2 ms for each GiB where tables of pages are moved as a whole, and is
// unmapped there, piece by piece, by the main thread alone: nobody else knows of it.

// costZap is what it takes to unmap a page.
const costZap = 220 * time.Nanosecond

// table is what one table of the lowest level covers.
const table = 2 << 20

// ours reports whether r is what we, or a dead settler, have put there.
func (t *Settler) ours(r page.Range) bool {
	for _, s := range []*page.Set{&t.asides, &t.old, &t.lost} {
		if s.BytesIn(r) > 0 {
			return true
		}
	}
	return false
}

// writeNote notes memory that is about to be mapped, along with what there is.
func (t *Settler) writeNote(rs []page.Range) error {
	all := page.NewSet(rs...)
	for _, s := range []*page.Set{&t.asides, &t.old, &t.made, &t.lost} {
		all = page.Union(&all, s)
	}
	return t.target.WriteNote(note(all.Ranges()))
}

// widest is the largest hole between mappings. In its middle nothing grows soon.
func (t *Settler) widest() (hole page.Range) {
	last := page.Addr(1 << 20)
	for i := range t.maps {
		if r := (page.Range{Start: last, End: t.maps[i].Start}); r.Bytes() > hole.Bytes() && t.maps[i].Start < 1<<47 {
			hole = r
		}
		last = t.maps[i].End
	}
	return hole
}

// reserve gives p a place to be moved to, if there is one. It is mapped, without access,
// so that the program maps nothing there.
func (t *Settler) reserve(ctx context.Context, p *piece) error {
	if p.of.Has("lo") {
		return nil // it would count as locked twice
	}
	hole := t.widest()
	// Not where shadows are made.
	at := max(hole.Start+page.Addr(hole.Bytes()/4), t.next)
	at = (at+table-1)&^(table-1) + p.Start&(table-1)
	r := from(p.Range, at)
	if r.End > hole.Start+page.Addr(hole.Bytes()/2) {
		return nil
	}
	t.next = r.End + page.Size
	var c *inject.Call
	err := t.again(ctx, func(tids []int) error {
		if err := t.writeNote([]page.Range{r}); err != nil {
			return err
		}
		inject.Point("settle-noted")
		b := t.target.Batch()
		c = b.Call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), unix.PROT_NONE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED_NOREPLACE, ^uint64(0), 0).Optional()
		b.Call(unix.SYS_MADVISE, 0, r.Bytes(), unix.MADV_DONTFORK).Arg(0, c).Optional()
		return b.Run(tids[0])
	})
	if err != nil {
		return err
	}
	if got, err := c.Ret(); err == nil && page.Addr(got) == r.Start {
		t.asides.Add(r)
		p.aside = r.Start
	}
	return nil
}

// tidy takes away what was moved aside, and places that were not needed.
func (t *Settler) tidy(ctx context.Context) error {
	t.old = page.Union(&t.old, &t.asides)
	t.asides = page.Set{}
	return t.away(ctx)
}

// away takes away what was moved aside, and tells of what was replaced.
func (t *Settler) away(ctx context.Context) error {
	if err := t.sweep(ctx, &t.old); err != nil {
		return err
	}
	if t.cfg.Replaced != nil && len(t.done) > 0 {
		t.cfg.Replaced(t.done)
	}
	t.done = nil
	return nil
}

// sweep unmaps memory that nobody knows of, as much at once as fits in a stop.
func (t *Settler) sweep(ctx context.Context, s *page.Set) error {
	for !s.Empty() {
		var few []page.Range
		left := t.cost.room(t.cfg.Limit, t.cost.fixed)
		guess := time.Duration(0)
		for _, r := range s.Ranges() {
			if guess >= left || len(few) == mostShadows {
				break
			}
			cut, cost, err := t.heavy(r, left-guess)
			if err != nil {
				return ignoreGone(err)
			}
			few = append(few, cut)
			guess += cost
			if cut != r {
				break
			}
		}
		if err := t.unmap(ctx, few, guess); err != nil {
			return err
		}
		for _, r := range few {
			s.Remove(r)
		}
	}
	return nil
}

// heavy is how much from the beginning of r on can be unmapped for budget.
func (t *Settler) heavy(r page.Range, budget time.Duration) (cut page.Range, guess time.Duration, err error) {
	const window = 2 * table
	guess = time.Microsecond
	for at := r.Start; at < r.End; {
		w := page.Range{Start: at, End: min(r.End, (at+window)&^(window-1))}
		pages := 0
		if err := t.pm.Kinds(w, func(r page.Range, _ proc.PageKind) { pages += r.Pages() }); err != nil {
			return r, 0, err
		}
		cost := time.Duration(pages) * costZap
		if guess+cost > budget && at > r.Start {
			return page.Range{Start: r.Start, End: at}, guess, nil
		}
		guess += cost
		at = w.End
	}
	return r, guess, nil
}

// unmap stops the main thread to unmap rs.
func (t *Settler) unmap(ctx context.Context, rs []page.Range, guess time.Duration) error {
	if t.target == nil {
		// The area is made where all stand still.
		if err := t.again(ctx, func([]int) error { return nil }); err != nil {
			return err
		}
	}
	work := func(tids []int) error {
		b := t.target.Batch()
		for _, r := range rs {
			b.Call(unix.SYS_MUNMAP, uint64(r.Start), r.Bytes())
		}
		began := time.Now()
		err := b.Run(tids[0])
		t.cost.halted(guess, time.Since(began))
		return err
	}
	inject.Point("settle-unmap")
	err := t.stopSome(ctx, true, work)
	if errors.Is(err, errNoStop) || errors.Is(err, inject.ErrLost) {
		err = t.again(ctx, work)
	}
	return err
}

// Release unmaps shadows that nothing is settled from any more: what has moved from them
// has left its place mapped, so that all of a range stays the caller's. Where the process
// has called exec since it was settled it does nothing.
func (t *Settler) Release(ctx context.Context, shadows []page.Range) error {
	if t.space == nil || t.space.Alive() != nil {
		return nil
	}
	if err := t.open(); err != nil {
		return &Error{"unmap the shadows of", t.s.pid, ignoreGone(err)}
	}
	defer t.shut()
	if err := t.space.Alive(); err != nil {
		return nil
	}
	var there page.Set
	for _, s := range shadows {
		for i := range t.maps {
			if m := &t.maps[i]; m.Overlaps(s) && private(m) {
				there.Add(m.Intersect(s))
			}
		}
	}
	if err := t.sweep(ctx, &there); err != nil {
		return &Error{"unmap the shadows of", t.s.pid, err}
	}
	for _, r := range shadows {
		t.taken.Remove(r)
	}
	return nil
}
