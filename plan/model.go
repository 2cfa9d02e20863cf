package plan

import (
	"fmt"
	"math"
	"time"

	"github.com/pageferry/pageferry/page"
)

// Mode is a method of migration, as on the command line.
type Mode string

const (
	ModeStop     Mode = "stop"
	ModePreCopy  Mode = "precopy"
	ModePostCopy Mode = "postcopy"
	ModeHybrid   Mode = "hybrid"
)

// Inputs is what a prediction is made from: two or three short looks at the
// running process, and the measured rate of the link.
type Inputs struct {
	Memory   uint64  // with content, in bytes
	WireRate float64 // bytes per second
	// Curve is what the looks saw ([History.Curve]). Default: nothing is written.
	Curve Curve
	// Touched is the same for reads and writes, for faults after the switch, where
	// the tracker knows it. Default: Curve, which is too little.
	Touched Curve
	// State is what the switch costs without pages.
	State time.Duration
	// Overhead is what a round costs beside sending: scans, round trips.
	Overhead time.Duration
	// FaultCost is how long a thread waits for a page that it faults on.
	// Default: 150 us.
	FaultCost time.Duration
	// MaxDowntime and MaxThrottle are what is allowed, as in [Config].
	MaxDowntime time.Duration
	MaxThrottle float64
	// NoPostCopy says that memory cannot follow after the switch here.
	NoPostCopy bool
}

// Prediction is what a method would cost.
type Prediction struct {
	Mode  Mode
	Total time.Duration // until the last page is there
	// Downtime is how long the program stands still at the switch.
	Downtime time.Duration
	Sent     uint64 // bytes of pages
	Resent   uint64 // of these, what is sent more than once
	Rounds   int
	// Remainder is what the rounds leave, in bytes: for the switch, or, in
	// postcopy and in a hybrid that does not converge, for the time after it.
	Remainder uint64
	// Converges reports whether all would be there within the allowed downtime.
	// A precopy that does not gives up.
	Converges bool
	Throttle  float64
	// Stalled is how long the program waits for pages after the switch, and
	// Slowdown which part of that time, 0 to 1.
	Stalled  time.Duration
	Slowdown float64
	Reason   string
}

// Predictions is one for each method.
type Predictions struct{ Stop, PreCopy, PostCopy, Hybrid Prediction }

// All returns them in the order in which they are shown.
func (p *Predictions) All() []Prediction {
	return []Prediction{p.Stop, p.PreCopy, p.PostCopy, p.Hybrid}
}

// Predict says what each method would cost. Pre-copy and hybrid are led by the
// rules of [Rounds] themselves, over a process that writes along its Curve.
//
// It knows what the looks saw. Writes are taken to go on as they did, and where
// a curve of short looks shows no bend, the working set is unknown and taken for
// as large as it may be, which makes predictions of pre-copy gloomy. Of reads it
// knows nothing unless it is told.
func Predict(in Inputs) (Predictions, error) {
	if !(in.WireRate > 0) || math.IsInf(in.WireRate, 0) {
		return Predictions{}, fmt.Errorf("%w: a wire rate of %v: measure the link first", ErrConfig, in.WireRate)
	}
	if in.FaultCost == 0 {
		in.FaultCost = 150 * time.Microsecond
	}
	if !in.Touched.Known() {
		in.Touched = in.Curve
	}
	var p Predictions
	var err error
	if p.PreCopy, err = in.rounds(false); err != nil {
		return p, err
	}
	if p.Hybrid, err = in.rounds(true); err != nil {
		return p, err
	}
	whole := seconds(float64(in.Memory), in.WireRate)
	p.Stop = Prediction{Mode: ModeStop, Total: in.State + whole, Downtime: in.State + whole, Sent: in.Memory,
		Remainder: in.Memory, Converges: in.State+whole <= in.downtime(ModeStop)}
	p.PostCopy = Prediction{Mode: ModePostCopy, Total: in.State + whole, Downtime: in.State, Sent: in.Memory,
		Remainder: in.Memory}
	in.faults(&p.PostCopy, func(t time.Duration) float64 { return in.Touched.At(t) })
	return p, nil
}

// downtime is what is allowed in a mode. Stop and post-copy are held to what hybrid is.
func (in *Inputs) downtime(m Mode) time.Duration {
	c := Config{MaxDowntime: in.MaxDowntime, PostCopy: m != ModePreCopy}
	c.EnsureDefaults()
	return c.MaxDowntime
}

// faults counts pages that are touched before they came: of a remainder that
// arrives at a steady rate over T, a page touched at t is still missing with
// probability 1-t/T, so that the mean of touched over [0, T] is what faults.
func (in *Inputs) faults(p *Prediction, touched func(time.Duration) float64) {
	const steps = 32
	whole := seconds(float64(p.Remainder), in.WireRate)
	var mean float64
	for i := range steps {
		mean += min(touched(whole*time.Duration(2*i+1)/(2*steps)), float64(p.Remainder)) / steps
	}
	p.Stalled = min(whole, time.Duration(mean/page.Size*float64(in.FaultCost)))
	if whole > 0 {
		p.Slowdown = p.Stalled.Seconds() / whole.Seconds()
	}
}

