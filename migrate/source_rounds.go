package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/plan"
)

// ErrNoConvergence: pre-copy gave up, and the process runs on as it was.
var ErrNoConvergence = errors.New("migrate: pre-copy does not converge")

const (
	// batchBytes is how much one LAND asks for: what is written again before its
	// batch is begun is left to the next round.
	batchBytes = 128 << 20
	// dropRuns and dropBytes are from how much on the destination gives up stale pages
	// before the freeze rather than during it: a GiB takes 60 ms.
	dropRuns  = 256
	dropBytes = 8 << 20
	longDrop  = 20 * time.Millisecond
	// mostHot bounds what is fetched first after the switch: with more than that the
	// faults say better what is needed.
	mostHot = 32 << 20
)

// rounds is the pre-copy of one migration at its source.
type rounds struct {
	s     *Source
	c     *control
	plan  *plan.Rounds
	hist  plan.History
	taken time.Time // the last look

	layout  []byte
	content page.Set
	landed  page.Set // pages that the destination has, right or stale
	remade  page.Set // of them those that it loses with the layout that it gets next
	clean   page.Set // those of them that are right, as far as the last look knows
	written page.Set // what the last look found
	compare uint64   // bytes that are compared with what was sent
	hot     page.Set // what the first looks found
	last    Round
	batches uint32 // LANDs so far

	throttle    float64
	sample      Round   // what was sent to measure the link: part of the first round
	rate, share float64 // see Measured
}

// precopy copies memory while the process runs, until it is time to switch. It
// returns what the destination has not, or not right; nil where nothing was tracked.
func (s *Source) precopy(ctx context.Context, c *control) (*rounds, error) {
	start, r := time.Now(), &rounds{s: s, c: c}
	if err := r.track(ctx); err != nil {
		return nil, s.untracked(ctx, err)
	}
	if err := s.enter(SourceTracking); err != nil {
		return nil, err
	}
	if err := r.begin(ctx, firstLooks, firstPause); err != nil {
		return nil, err
	}
	if err := r.probe(ctx); err != nil {
		return nil, err
	}
	if err := r.look(ctx, false); err != nil {
		return nil, err
	}
	m := r.measured(start)
	goOn, err := r.choose(&m)
	if err != nil {
		return nil, err
	}
	if !goOn {
		r.noteSample()
		return r, r.giveUpStale(ctx)
	}
	if r.plan, err = plan.NewRounds(plan.Config{
		MaxDowntime: s.cfg.MaxDowntime, PostCopy: s.rec.Mode == ModeHybrid, MaxThrottle: s.cfg.Throttle,
		Curve: m.Curve, WireRate: m.Rate,
	}); err != nil {
		return nil, err
	}
	for n := 0; ; n++ {
		more, err := r.round(ctx, n)
		if err != nil {
			return nil, err
		}
		if !more {
			break
		}
	}
	r.noteSample()
	return r, r.giveUpStale(ctx)
}

// begin takes the first looks.
func (r *rounds) begin(ctx context.Context, looks int, pause time.Duration) error {
	for i := range 1 + looks {
		if i > 0 {
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return context.Cause(ctx)
			}
		}
		if err := r.look(ctx, i == 0); err != nil {
			return err
		}
		if i > 0 {
			r.hot = page.Union(&r.hot, &r.written)
		}
	}
	return nil
}

// look takes a look and what follows from it.
func (r *rounds) look(ctx context.Context, first bool) error {
	var l Look
	err := r.s.engine("look", func() (err error) { l, err = r.s.cfg.Process.Look(ctx); return err })
	if err != nil {
		return err
	}
	now := time.Now()
	// What is compared with what was sent, and was not, may have been written or not.
	unknown := page.Difference(&l.Compared, &r.landed)
	r.compare = l.Compared.Bytes()
	note := plan.Look{Written: page.Difference(&l.Written, &unknown), Content: l.Content, Elapsed: now.Sub(r.taken)}
	if first {
		// That everything is new says nothing about what the program does.
		note.Written, note.Elapsed = page.Set{}, 0
	}
	r.hist.Note(note)
	r.taken, r.layout, r.content = now, l.Layout, l.Content
	r.clean = page.Intersection(&r.clean, &l.Content)
	r.clean = page.Difference(&r.clean, &l.Written)
	r.remade = page.Union(&r.remade, &l.Remade)
	r.remade = page.Intersection(&r.remade, &r.landed)
	r.clean = page.Difference(&r.clean, &r.remade)
	r.written, r.last.DirtyPages = note.Written, note.Written.Pages()
	r.last.elapsed = note.Elapsed
	return nil
}

