package simulate

import (
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/plan"
)

// Migration is what is simulated.
type Migration struct {
	Plan    plan.Config
	Memory  uint64
	Writers []Writer
	// WireRate is what the link carries, in bytes per second, RTT its round trip.
	WireRate float64
	RTT      time.Duration
	// State is what the switch costs without pages.
	State time.Duration
	// Scan is what a scan takes for each GiB. Default: 2 ms.
	Scan time.Duration
	// Looks is how many scans come before the first round, each LookTime after
	// the one before. Default: none; 50 ms.
	Looks    int
	LookTime time.Duration
	// LookEvery is how often a scan comes in the middle of a round, after which the
	// rest of the round is ordered anew. Default: never.
	LookEvery time.Duration
	// Batch is how much is asked for at once. Default: 64 MiB.
	Batch uint64
	// AddressOrder sends by address, HoldNothing holds nothing back, SkipNothing
	// does not look whether pages were written again before they are sent.
	AddressOrder, HoldNothing, SkipNothing bool

	Seed uint64
}

// RoundResult is one round.
type RoundResult struct {
	Measure  plan.Measure
	Decision plan.Decision
}

// Result is what came of it.
type Result struct {
	Action    plan.Action
	Reason    string
	Rounds    []RoundResult // the first is the decision to begin
	Curve     plan.Curve    // what the looks before the first round saw
	Memory    uint64
	Sent      uint64 // bytes of pages, the remainder included
	Resent    uint64 // bytes of pages that had been sent before
	Remainder uint64 // bytes that were left for the switch
	Total     time.Duration
	Downtime  time.Duration
	Throttle  float64 // the strongest
	Lost      uint64  // pages that would be old at the destination: none
}

type run struct {
	Migration
	p    *process
	h    plan.History
	r    *plan.Rounds
	now  time.Duration
	last time.Duration // when the last scan was
	seen page.Set      // written in this round, as scans in its middle found

	there    []uint32 // the version at the destination
	times    []uint16 // how often a page was sent
	left     page.Set
	throttle float64
	res      Result
}

// Run simulates one migration. The error says that the rules broke one of their
// promises.
func Run(m Migration) (*Result, error) {
	set(&m.Scan, 2*time.Millisecond)
	set(&m.LookTime, 50*time.Millisecond)
	set(&m.Batch, 64<<20)
	s := &run{Migration: m, p: newProcess(m.Memory, m.Writers, rand.New(rand.NewPCG(m.Seed, 5)))}
	s.there, s.times = make([]uint32, len(s.p.version)), make([]uint16, len(s.p.version))
	// Nothing is there, which is not version 0.
	for i := range s.p.version {
		s.p.version[i] = 1
	}
	s.res.Memory = m.Memory
	for range m.Looks {
		s.pass(m.LookTime)
		s.look()
	}
	s.now, s.last, s.seen = 0, 0, page.Set{}
	m.Plan.Curve = s.h.Curve()
	s.res.Curve = m.Plan.Curve
	var err error
	if s.r, err = plan.NewRounds(m.Plan); err != nil {
		return nil, err
	}
	s.left = s.p.content()
	if err := s.rounds(); err != nil {
		return nil, err
	}
	s.switchOver()
	return &s.res, nil
}

func set[T comparable](p *T, v T) {
	var zero T
	if *p == zero {
		*p = v
	}
}

// pass lets time pass.
func (s *run) pass(d time.Duration) {
	s.now += d
	s.p.run(d, s.throttle)
}

func (s *run) took(bytes uint64) time.Duration {
	return time.Duration(float64(bytes) / s.WireRate * float64(time.Second))
}

// look scans and notes it.
func (s *run) look() {
	s.pass(time.Duration(float64(s.Scan) * float64(s.Memory) / (1 << 30)))
	written := s.p.scan()
	s.h.Note(plan.Look{Written: written, Content: s.p.content(), Elapsed: s.now - s.last})
	s.last = s.now
	s.seen = page.Union(&s.seen, &written)
}

