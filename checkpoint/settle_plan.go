package checkpoint

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// What things cost in a stop, as a first guess; settleCost corrects all of it by one
// factor that is measured.
const (
	costStop   = 200 * time.Microsecond // to look at all anew, and to begin a batch
	costTold   = 300 * time.Microsecond // what the caller does in it
	costPiece  = 12 * time.Microsecond  // the calls for one mremap
	costOwn    = 1000 * time.Nanosecond // a page that is copied, and given up at its old place
	costFile   = 80 * time.Nanosecond   // a page of the file that is mapped
	costMove   = 50 * time.Nanosecond   // a page of a shadow that is not aligned as its mapping is
	costTable  = 4 * time.Microsecond   // 2 MiB with any page
	mostRuns   = 1500                   // of pages that are copied, and guards
	costLeast  = 250 * time.Microsecond // work of a stop, however much else it costs
	mostPieces = 256                    // in one stop
)

// settleCost is what is known of what a stop costs.
type settleCost struct {
	slow  float64       // measured against guessed
	fixed time.Duration // stopping and letting go of the threads
	told  time.Duration // what the caller does in a stop
	// wait is for processors, however little is done in a stop: on a machine that others
	// keep busy it is nearly all of it.
	wait time.Duration
}

func (c *settleCost) stopped(fixed time.Duration) { c.fixed = follow(c.fixed, fixed) }
func (c *settleCost) toldOf(took time.Duration)   { c.told = follow(c.told, took) }

// follow is what is expected of something that took so long before, and now so long.
func follow(was, now time.Duration) time.Duration {
	if was == 0 || now > was {
		return (was + now) / 2
	}
	return was - (was-now)/8
}

// worked learns from a stop in which guess was expected.
func (c *settleCost) worked(guess, took time.Duration) {
	if guess <= 0 {
		return
	}
	work := time.Duration(c.slow * float64(guess))
	over := took - work - c.wait
	if over > 0 && work < took/2 {
		// Doing less would not make it shorter. But one such stop makes no busy machine.
		c.wait += min(over/2, 2*costStop)
		return
	}
	if over < 0 {
		c.wait = max(c.wait+over/8, 0)
	}
	c.scaled(over > 0)
}

// halted learns from a stop of the main thread only. The others run meanwhile, and what
// it does takes as many times longer as there are who want its processor.
func (c *settleCost) halted(guess, took time.Duration) {
	c.scaled(float64(took) > c.slow*float64(guess))
}

// scaled sees to it that one stop in twelve takes longer than was thought. Not much more
// than fourfold, as what other programs on the machine cost a stop does not become less by
// doing less in it.
func (c *settleCost) scaled(longer bool) {
	if longer {
		c.slow *= 1.25
	} else {
		c.slow *= 0.98
	}
	c.slow = min(max(c.slow, 0.2), 5)
}

// budget is how much work may be guessed for a stop.
func (t *Settler) budget() time.Duration {
	return t.cost.room(t.cfg.Limit, t.cost.fixed+t.cost.told+t.cost.wait)
}

// room is how much of limit is left for work where a stop takes idle without any.
func (c *settleCost) room(limit, idle time.Duration) time.Duration {
	// A third is left for what cannot be foreseen. Where stopping the threads and waiting
	// takes more than that, doing less in a stop makes more such stops.
	b := max(limit*2/3-idle, min(idle/2, 2*limit), costLeast)
	b = time.Duration(float64(b) / c.slow)
	return max(b-costStop, b/2)
}

// found is what of a piece has to be seen to in a stop.
type found struct {
	piece
	own, guards []page.Range
	guess       time.Duration
}

// errEnough ends a walk.
var errEnough = errors.New("enough")

// scan looks at a piece and cuts it where the guess exceeds budget; rest is empty
// where all of it fits.
func (t *Settler) scan(p piece, budget time.Duration) (f found, rest piece, err error) {
	// What no page table is there for costs next to nothing, and looking at it does.
	window, kinds, limit := page.Addr(2*table), t.pm.Kinds, p.End
	file, tables, move := costFile, costTable, time.Duration(0)
	f = found{piece: p, guess: costPiece}
	switch aligned := (p.shadow-p.Start)&(table-1) == 0; {
	case p.ahead:
		// All but copying is in fixed.
		window = walkAtOnce
		kinds = func(r page.Range, found func(page.Range, proc.PageKind)) error {
			return t.openPages(r, p.sure, found)
		}
		file, tables = 0, 0
		limit, f.guess = p.fit(budget)
		budget = max(budget, f.guess+budget/4)
	case !aligned:
		move = costMove
	}
	if p.of.Has("uw") && !p.ahead {
		file += costTrap
	}
	end := p.Start
	cut := false
	for end < limit && !cut && (f.guess <= budget || end == p.Start) {
		w := page.Range{Start: end, End: min(limit, (end+window)&^(window-1))}
		end = w.End
		empty := true
		err := kinds(w, func(r page.Range, k proc.PageKind) {
			if cut {
				return
			}
			empty = false
			each := file
			if k == proc.PageOwn {
				each += costOwn
			}
			least := 0
			if r.Start == p.Start {
				least = 1 // never nothing
			}
			if fit := max(int((budget-f.guess)/max(each, 1)), least); fit < r.Pages() {
				cut = true
				r.End = r.Start + page.Addr(fit)*page.Size
				end = r.End
			}
			f.guess += time.Duration(r.Pages()) * each
			switch {
			case r.Empty() || k == proc.PageFile:
			case len(f.own)+len(f.guards) >= mostRuns:
				cut, end = true, r.Start
			case k == proc.PageGuard:
				f.guards = join(f.guards, r)
			default:
				f.own = join(f.own, r)
			}
		})
		if err != nil {
			return f, piece{}, err
		}
		if !empty {
			f.guess += time.Duration(w.Bytes()>>21+1) * tables
		}
		f.guess += time.Duration(w.Pages()) * move
	}
	if end >= p.End {
		return f, piece{}, nil
	}
	// Page tables move as a whole where both sides are aligned.
	if a := end &^ (table - 1); a > p.Start && move == 0 {
		end = a
	}
	f.piece, rest = p.cut(end)
	f.own, f.guards = upTo(f.own, end), upTo(f.guards, end)
	return f, rest, nil
}

