package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/plan"
)

// Measured is what a few looks at a running process told of it, and a sample of
// its pages of the link.
type Measured struct {
	Tracker string
	Content uint64 // bytes of pages with content
	// Compared are those of Content that are compared with what was sent.
	Compared uint64
	Curve    plan.Curve // how much it writes
	// Rate is how fast its pages get to where they belong, in bytes of pages per
	// second, and Share how many bytes each of their bytes takes on the wire. 0: not
	// measured, since there is no link or too little to send.
	Rate, Share float64
	Sampled     uint64 // bytes of pages that were sent for it
	Threads     int
	Took        time.Duration
}

// Inputs are those of the model.
func (m *Measured) Inputs(maxDowntime time.Duration, maxThrottle float64) plan.Inputs {
	return plan.Inputs{
		Memory: m.Content, WireRate: m.Rate, Curve: m.Curve, State: StateTime(m.Threads, m.Content) + compareTime(m.Compared),
		Overhead: roundOverhead + lookTime(m.Content), MaxDowntime: maxDowntime, MaxThrottle: maxThrottle,
	}
}

// roundOverhead is what a round costs beside its pages and the look at its end.
const roundOverhead = 2 * time.Millisecond

func perGiB(bytes uint64, each time.Duration) time.Duration {
	return time.Duration(float64(bytes) / (1 << 30) * float64(each))
}

// lookTime estimates what a look costs.
func lookTime(bytes uint64) time.Duration { return perGiB(bytes, 3*time.Millisecond) }

// compareTime estimates how long the freeze takes longer for memory that must be
// read to know whether it is as it was sent.
func compareTime(bytes uint64) time.Duration { return perGiB(bytes, 250*time.Millisecond) }

// StateTime estimates what the switch costs without any page: threads are
// stopped, captured and rebuilt one by one, and page tables are walked.
func StateTime(threads int, bytes uint64) time.Duration {
	const base, thread = 15 * time.Millisecond, 250 * time.Microsecond
	return base + time.Duration(threads)*thread + perGiB(bytes, 6*time.Millisecond)
}

const (
	// firstLooks follow the very first one, with firstPause between them: they tell
	// how fast memory is dirtied, and which. One more comes after the sample, before
	// the first round.
	firstLooks = 1
	firstPause = 40 * time.Millisecond
	// onlyLooks are those of Measure and Rehearse, which have nothing else to go by.
	onlyLooks = 3
	onlyPause = 50 * time.Millisecond
	// samplePiece is what the sample consists of, all over the memory: what lies
	// together is alike, and shrinks alike.
	samplePiece = 256 << 10
	// sampleTime is enough for all samples, and slowest too long for one.
	sampleTime = 60 * time.Millisecond
	slowest    = 250 * time.Millisecond
)

// samples are sent one after the other until that has taken long enough: 63 MiB at
// most, and over 1 Gbit/s not more than 7. The first only warms up where there are
// others.
var samples = [...]uint64{1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20, 32 << 20}

// Measure looks at a running process for onlyLooks times onlyPause. It stands still
// for some milliseconds once, when the tracking begins, and its first write to each
// page is slower meanwhile. The tracking ends with p.Close.
func Measure(ctx context.Context, p Process, o Offer) (Measured, error) {
	r := &rounds{s: bare(SourceConfig{Process: p, Offer: o})}
	begin := time.Now()
	err := r.track(ctx)
	if err == nil {
		err = r.begin(ctx, onlyLooks, onlyPause)
	}
	return r.measured(begin), err
}

// bare is a source that is only to ask something.
func bare(cfg SourceConfig) *Source {
	s := &Source{cfg: cfg, log: cfg.Log, t: cfg.Timeouts.WithDefaults()}
	if s.log == nil {
		s.log = discard
	}
	s.cfg.Hello.Version = ProtocolVersion
	if cfg.Journals != nil {
		s.cfg.Hello.Incarnation = cfg.Journals.Incarnation()
	}
	return s
}

func (r *rounds) track(ctx context.Context) error {
	s := r.s
	return s.engine("track", func() (err error) { s.res.Tracker, err = s.cfg.Process.Track(ctx); return err })
}

func (r *rounds) measured(begin time.Time) Measured {
	return Measured{Tracker: r.s.res.Tracker, Content: r.content.Bytes(), Compared: r.compare, Curve: r.hist.Curve(),
		Rate: r.rate, Share: r.share, Sampled: r.sample.Pages << page.Shift,
		Threads: r.s.cfg.Offer.Threads, Took: time.Since(begin)}
}