// round decides, and does a round if that is the decision.
func (r *rounds) round(ctx context.Context, n int) (more bool, err error) {
	unsent := page.Difference(&r.content, &r.clean)
	state := StateTime(r.s.cfg.Offer.Threads, r.content.Bytes()) + compareTime(r.compare)
	room := ^uint64(0)
	if r.s.rec.Mode == ModePreCopy {
		room = r.plan.Room(state)
	}
	var held page.Set
	if !r.s.cfg.AddressOrder {
		held = r.hist.HoldBack(unsent, r.plan.Takes, room)
	}
	send := page.Difference(&unsent, &held)
	d := r.plan.Next(plan.Measure{
		Round: n, Sent: r.last.Pages << page.Shift, Took: r.last.took,
		Written: r.last.DirtyPages << page.Shift, Elapsed: r.last.elapsed,
		Dirty: send.Bytes(), Held: held.Bytes(), State: state, Lag: r.lag(),
	})
	r.tell(n, unsent.Pages(), d)
	if d.Throttle != r.throttle {
		r.throttle = d.Throttle
		r.s.res.Throttle = max(r.s.res.Throttle, d.Throttle)
		if err := r.s.engine("throttle", func() error { return r.s.cfg.Process.Throttle(d.Throttle) }); err != nil {
			return false, err
		}
	}
	switch d.Action {
	case plan.Round:
	case plan.GiveUp:
		return false, fmt.Errorf("%w: %s", ErrNoConvergence, d.Reason)
	default:
		return false, nil
	}
	begin, before := time.Now(), r.s.cfg.Lanes.BytesSent()
	r.last = Round{Round: n + 1}
	if err := r.send(ctx, &send); err != nil {
		return false, err
	}
	r.last.took = time.Since(begin)
	r.last.MS = ms(begin, time.Now())
	r.last.BytesWire = r.s.cfg.Lanes.BytesSent() - before
	if err := r.look(ctx, false); err != nil {
		return false, err
	}
	r.s.res.Rounds = append(r.s.res.Rounds, r.withSample(r.last))
	return true, nil
}

// lag is how long the program will run on from a look that decides for the switch:
// until its flags of mappings are read, and the destination has given up what is stale.
func (r *rounds) lag() time.Duration {
	stale := page.Difference(&r.landed, &r.clean)
	return 10*time.Millisecond + perGiB(stale.Bytes(), 60*time.Millisecond)
}

// send sends the pages of a round, coldest first.
func (r *rounds) send(ctx context.Context, pages *page.Set) error {
	order := []page.Set{*pages}
	if !r.s.cfg.AddressOrder {
		order = r.hist.Order(*pages)
	}
	bs := plan.Batches{Order: order, Bytes: batchBytes}
	left := pages.Bytes()
	for first := true; ; first = false {
		next, ok := bs.Next()
		if left <= batchBytes {
			r.s.cfg.Process.SwitchNears()
		}
		left -= min(left, next.Bytes())
		if !ok && !first {
			return nil
		}
		b := Batch{Classes: []page.Set{next}}
		if first {
			b.Layout, b.Gone = r.layout, page.Difference(&r.landed, &r.content)
			b.Gone = page.Union(&b.Gone, &r.remade)
			r.landed, r.remade = page.Difference(&r.landed, &b.Gone), page.Set{}
		} else {
			again, err := r.s.cfg.Process.Peek(&next)
			if err != nil {
				return err
			}
			b.Classes[0] = page.Difference(&next, &again)
		}
		if err := r.land(ctx, b); err != nil {
			return err
		}
	}
}