// fit is how much of p, whose pages were copied ahead, can be replaced for budget if
// hardly anything has to be copied in the stop, and what that is guessed to take. fixed was
// guessed when a stop may have had more room, on a machine that was less busy.
func (p *piece) fit(budget time.Duration) (end page.Addr, guess time.Duration) {
	if p.fixed <= budget {
		return p.End, p.fixed
	}
	n := page.Addr(float64(p.Bytes()) * float64(budget) * 3 / 4 / float64(p.fixed))
	end = min((max(p.Start+n, p.Start+table))&^(table-1), p.End)
	return end, time.Duration(float64(p.fixed) * float64(end-p.Start) / float64(p.Bytes()))
}

func join(rs []page.Range, r page.Range) []page.Range {
	if n := len(rs); n > 0 && rs[n-1].End == r.Start {
		rs[n-1].End = r.End
		return rs
	}
	return append(rs, r)
}

func upTo(rs []page.Range, end page.Addr) []page.Range {
	for len(rs) > 0 && rs[len(rs)-1].End > end {
		last := &rs[len(rs)-1]
		if last.Start < end {
			last.End = end
			break
		}
		rs = rs[:len(rs)-1]
	}
	return rs
}

// plan takes as much off the queue as fits in a stop.
func (t *Settler) plan(queue []piece) (now, later []piece, err error) {
	left, runs := t.budget(), 0
	for len(queue) > 0 && left > 0 && len(now) < mostPieces && runs < mostRuns {
		f, rest, err := t.scan(queue[0], left)
		if err != nil {
			return nil, nil, err
		}
		if len(now) > 0 && (f.guess > left && rest.Empty() || !rest.Empty() && t.early(&queue[0])) {
			break
		}
		now = append(now, f.piece)
		left -= f.guess
		runs += len(f.own) + len(f.guards)
		if queue = queue[1:]; !rest.Empty() {
			queue = append([]piece{rest}, queue...)
		}
	}
	return now, queue, nil
}

// settle replaces the pieces of a queue, whose shadows are filled.
func (t *Settler) settle(ctx context.Context, queue []piece) error {
	if t.target == nil && len(queue) > 0 {
		// Making the area for injected calls takes a stop of its own.
		if err := t.again(ctx, func([]int) error { return nil }); err != nil {
			return err
		}
	}
	for settled := t.rep.Settled; len(queue) > 0 && (!t.stale() || t.rep.Settled == settled || queue[0].ahead); {
		var err error
		if queue, err = t.prepare(ctx, queue); err != nil {
			return err
		}
		now, later, err := t.plan(queue)
		if err != nil {
			return err
		}
		queue = later
		for i := range now {
			if err := t.whole(&now[i]); err != nil {
				return ignoreGone(err)
			}
		}
		var back []piece
		err = t.stop(ctx, func(tids []int) (err error) {
			back, err = t.exchange(ctx, tids, now)
			return err
		})
		switch {
		case errors.Is(err, errNoStop):
			queue = append(now, queue...)
			if t.fails >= t.cfg.Tries {
				return err
			}
		case err != nil:
			return err
		default:
			queue = append(back, queue...)
			// It is what makes the process take more memory than it did.
			if t.old.Bytes() >= t.cfg.Ahead || len(queue) == 0 {
				if err := t.away(ctx); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// prepare copies what the program has written of the first piece, where it is too much
// for a stop and can be copied while it runs.
func (t *Settler) prepare(ctx context.Context, queue []piece) ([]piece, error) {
	if p := &queue[0]; p.ahead && p.tries > 0 && p.tries <= settleTries {
		var err error
		if p.ahead, err = t.copyEarly(ctx, p); err != nil {
			return queue, err
		}
		p.plain = !p.ahead
	} else if p := queue[0]; t.early(&p) {
		_, rest, err := t.scan(p, t.budget())
		if err != nil {
			return queue, ignoreGone(err)
		}
		if !rest.Empty() {
			head, rest, err := t.ahead(ctx, p)
			if err != nil {
				return queue, err
			}
			queue[0] = head
			if !rest.Empty() {
				queue = slices.Insert(queue, 1, rest)
			}
		}
	}
	if queue[0].ahead && t.stale() {
		return queue, t.renew(queue)
	}
	return queue, nil
}

// settleFails is how often in a row not all threads may stop in time.
const settleFails = 100

// again makes a stop that must come about.
func (t *Settler) again(ctx context.Context, f func(tids []int) error) error {
	for {
		err := t.stop(ctx, f)
		if !errors.Is(err, errNoStop) || t.fails >= t.cfg.Tries {
			return err
		}
	}
}