// probe measures the link with pages that have to cross it anyway, and that are the
// least likely to be written again. What it sends is part of the first round.
func (r *rounds) probe(ctx context.Context) error {
	r.last = Round{Round: 1}
	// Laying the mappings out is not to be measured.
	if err := r.land(ctx, Batch{Layout: r.layout}); err != nil {
		return err
	}
	start, before := time.Now(), r.s.cfg.Lanes.BytesSent()
	first, was := start, before // where what counts began
	var sent uint64             // since then
	for i, want := range samples {
		cold := page.Difference(&r.content, &r.clean)
		if c := page.Difference(&cold, &r.hot); c.Bytes() >= want {
			cold = c
		}
		send := spread(&cold, want)
		if send.Bytes() < want && i > 0 || send.Empty() {
			break
		}
		if i == 1 {
			first, was, sent = time.Now(), r.s.cfg.Lanes.BytesSent(), 0
		}
		begin := time.Now()
		if err := r.land(ctx, Batch{Classes: []page.Set{send}}); err != nil {
			return err
		}
		sent += send.Bytes()
		took, all := time.Since(begin), time.Since(first)
		if i > 0 || took >= slowest/2 {
			r.rate = float64(sent) / all.Seconds()
			r.share = float64(r.s.cfg.Lanes.BytesSent()-was) / float64(sent)
		}
		if i > 0 && time.Since(start) >= sampleTime || 2*took > slowest {
			break
		}
	}
	r.sample = r.last
	r.sample.MS, r.sample.BytesWire = ms(start, time.Now()), r.s.cfg.Lanes.BytesSent()-before
	r.last = Round{}
	return nil
}

// spread takes about want bytes of s, evenly from all of it.
func spread(s *page.Set, want uint64) (out page.Set) {
	total := s.Bytes()
	if total <= want {
		return s.Clone()
	}
	// A piece from the middle of every step, both counted in what s has.
	step := uint64(float64(total)/float64(want)*samplePiece) &^ (page.Size - 1)
	piece := (step - min(step, samplePiece)) / 2 &^ (page.Size - 1)
	var at uint64
	for _, r := range s.Ranges() {
		for end := at + r.Bytes(); piece < end; piece += step {
			from, to := max(piece, at), min(piece+samplePiece, end)
			if from < to {
				out.Add(page.Range{Start: r.Start + page.Addr(from-at), End: r.Start + page.Addr(to-at)})
			}
			if piece+samplePiece > end {
				break // the rest of it is in the next range
			}
		}
		at += r.Bytes()
	}
	return out
}

// Rehearsal is what came of a dry run.
type Rehearsal struct {
	Hello    Hello // of the destination
	Measured Measured
	// Failed is why nothing was measured, or not the link.
	Failed error
}

// Rehearse is a dry run with a measurement: it asks the destination as a hybrid
// migration does, looks at the process, lands a sample of its pages in the
// process-to-be, and takes all that back. Nothing is journalled here, and the
// process is not moved to another cgroup; the tracking ends with Process.Close.
// The caller closes the lanes.
func Rehearse(ctx context.Context, cfg SourceConfig) (Rehearsal, error) {
	cfg.Offer.Mode = ModeHybrid
	s := bare(cfg)
	c, err := s.connect(ctx)
	if err != nil {
		return Rehearsal{}, err
	}
	defer c.close()
	out := Rehearsal{Hello: c.hello}
	acc, err := s.offer(ctx, c)
	if err != nil {
		return out, err
	}
	out.Measured, out.Failed = s.rehearse(ctx, c, acc)
	if errors.Is(out.Failed, ErrGone) {
		err = out.Failed
	}
	if c.send(abortMsg{Reason: "only asked"}) == nil { // else it aborts by itself
		_, _ = c.recvIn(ctx, s.t.Settle, "aborted")
	}
	return out, errors.Join(err, context.Cause(ctx))
}

func (s *Source) rehearse(ctx context.Context, c *control, acc *acceptMsg) (Measured, error) {
	ctx, stop := follow(ctx, c.ctx)
	defer stop()
	begin, r := time.Now(), &rounds{s: s, c: c}
	if err := r.track(ctx); err != nil {
		return Measured{}, err
	}
	if err := r.begin(ctx, onlyLooks, onlyPause); err != nil {
		return r.measured(begin), err
	}
	if err := s.engine("open", func() error { return s.cfg.Lanes.Open(ctx, acc.Epoch, acc.Key, s.cfg.Process) }); err != nil {
		return r.measured(begin), err
	}
	ctx, stopLanes := watchLanes(ctx, s.cfg.Lanes.Lost(), laneGrace)
	defer stopLanes()
	err := r.probe(ctx)
	if err == nil && r.rate == 0 {
		err = fmt.Errorf("%d KiB are too little to measure a link with", r.content.Bytes()>>10)
	}
	return r.measured(begin), err
}