func (s *run) rounds() error {
	// Every productive round leaves nine tenths of a remainder: no more than this.
	const most = 1000
	var m plan.Measure
	for m.Round = 0; m.Round < most; m.Round++ {
		held := s.hold()
		send := page.Difference(&s.left, &held)
		m.Dirty, m.Held, m.State = send.Bytes(), held.Bytes(), s.State
		d := s.r.Next(m)
		s.res.Rounds = append(s.res.Rounds, RoundResult{m, d})
		s.res.Action, s.res.Reason = d.Action, d.Reason
		s.throttle = d.Throttle
		s.res.Throttle = max(s.res.Throttle, d.Throttle)
		if d.Action != plan.Round {
			return nil
		}
		begin, scanned := s.now, s.last
		sent, skipped, unsent, err := s.round(send, held)
		if err != nil {
			return err
		}
		m.Took = s.now - begin
		s.look()
		m.Sent, m.Written, m.Elapsed = sent, s.seen.Bytes(), s.last-scanned
		// What was skipped was written, so that the scans must have found it.
		if lost := page.Difference(&skipped, &s.seen); !lost.Empty() {
			return fmt.Errorf("%d pages were skipped and not found written", lost.Pages())
		}
		s.left = page.Union(&unsent, &held)
		s.left = page.Union(&s.left, &s.seen)
		s.seen = page.Set{}
	}
	return fmt.Errorf("%d rounds and no end", most)
}

// hold says what the next round leaves out.
func (s *run) hold() page.Set {
	if s.HoldNothing {
		return page.Set{}
	}
	most := s.r.Room(s.State)
	if s.Plan.PostCopy {
		most = s.Memory
	}
	return s.h.HoldBack(s.left, s.r.Takes, most)
}

// round sends a set, and returns what it skipped as written again, and what it
// left out as it was stopped.
func (s *run) round(send, held page.Set) (sent uint64, skipped, unsent page.Set, err error) {
	s.pass(s.RTT)
	var done page.Set
	b := plan.Batches{Order: s.order(send), Bytes: s.Batch}
	for batch, ok := b.Next(); ok; batch, ok = b.Next() {
		if twice := page.Intersection(&done, &batch); !twice.Empty() {
			return 0, skipped, unsent, fmt.Errorf("%d pages are in two batches", twice.Pages())
		}
		done = page.Union(&done, &batch)
		again := page.Intersection(&batch, &s.seen)
		if s.SkipNothing {
			again = page.Set{}
		}
		skipped = page.Union(&skipped, &again)
		sent += s.batch(page.Difference(&batch, &again), &skipped)
		if s.LookEvery > 0 && s.now-s.last > s.LookEvery {
			s.look()
			unsent = page.Difference(&send, &done)
			left := page.Union(&unsent, &s.seen)
			if left = page.Union(&left, &held); s.r.Stop(sent, left.Bytes()) {
				return sent, skipped, unsent, nil
			}
			b = plan.Batches{Order: s.order(unsent), Bytes: s.Batch}
			unsent = page.Set{}
		}
	}
	if common := page.Intersection(&done, &send); common.Bytes() != send.Bytes() || done.Bytes() != send.Bytes() {
		return 0, skipped, unsent, fmt.Errorf("the batches hold %d pages of %d", done.Pages(), send.Pages())
	}
	return sent, skipped, unsent, nil
}

func (s *run) order(send page.Set) []page.Set {
	if s.AddressOrder {
		return []page.Set{send}
	}
	return s.h.Order(send)
}

// batch sends one batch but for what was written since the scan. Pages are read
// one by one, just before they are sent: writes come in between.
func (s *run) batch(batch page.Set, skipped *page.Set) (sent uint64) {
	var rest []int
	each(batch, func(i int) {
		if s.p.written[i] && !s.SkipNothing {
			skipped.Add(page.Range{Start: addr(i), End: addr(i + 1)})
			return
		}
		rest = append(rest, i)
	})
	const piece = 64
	for len(rest) > 0 {
		n := min(piece, len(rest))
		for _, i := range rest[:n] {
			s.send(i)
		}
		rest = rest[n:]
		s.pass(s.took(uint64(n) * page.Size))
		sent += uint64(n) * page.Size
	}
	return sent
}

func (s *run) send(i int) {
	s.there[i] = s.p.version[i]
	if s.times[i]++; s.times[i] > 1 {
		s.res.Resent += page.Size
	}
	s.res.Sent += page.Size
}

// switchOver freezes the program, which runs no more, and compares.
func (s *run) switchOver() {
	s.res.Total = s.now
	if s.res.Action == plan.GiveUp {
		return
	}
	written := s.p.scan()
	rest := page.Union(&s.left, &written)
	s.res.Remainder = rest.Bytes()
	s.res.Downtime = s.State
	if s.res.Action == plan.Switch {
		s.res.Downtime += s.RTT + s.took(rest.Bytes())
		s.res.Total += s.State + s.RTT
	}
	s.res.Total += s.took(rest.Bytes())
	each(rest, s.send)
	for i := range s.there {
		if s.there[i] != s.p.version[i] {
			s.res.Lost++
		}
	}
}
