package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// What the program has written of a mapping is copied over its shadow while it runs,
// where a userfaultfd tells what it writes meanwhile (WP_ASYNC), in rounds, until the
// rest fits in a stop. Then the mapping is replaced as a whole, or as much of it as the
// stop allows. Where the program writes faster than that, what it has written last decides
// how much is replaced at once.

const (
	costTrap   = 110 * time.Nanosecond // a page that is unregistered for write protection
	costLook   = 3 * time.Nanosecond   // a page whose protection is looked at
	costShift  = 300 * time.Nanosecond // a table of pages, moved twice
	earlyTries = 5                     // rounds
	lookAtOnce = 256 << 10             // bytes between pages that one call looks at
	walkAtOnce = 32 << 20              // of page tables that are protected, for the lock is held
)

// early reports whether what the program has written of p can be copied while it runs.
func (t *Settler) early(p *piece) bool {
	return t.cfg.Early != nil && !t.refused && !p.ahead && !p.plain && !p.fresh && p.of.Has("uw") && p.of.Prot&unix.PROT_READ != 0
}

// ahead copies what the program has written of the beginning of p, as much as can be
// replaced in one stop, and puts off the rest of p.
func (t *Settler) ahead(ctx context.Context, p piece) (head, rest piece, err error) {
	head = p
	end, fixed, err := t.reach(&head)
	if err == nil && p.aside == 0 && (end < p.End || fixed > t.budget()/3) {
		if err = t.reserve(ctx, &head); err == nil {
			end, fixed, err = t.reach(&head)
		}
	}
	if err != nil {
		return p, piece{}, ignoreGone(err)
	}
	if end < p.End {
		head, rest = head.cut(end)
	}
	head.fixed = fixed
	head.ahead, err = t.copyEarly(ctx, &head)
	head.plain = !head.ahead
	return head, rest, err
}

// reach is how much of p can be replaced in one stop if hardly anything has to be copied
// in it, and what that is guessed to take.
func (t *Settler) reach(p *piece) (end page.Addr, fixed time.Duration, err error) {
	const window = 2 * table
	budget := t.budget() * 2 / 3
	each := time.Duration(0)
	if p.aside == 0 {
		each += costZap
	}
	if p.aside == 0 || !t.cfg.Moves {
		each += costTrap
	}
	aligned := (p.shadow-p.Start)&(table-1) == 0
	fixed = costPiece
	for end = p.Start; end < p.End; {
		w := page.Range{Start: end, End: min(p.End, (end+window)&^(window-1))}
		pages := 0
		if err := t.pm.Kinds(w, func(r page.Range, _ proc.PageKind) { pages += r.Pages() }); err != nil {
			return end, fixed, err
		}
		cost := time.Duration(pages)*(each+costLook) + costShift
		if !aligned {
			cost += time.Duration(w.Pages()) * costMove
		}
		if fixed+cost > budget && end > p.Start {
			break
		}
		fixed += cost
		end = w.End
	}
	return end, fixed, nil
}

// sure knows the pages of which the shadow has the content as long as they are protected.
// That they are does not say so: a page may come back that was moved away while others
// were copied, or that somebody has protected who is dead by now.
type sure struct {
	first page.Addr
	bits  *page.Bitmap
}

func newSure(r page.Range) *sure { return &sure{r.Start, page.NewBitmap(r.Pages())} }

func (s *sure) index(a page.Addr) int { return int((a - s.first) / page.Size) }

func (s *sure) set(r page.Range)   { s.bits.AtomicSetRange(s.index(r.Start), s.index(r.End)) }
func (s *sure) clear(r page.Range) { s.bits.AtomicClearRange(s.index(r.Start), s.index(r.End)) }

// not calls f with what of r it does not know.
func (s *sure) not(r page.Range, f func(page.Range)) {
	for i, end := s.index(r.Start), s.index(r.End); i < end; {
		i = s.bits.NextClear(i, end)
		if i >= end {
			return
		}
		j := s.bits.NextSet(i, end)
		f(page.Range{Start: s.first + page.Addr(i)*page.Size, End: s.first + page.Addr(j)*page.Size})
		i = j
	}
}

