package plan

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func curve(points ...Point) (c Curve) {
	for _, p := range points {
		c.Add(p)
	}
	return c
}

// The rule of --mode auto, on processes that differ in one thing each.
func TestChoose(t *testing.T) {
	base := Inputs{Memory: 4 * gib, WireRate: gib, State: 10 * time.Millisecond, Overhead: 5 * time.Millisecond,
		Curve: curve(Point{300 * time.Millisecond, 30 * mib}, Point{3 * time.Second, 200 * mib})}
	for _, c := range []struct {
		name string
		set  func(*Inputs)
		want Mode
		says string
	}{
		{"large", func(*Inputs) {}, ModeHybrid, "should converge"},
		{"small", func(in *Inputs) { in.Memory = 30 * mib }, ModeStop, "all of 30 MiB"},
		{"small, slow link", func(in *Inputs) { in.Memory, in.WireRate = 30*mib, 100*mib }, ModeHybrid, ""},
		{"cannot follow", func(in *Inputs) { in.NoPostCopy = true }, ModePreCopy, "should converge"},
		{"dirties much", func(in *Inputs) {
			in.Curve = curve(Point{300 * time.Millisecond, 600 * mib}, Point{3 * time.Second, gib})
		}, ModeHybrid, "should follow after the switch"},
		{"dirties everything", func(in *Inputs) {
			in.Curve = curve(Point{300 * time.Millisecond, 2 * gib}, Point{3 * time.Second, 4 * gib})
		}, ModePostCopy, "rounds would be for nothing"},
		{"dirties everything and cannot follow", func(in *Inputs) {
			in.Curve = curve(Point{300 * time.Millisecond, 2 * gib}, Point{3 * time.Second, 4 * gib})
			in.NoPostCopy = true
		}, ModePreCopy, "may give up"},
	} {
		in := base
		c.set(&in)
		mode, reason, err := Choose(in, 0)
		if err != nil || mode != c.want || !strings.Contains(reason, c.says) {
			t.Errorf("%s: %v (%s) %v, want %v with %q", c.name, mode, reason, err, c.want, c.says)
		}
	}
}

func TestPredict(t *testing.T) {
	in := Inputs{Memory: 4 * gib, WireRate: gib, State: 10 * time.Millisecond}
	p, err := Predict(in)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range p.All() {
		if m.Total != 4010*time.Millisecond || m.Sent != 4*gib || m.Resent != 0 || m.Stalled != 0 {
			t.Errorf("%s of an idle process: %+v", m.Mode, m)
		}
	}
	if p.Stop.Downtime != p.Stop.Total || p.PostCopy.Downtime != in.State || p.PreCopy.Downtime != in.State {
		t.Errorf("downtimes %v, %v and %v", p.Stop.Downtime, p.PostCopy.Downtime, p.PreCopy.Downtime)
	}
	// 1 GiB touched at once: a page is missing half of the time in the mean.
	in.Touched = curve(Point{time.Microsecond, gib}, Point{time.Hour, gib})
	in.FaultCost = 10 * time.Microsecond
	p, _ = Predict(in)
	if want := time.Duration(gib/4096) * 10 * time.Microsecond; p.PostCopy.Stalled < want*9/10 || p.PostCopy.Stalled > want {
		t.Errorf("stalled %v, want nearly %v", p.PostCopy.Stalled, want)
	}
	if s := p.PostCopy.Slowdown; math.Abs(s-0.65) > 0.05 {
		t.Errorf("slowdown %.2f", s)
	}
	for _, rate := range []float64{0, -1, math.NaN(), math.Inf(1)} {
		if _, err := Predict(Inputs{Memory: gib, WireRate: rate}); !errors.Is(err, ErrConfig) {
			t.Errorf("a wire rate of %v: %v", rate, err)
		}
	}
}

// Of what a uniform writer wrote, that part is written again which it writes of all; a
// sequential one comes back only when it is through.
func TestAgain(t *testing.T) {
	in := Inputs{Memory: 4 * gib}
	for _, s := range []time.Duration{100, 500, 1000, 2000, 4000} {
		d := s * time.Millisecond
		in.Curve.Add(Point{d, uint64(gib * (1 - math.Exp(-d.Seconds())))})
	}
	if got, want := in.again(time.Second, 2*time.Second, 0), 1-math.Exp(-2); math.Abs(got-want) > 0.05 {
		t.Errorf("uniform: %.2f are written again, want %.2f", got, want)
	}
	if got, want := in.again(time.Second, 2*time.Second, 0.5), 1-math.Exp(-1); math.Abs(got-want) > 0.05 {
		t.Errorf("uniform at half the speed: %.2f are written again, want %.2f", got, want)
	}
	in.Curve = curve(Point{time.Second, gib}, Point{4 * time.Second, 4 * gib})
	if got := in.again(time.Second, 2*time.Second, 0); got > 0.01 {
		t.Errorf("sequential: %.2f are written again before it is through", got)
	}
}