// written is the curve under a throttle, at most the memory.
func (in *Inputs) written(t time.Duration, throttle float64) float64 {
	return min(in.Curve.At(time.Duration(float64(t)*(1-throttle))), float64(in.Memory))
}

// again is which part of what was written within before is written once more
// within t: of two windows that follow each other, c(before)+c(t)-c(before+t) is
// written in both.
func (in *Inputs) again(before, t time.Duration, throttle float64) float64 {
	of := in.written(before, throttle)
	if of == 0 {
		return 0
	}
	return min(1, max(0, (of+in.written(t, throttle)-in.written(before+t, throttle))/of))
}

// round walks through one round in slices, skipping what is written before its
// turn. Of the first round, whose pages the order sorts, only the working set at
// its end can be skipped.
func (in *Inputs) round(dirty uint64, before time.Duration, throttle float64) (sent float64, took time.Duration) {
	const slices = 64
	left := float64(dirty)
	if before == 0 {
		const long = 24 * time.Hour
		set := min(in.Curve.At(long), left)
		sent, left = left-set, set
		took = seconds(sent, in.WireRate)
		before = long
	}
	for range slices {
		n := left / slices * (1 - in.again(before, took, throttle))
		sent += n
		took += seconds(n, in.WireRate)
	}
	return sent, took
}

// rounds lets Rounds lead a migration over the model.
func (in *Inputs) rounds(hybrid bool) (Prediction, error) {
	p := Prediction{Mode: ModePreCopy}
	if hybrid {
		p.Mode = ModeHybrid
	}
	r, err := NewRounds(Config{MaxDowntime: in.MaxDowntime, PostCopy: hybrid, MaxThrottle: in.MaxThrottle,
		Curve: in.Curve, WireRate: in.WireRate})
	if err != nil {
		return p, err
	}
	var sent float64
	m := Measure{Dirty: in.Memory, State: in.State}
	d := r.Next(m)
	for ; d.Action == Round; d = r.Next(m) {
		n, took := in.round(m.Dirty, m.Elapsed, d.Throttle)
		m.Round, m.Sent, m.Took, m.Elapsed = m.Round+1, uint64(n), took, took+in.Overhead
		m.Elapsed = max(m.Elapsed, time.Microsecond)
		m.Written = uint64(in.written(m.Elapsed, d.Throttle)) &^ (page.Size - 1)
		m.Dirty = m.Written
		sent += n
		p.Total += m.Elapsed
	}
	p.Rounds, p.Throttle, p.Reason, p.Remainder = m.Round, d.Throttle, d.Reason, m.Dirty
	p.Downtime, p.Converges = d.Downtime, d.Action == Switch
	if d.Action != GiveUp {
		sent += float64(m.Dirty)
		p.Total += in.State + seconds(float64(m.Dirty), in.WireRate)
	}
	p.Sent = uint64(sent)
	p.Resent = p.Sent - min(p.Sent, in.Memory)
	if d.Action == PostCopy {
		// Written means touched.
		in.faults(&p, func(t time.Duration) float64 { return float64(m.Dirty) * in.again(m.Elapsed, t, d.Throttle) })
	}
	return p, nil
}

// Choose is the rule of --mode auto:
//
//   - stop, if the whole memory can be moved within the allowed downtime: nothing
//     is simpler;
//   - precopy, if memory cannot follow after the switch here;
//   - postcopy, if rounds would leave most of the memory to be sent after the switch
//     anyway: they would only cost time and traffic;
//   - otherwise hybrid, which is precopy as long as that converges, and does not
//     give up when it does not.
func Choose(in Inputs, maxDowntime time.Duration) (Mode, string, error) {
	const most = 0.75
	in.MaxDowntime = maxDowntime
	p, err := Predict(in)
	if err != nil {
		return "", "", err
	}
	switch h := &p.Hybrid; {
	case p.Stop.Converges:
		return ModeStop, fmt.Sprintf("all of %s can be moved in %s, %s are allowed",
			size(in.Memory), ms(p.Stop.Downtime), ms(in.downtime(ModeStop))), nil
	case in.NoPostCopy:
		return ModePreCopy, "memory cannot follow after the switch here; " + p.PreCopy.outlook(), nil
	case !h.Converges && float64(h.Remainder) > most*float64(in.Memory):
		return ModePostCopy, fmt.Sprintf("%s of %s are dirtied while they are sent: rounds would be for nothing",
			size(h.Remainder), size(in.Memory)), nil
	default:
		return ModeHybrid, h.outlook(), nil
	}
}

func (p *Prediction) outlook() string {
	switch {
	case p.Converges:
		return fmt.Sprintf("should converge in %d rounds, with a downtime of %s", p.Rounds, ms(p.Downtime))
	case p.Mode == ModeHybrid:
		return fmt.Sprintf("after %d rounds %s should follow after the switch", p.Rounds, size(p.Remainder))
	default:
		return "it may give up: " + p.Reason
	}
}
