package codec

import (
	"fmt"
	"math"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/page"
)

// Mode is what is compressed.
type Mode uint8

const (
	Auto   Mode = iota // what gets across sooner
	Always             // all that shrinks
	Never
)

// String is the value of --compress.
func (m Mode) String() string {
	switch m {
	case Auto:
		return "auto"
	case Always:
		return "lz4"
	case Never:
		return "none"
	}
	return fmt.Sprintf("mode(%d)", uint8(m))
}

// ParseMode reads a value of --compress.
func ParseMode(s string) (Mode, error) {
	for m := Auto; m <= Never; m++ {
		if s == m.String() {
			return m, nil
		}
	}
	return 0, fmt.Errorf("codec: compression %q is not known; it is auto, lz4 or none", s)
}

// Step is what a Chooser wants to be done with a group.
type Step uint8

const (
	Raw   Step = iota // leave it as it is
	Probe             // compress one page of it and call Probed
	Try               // compress it and call Tried
)

// Chooser decides in mode Auto, group by group, whether compressing pays: whether
// the bytes saved would have taken the lane longer than the codec takes. Both are
// measured, so nothing is assumed about processors, links or content.
//
// While it pays, every group is tried. Once it does not, groups are left alone,
// and now and then one page of one is compressed to see whether that has
// changed: as often as costs a hundredth of the lane's time, whatever the
// content and however fast the lane. So random memory is not held up, and on a
// lane that is faster than the codec nothing is compressed.
//
// The zero value is in mode Auto and leaves everything as it is until SetRate.
// One goroutine uses a Chooser; only SetRate is safe to be called by others.
type Chooser struct {
	Mode Mode

	perByte atomic.Uint64 // ns that a byte takes the lane, as the bits of a float64

	gain float64 // ns won per byte, of recent groups; above 0 while it pays
	wait int     // groups to leave alone before the next probe
}

const (
	// weight of a new group in what is known of recent ones.
	weight = 1.0 / 8
	// margin is what the time saved must be of the codec's to pay. There are
	// costs that are not measured here: the decoder's, which is a tenth to a
	// fifth of the compressor's, and what another thread could do meanwhile.
	margin = 1.25
	// probing may take this part of the lane's time.
	probing = 1.0 / 100
	// maxWait bounds how long a change of content goes unseen, in groups.
	maxWait = 64
)

// SetRate tells how many bytes a second the lane takes, while something is being
// sent; 0 if that is not known.
func (c *Chooser) SetRate(bytesPerSecond float64) {
	ns := 0.0
	if bytesPerSecond > 0 {
		ns = 1e9 / bytesPerSecond
	}
	c.perByte.Store(math.Float64bits(ns))
}

func (c *Chooser) nsPerByte() float64 { return math.Float64frombits(c.perByte.Load()) }

// Next says what to do with a group of that many bytes.
func (c *Chooser) Next(bytes int) Step {
	switch {
	case c.Mode == Always:
		return Try
	case c.Mode == Never || c.nsPerByte() == 0:
		return Raw
	case c.gain > 0:
		return Try
	case c.wait > 0:
		c.wait--
		return Raw
	case bytes <= page.Size:
		return Try // which is the same
	}
	return Probe
}

// Probed is told that a page of a group of that many bytes became out bytes in d,
// or did not shrink if out is 0. It reports whether the group is to be tried.
func (c *Chooser) Probed(bytes, out int, d time.Duration) bool {
	if c.won(page.Size, out, float64(d)) > 0 {
		return true
	}
	c.rest(bytes, float64(d))
	return false
}

// Tried is told that a group of in bytes became out bytes in d, or did not shrink
// if out is 0.
func (c *Chooser) Tried(in, out int, d time.Duration) {
	if c.Mode != Auto {
		return
	}
	won := c.won(in, out, float64(d)) / float64(in)
	if c.gain > 0 {
		// Where the average has lost, the next group is probed: it may have been
		// one in which the thread was held up.
		c.gain = max(c.gain+(won-c.gain)*weight, 0)
		return
	}
	if c.gain = max(won, 0); won <= 0 {
		c.rest(in, -won*float64(in))
	}
}

// won is how many ns were won by making in bytes to out in ns.
func (c *Chooser) won(in, out int, ns float64) float64 {
	saved := 0
	if out > 0 {
		saved = in - out
	}
	return float64(saved)*c.nsPerByte() - margin*ns
}

// rest waits for as many groups of that many bytes as make a loss of lost ns
// small beside what they take the lane.
func (c *Chooser) rest(bytes int, lost float64) {
	c.wait = int(min(max(lost/(probing*float64(bytes)*c.nsPerByte()), 1), maxWait))
}
