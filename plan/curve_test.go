package plan

import (
	"math"
	"testing"
	"time"
)

// Whatever is added, a longer interval never has less dirty memory, and never
// more per second; and the last point is on the curve.
func TestCurveIsMonotone(t *testing.T) {
	r := random(t)
	for range 500 {
		var c Curve
		for range 1 + r.IntN(40) {
			p := Point{time.Duration(1 + r.Uint64N(1<<r.IntN(36))), r.Uint64N(1<<r.IntN(40)) &^ 4095}
			c.Add(p)
			if got := c.At(p.Interval); math.Abs(got-float64(p.Bytes)) > 1+float64(p.Bytes)/1e6 {
				t.Fatalf("%v was added to %v, which says %.0f there", p, c, got)
			}
			if len(c.points) > maxPoints {
				t.Fatalf("%d points", len(c.points))
			}
		}
		last, rate := 0.0, math.Inf(1)
		for at := time.Duration(1000); at < time.Hour; at = at*5/4 + 1 {
			bytes := c.At(at)
			if bytes < last*(1-1e-9) || c.Rate(at) > rate*(1+1e-9) || math.IsNaN(bytes) {
				t.Fatalf("%v: %.0f bytes in %v after %.0f, %.3f/s after %.3f", c, bytes, at, last, c.Rate(at), rate)
			}
			last, rate = bytes, c.Rate(at)
		}
	}
}

// A uniform writer's curve is 1-exp(-t): from a short and a long interval what is
// between them is known.
func TestCurveBetweenLooks(t *testing.T) {
	const set, rate = 1 << 30, 1.5 * (1 << 30)
	at := func(d time.Duration) float64 { return set * (1 - math.Exp(-rate*d.Seconds()/set)) }
	var c Curve
	for _, d := range []time.Duration{50 * time.Millisecond, 2500 * time.Millisecond} {
		c.Add(Point{d, uint64(at(d))})
	}
	for d := 10 * time.Millisecond; d < 5*time.Second; d = d * 5 / 4 {
		if got := c.At(d) / at(d); got < 0.88 || got > 1.12 {
			t.Errorf("%v: %.2f of what is dirty", d, got)
		}
	}
}

// A program that does something else now is believed.
func TestCurveForgets(t *testing.T) {
	var c Curve
	c.Add(Point{time.Second, 1 << 30})
	c.Add(Point{10 * time.Second, 4 << 30})
	c.Add(Point{2 * time.Second, 1 << 20})
	if got := c.At(time.Second); got > 1<<20 {
		t.Errorf("a program gone quiet dirties %.0f bytes in a second", got)
	}
	c.Add(Point{time.Second, 2 << 30})
	if got := c.At(10 * time.Second); got < 2<<30 {
		t.Errorf("a program gone busy dirties %.0f bytes in ten seconds", got)
	}
}