// openPages is Pagemap.Kinds for what has no protection in r, or is not known to be in the
// shadow if it has.
func (t *Settler) openPages(r page.Range, s *sure, f func(page.Range, proc.PageKind)) error {
	var all []page.Range
	at := r.Start
	protected := func(end page.Addr) {
		s.not(page.Range{Start: at, End: end}, func(r page.Range) { all = join(all, r) })
	}
	if err := t.pm.Unprotected(r, func(o page.Range) {
		protected(o.Start)
		all = join(all, o)
		at = o.End
	}); err != nil {
		return err
	}
	protected(r.End)
	for len(all) > 0 {
		// Those that lie close together are looked at in one call.
		n, w := 1, all[0]
		for ; n < len(all) && all[n].Start-w.End < lookAtOnce; n++ {
			w.End = all[n].End
		}
		few := all[:n]
		all = all[n:]
		if err := t.pm.Kinds(w, func(r page.Range, k proc.PageKind) {
			for len(few) > 0 && few[0].End <= r.Start {
				few = few[1:]
			}
			for _, o := range few {
				if o.Start >= r.End {
					break
				}
				f(o.Intersect(r), k)
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

// copyEarly reports whether it has: then what the shadow of p lacks is what openPages
// tells.
func (t *Settler) copyEarly(ctx context.Context, p *piece) (ok bool, err error) {
	budget := t.budget()
	enough := int(max(budget-p.fixed, budget/4) / costOwn / 2)
	if ok = p.ahead; !ok {
		p.sure = newSure(p.Range)
	}
	for try, last := 0, 0; ; try++ {
		own, err := t.take(p)
		if err != nil {
			return false, ignoreGone(err)
		}
		n := pages(own)
		if ok && (n <= enough || try == earlyTries || try > 1 && n > last*3/4) {
			return true, nil
		}
		last = n
		var refused error
		err = t.again(ctx, func([]int) error {
			// A read(2) into memory that was under way (O_DIRECT) writes to it behind the
			// back of the protection. Its thread has not stopped before it was done. And a
			// child that is not there by now has all of own as its own.
			refused = t.cfg.Early(ctx, []SettlePart{p.part()})
			return nil
		})
		if err != nil {
			return false, err
		}
		if refused != nil {
			t.cfg.Log.Debug("what the program has written is copied in stops", "pid", t.s.pid, "range", p.Range, "err", refused)
			t.refused = true
			return ok, ctx.Err()
		}
		inject.Point("settle-early")
		if err := t.copyRunning(p, own); err != nil {
			return false, ignoreGone(err)
		}
		ok = true
	}
}

// take protects p, and lists the process's own pages that its shadow lacks.
func (t *Settler) take(p *piece) ([]page.Range, error) {
	var own []page.Range
	err := t.openPages(p.Range, p.sure, func(r page.Range, k proc.PageKind) {
		if k == proc.PageOwn {
			own = append(own, r)
		}
	})
	for at := p.Start; at < p.End && err == nil; at += walkAtOnce {
		w := page.Range{Start: at, End: min(at+walkAtOnce, p.End)}
		err = t.pm.Guard(w, func(r page.Range, k proc.PageKind) {
			if k == proc.PageOwn {
				own = append(own, r)
				p.sure.clear(r)
			} else {
				p.sure.set(r)
			}
		})
	}
	inject.Point("settle-taken")
	all := page.NewSet(own...)
	return all.Ranges(), err
}

// copyRunning copies pages of p to its shadow while the process runs. By the handle:
// were the process another program by now, its number would lead to that.
func (t *Settler) copyRunning(p *piece, own []page.Range) error {
	for _, r := range own {
		for !r.Empty() {
			w := r
			w.End = min(r.End, r.Start+settlePiece)
			err := t.copyHandle(p, w)
			if errors.Is(err, proc.ErrNoPage) {
				// One of them is a guard by now, or unmapped.
				w = page.PageOf(r.Start)
				if err = t.copyHandle(p, w); errors.Is(err, proc.ErrNoPage) {
					r.Start = w.End
					continue
				}
			}
			if err != nil {
				return err
			}
			p.sure.set(w)
			r.Start = w.End
		}
	}
	return nil
}

func (t *Settler) copyHandle(p *piece, r page.Range) error {
	buf := t.buffer(r.Bytes())
	if err := t.mem.ReadAt(buf, r.Start); err != nil {
		return fmt.Errorf("copy what the program has written: %w", err)
	}
	if err := t.mem.WriteAt(buf, p.shadow+r.Start-p.Start); err != nil {
		return fmt.Errorf("copy what the program has written to its shadow: %w", err)
	}
	t.rep.Early += r.Bytes()
	return nil
}

func pages(rs []page.Range) (n int) {
	for _, r := range rs {
		n += r.Pages()
	}
	return n
}

// whole gives a shadow its anon_vma before a part of it moves away: parts that have one
// each, or get it only in their new place, would never be one mapping again
// (anon_vma_compatible, mm/vma.c).
func (t *Settler) whole(p *piece) error {
	m, ok := t.find(p.shadow)
	if !ok || p.fresh || p.path != "" || m.Range == from(p.Range, p.shadow) || t.touched.Contains(p.shadow) {
		return nil
	}
	t.touched.Add(m.Range)
	var b [1]byte
	err := t.mem.ReadAt(b[:], p.shadow)
	if err == nil {
		err = t.mem.WriteAt(b[:], p.shadow)
	}
	if errors.Is(err, proc.ErrNoPage) {
		err = nil // a userfaultfd waits for it: with the first page that comes there is one
	}
	return err
}

// ownOf are the process's own pages of f's mapping, as far as zeroed, addresses in its
// shadow, reaches. Not f.own: that lacks those that were copied ahead, and those that who
// sees what other processes give up has made its own since.
func (t *Settler) ownOf(f *found, zeroed []page.Range) (own page.Set, err error) {
	if len(zeroed) == 0 {
		return own, nil
	}
	all := page.Range{Start: zeroed[0].Start, End: zeroed[len(zeroed)-1].End}
	err = t.pm.Kinds(from(all, f.Start+all.Start-f.shadow), func(r page.Range, k proc.PageKind) {
		if k == proc.PageOwn {
			own.Add(r)
		}
	})
	return own, err
}
