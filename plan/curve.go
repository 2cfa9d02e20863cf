package plan

import (
	"slices"
	"time"
)

// Point says that a program wrote Bytes, each page counted once, within Interval.
type Point struct {
	Interval time.Duration
	Bytes    uint64
}

func (p Point) rate() float64 { return float64(p.Bytes) / p.Interval.Seconds() }

// Curve is a working set curve (Denning 1968, of writes only): how much memory
// is written at least once in an interval, by the length of the interval. A
// program that writes 1 GiB/s into the same 64 MiB dirties 64 MiB in a second as in a
// minute, and that is what decides whether pre-copy converges. The zero value
// knows nothing.
type Curve struct{ points []Point }

// maxPoints bounds a Curve. More than it has scans of different lengths, as rounds
// get shorter by factors.
const maxPoints = 16

// Points returns what the curve goes through, by interval. Read only.
func (c *Curve) Points() []Point { return c.points }

// Known reports whether the curve has a point.
func (c *Curve) Known() bool { return len(c.points) > 0 }

// Clone returns a copy that shares nothing with c.
func (c *Curve) Clone() Curve { return Curve{slices.Clone(c.points)} }

// Add puts a point in. A longer interval has at least as many dirty pages as a
// shorter one, and at most as many per second: what c held and contradicts that is
// dropped, since the program does something else now, and so is a point of nearly
// the same interval.
func (c *Curve) Add(p Point) {
	if p.Interval <= 0 {
		return
	}
	c.points = slices.DeleteFunc(c.points, func(o Point) bool {
		switch {
		case o.Interval < p.Interval:
			return o.Bytes > p.Bytes || o.rate() < p.rate() || 4*o.Interval > 3*p.Interval
		default:
			return o.Bytes < p.Bytes || o.rate() > p.rate() || 3*o.Interval < 4*p.Interval
		}
	})
	if len(c.points) == maxPoints {
		c.points = slices.Delete(c.points, maxPoints/2, maxPoints/2+1)
	}
	i := 0
	for i < len(c.points) && c.points[i].Interval < p.Interval {
		i++
	}
	c.points = slices.Insert(c.points, i, p)
}

// At is how many bytes are dirty after an interval.
//
// It interpolates interval/bytes, the inverse of the mean rate, by straight lines:
// a saturating curve t/(a+bt) goes through both neighbours. A uniform writer
// (1-exp(-t)) is met within a few percent, and so is one of mixed rates. Beyond the
// last point the curve goes on as its last two points say, before the first one
// with the rate of the first. It never falls, and its mean rate never grows.
func (c *Curve) At(t time.Duration) float64 {
	n := len(c.points)
	if n == 0 || t <= 0 {
		return 0
	}
	s := t.Seconds()
	if first := c.points[0]; n == 1 || t <= first.Interval {
		return first.rate() * s
	}
	i := 1
	for i < n-1 && c.points[i].Interval < t {
		i++
	}
	p, q := c.points[i-1], c.points[i]
	if p.Bytes == 0 || q.Bytes == 0 {
		return float64(q.Bytes)
	}
	ps, qs := p.Interval.Seconds(), q.Interval.Seconds()
	x, y := 1/p.rate(), 1/q.rate()
	b := (y - x) / (qs - ps)
	return s / (x + b*(s-ps))
}

// Rate is the dirty rate over an interval, in bytes per second.
func (c *Curve) Rate(t time.Duration) float64 {
	if t <= 0 {
		return 0
	}
	return c.At(t) / t.Seconds()
}