// land sends a batch and waits until it is in place.
func (r *rounds) land(ctx context.Context, b Batch) error {
	sets, err := encodeBatch(&b)
	if err != nil {
		return err
	}
	var all page.Set
	for i := range b.Classes {
		all = page.Union(&all, &b.Classes[i])
	}
	r.batches++
	r.s.cfg.Lanes.Round(r.batches, r.last.Round > 1, &all, &b.Gone)
	if err := r.s.send(r.c, landMsg{Round: uint(r.last.Round)}, b.Layout, sets); err != nil {
		return err
	}
	l, err := r.s.awaitLanded(ctx, r.c)
	if err != nil {
		return err
	}
	if want := all.Pages(); l.Pages != want {
		return fmt.Errorf("%w: %d pages landed of %d", ErrProtocol, l.Pages, want)
	}
	r.landed = page.Union(&r.landed, &all)
	r.clean = page.Union(&r.clean, &all)
	r.last.Pages += l.Pages
	r.last.PagesZero += l.PagesZero
	return nil
}

// awaitLanded waits for the end of a batch, as long as it gets on.
func (s *Source) awaitLanded(ctx context.Context, c *control) (*landedMsg, error) {
	last := s.Progress().PagesLanded
	for {
		one, stop := context.WithTimeoutCause(ctx, s.t.Ready, fmt.Errorf("%w: no page landed in %v", ErrStalled, s.t.Ready))
		r, err := s.recv(one, c)
		for err == nil {
			m, ok := r.msg.(*progressMsg)
			if !ok || m.Stats.PagesLanded != last {
				break
			}
			r, err = s.recv(one, c)
		}
		stop()
		if err != nil {
			return nil, err
		}
		switch m := r.msg.(type) {
		case *progressMsg:
			s.landedMore(m.Stats.PagesLanded - min(last, m.Stats.PagesLanded))
			last = m.Stats.PagesLanded
		case *landedMsg:
			s.landedMore(m.Stats.PagesLanded - min(last, m.Stats.PagesLanded))
			s.note(m.Stats.arrival())
			return m, nil
		case *abortedMsg:
			return nil, fmt.Errorf("%w: %s", errGivenUp, m.Reason)
		default:
			return nil, unexpected(r.msg, "landed")
		}
	}
}

// landedMore takes pages off what is left, for those who watch.
func (s *Source) landedMore(pages uint64) {
	s.mu.Lock()
	s.progress.PagesLeft -= min(s.progress.PagesLeft, pages)
	s.mu.Unlock()
	s.tell("")
}

// giveUpStale makes the destination give up what is stale, where that is much: it
// would have to while the process stands still. Where it takes long the program
// makes more of it meanwhile, which is given up as well, once.
func (r *rounds) giveUpStale(ctx context.Context) error {
	for again := false; ; again = true {
		stale := page.Difference(&r.landed, &r.clean)
		if stale.Len() < dropRuns && stale.Bytes() < dropBytes {
			return nil
		}
		begin := time.Now()
		r.landed = page.Intersection(&r.landed, &r.clean)
		if err := r.land(ctx, Batch{Gone: stale}); err != nil || again || time.Since(begin) < longDrop {
			return err
		}
		if err := r.look(ctx, false); err != nil {
			return err
		}
	}
}

// dirty adds to the map of memory what no round brought as it was at the last look.
// What was written since then is what the program works on: it comes first.
func (r *rounds) dirty(ms []Memory) []Memory {
	stale := page.Difference(&r.content, &r.clean)
	for i := range ms {
		m := &ms[i]
		if m.Space != 0 {
			continue
		}
		if hot := page.Intersection(&m.Dirty, &m.Lazy); hot.Bytes() <= mostHot {
			m.Hot = page.Union(&m.Hot, &hot)
		}
		m.Dirty = page.Union(&m.Dirty, &stale)
		return ms
	}
	return append(ms, Memory{Dirty: stale})
}

// tell publishes where the rounds are.
func (r *rounds) tell(n int, left uint64, d plan.Decision) {
	s := r.s
	s.res.Switch = d.Reason
	s.mu.Lock()
	p := &s.progress
	p.Round, p.PagesLeft = n+1, left
	p.DirtyBytesPerSecond, p.ExpectedDowntime, p.Throttle = d.DirtyRate, d.Downtime, d.Throttle
	s.mu.Unlock()
	s.log.Info("round", "round", n, "left_pages", left, "decision", d.Action, "reason", d.Reason,
		"downtime", d.Downtime, "sent_pages", r.last.Pages, "dirty_pages", r.last.DirtyPages, "took", r.last.took)
	s.tell("")
}
