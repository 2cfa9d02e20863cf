package codec

import (
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
)

func TestMode(t *testing.T) {
	for m := Auto; m <= Never; m++ {
		if got, err := ParseMode(m.String()); err != nil || got != m {
			t.Errorf("%v became %v, %v", m, got, err)
		}
	}
	if _, err := ParseMode("zstd"); err == nil {
		t.Error("zstd is not known")
	}
}

// content is how a kind of memory compresses: ns per byte, and what is left of it.
type content struct{ ns, left float64 }

var (
	textual = content{2.6, 0.5}
	sparse  = content{0.3, 0.06}
	noise   = content{0.15, 1}
)

const groupBytes = 16 * page.Size

// drive lets c decide about groups of those contents. It returns how many were
// compressed, and the time in ns that all of them took, codec and lane, over a
// lane that takes ns per byte.
func drive(c *Chooser, ns float64, groups []content) (compressed int, took float64) {
	compressed, _, took = driveProbes(c, ns, groups)
	return compressed, took
}

func driveProbes(c *Chooser, ns float64, groups []content) (compressed, probes int, took float64) {
	for _, g := range groups {
		run := func(bytes float64) (out int, d time.Duration) {
			took += g.ns * bytes
			if g.left < 1 {
				out = int(g.left * bytes)
			}
			return out, time.Duration(g.ns * bytes)
		}
		step, sent := c.Next(groupBytes), float64(groupBytes)
		if step == Probe {
			step = Raw
			probes++
			// A single page shrinks less, and costs more for each byte.
			out, d := run(page.Size)
			if c.Probed(groupBytes, out*9/8, d*9/8) {
				step = Try
			}
		}
		if step == Try {
			out, d := run(groupBytes)
			c.Tried(groupBytes, out, d)
			if out > 0 {
				compressed++
				sent = float64(out)
			}
		}
		took += sent * ns
	}
	return compressed, probes, took
}

func repeat(n int, cs ...content) (all []content) {
	for range n {
		all = append(all, cs...)
	}
	return all
}

// The lanes, in ns per byte.
const (
	gbit1  = 8.4
	gbit10 = 0.84
	local  = 0.37
)

func TestChooserAuto(t *testing.T) {
	const n = 10000
	for _, c := range []struct {
		name    string
		ns      float64
		groups  []content
		atLeast int // groups compressed
		atMost  int
		loss    float64 // against leaving all as it is; below 0 it is a win
	}{
		{"text over 1 Gbit/s", gbit1, repeat(n, textual), n - 2, n, -0.15},
		{"text over 10 Gbit/s", gbit10, repeat(n, textual), 0, 0, 0.012},
		{"text on this machine", local, repeat(n, textual), 0, 0, 0.012},
		{"sparse over 10 Gbit/s", gbit10, repeat(n, sparse), n - 2, n, -0.5},
		{"sparse on this machine", local, repeat(n, sparse), 0, 0, 0.012},
		{"random over 1 Gbit/s", gbit1, repeat(n, noise), 0, 0, 0.012},
		{"random over 10 Gbit/s", gbit10, repeat(n, noise), 0, 0, 0.012},
		{"random on this machine", local, repeat(n, noise), 0, 0, 0.012},
		// Every other group shrinks: none of them is missed for long.
		{"mixed over 1 Gbit/s", gbit1, repeat(n/2, textual, noise), n/2 - 10, n / 2, -0.05},
		{"random, then text", gbit1, append(repeat(n/2, noise), repeat(n/2, textual)...), n/2 - 4, n / 2, -0.05},
		{"text, then random", gbit1, append(repeat(n/2, textual), repeat(n/2, noise)...), n / 2, n / 2, -0.05},
		{"random, then sparse", gbit10, append(repeat(n/2, noise), repeat(n/2, sparse)...), n/2 - maxWait - 1, n / 2, -0.2},
	} {
		var ch Chooser
		ch.SetRate(1e9 / c.ns)
		compressed, took := drive(&ch, c.ns, c.groups)
		raw := c.ns * groupBytes * float64(len(c.groups))
		if loss := took/raw - 1; compressed < c.atLeast || compressed > c.atMost || loss > c.loss {
			t.Errorf("%s: %d groups compressed, %+.2f %% of the time", c.name, compressed, 100*loss)
		}
	}
}

func TestChooserModes(t *testing.T) {
	ch := Chooser{Mode: Always}
	if n, _ := drive(&ch, local, repeat(100, textual, noise)); n != 100 {
		t.Errorf("always: %d of 100 groups that shrink", n)
	}
	ch = Chooser{Mode: Never}
	ch.SetRate(1)
	if s := ch.Next(groupBytes); s != Raw {
		t.Errorf("never: step %d", s)
	}
	var auto Chooser
	if s := auto.Next(groupBytes); s != Raw {
		t.Errorf("the rate is not known: step %d", s)
	}
	auto.SetRate(1e6)
	if s := auto.Next(page.Size); s != Try {
		t.Errorf("a single page, first: step %d", s)
	}
}

// One group in which the thread was held up does not end what pays.
func TestChooserOutlier(t *testing.T) {
	var ch Chooser
	ch.SetRate(1e9 / gbit1)
	drive(&ch, gbit1, repeat(100, textual))
	if s := ch.Next(groupBytes); s != Try {
		t.Fatalf("step %d", s)
	}
	ch.Tried(groupBytes, groupBytes/2, time.Second)
	if n, _ := drive(&ch, gbit1, repeat(100, textual)); n < 98 {
		t.Fatalf("%d of 100 groups after one that took a second", n)
	}
}

// Groups that do not shrink among others that do cost no probes.
func TestChooserMixed(t *testing.T) {
	var ch Chooser
	ch.SetRate(1e9 / gbit1)
	if n, probes, _ := driveProbes(&ch, gbit1, repeat(1000, textual, noise)); n < 999 || probes > 5 {
		t.Fatalf("%d groups compressed, %d probes", n, probes)
	}
}

// A page that shrinks in a group that does not is no reason to try each group.
func TestChooserProbeMisleads(t *testing.T) {
	var ch Chooser
	ch.SetRate(1e9 / gbit1)
	tried := 0
	for range 1000 {
		if ch.Next(groupBytes) == Probe && ch.Probed(groupBytes, page.Size/8, time.Microsecond) {
			ch.Tried(groupBytes, 0, groupBytes) // 1 ns per byte, for nothing
			tried++
		}
	}
	// Each loses an eighth of what the group takes the lane.
	if tried == 0 || tried > 1000/12 {
		t.Fatalf("%d of 1000 groups tried", tried)
	}
}

// A lane that becomes faster than the codec is seen at once.
func TestChooserRateChanges(t *testing.T) {
	var ch Chooser
	ch.SetRate(1e9 / gbit1)
	drive(&ch, gbit1, repeat(100, textual))
	ch.SetRate(1e9 / local)
	if n, _ := drive(&ch, local, repeat(1000, textual)); n > 20 {
		t.Fatalf("%d groups compressed on a lane that is faster", n)
	}
	ch.SetRate(1e9 / gbit1)
	if n, _ := drive(&ch, gbit1, repeat(1000, textual)); n < 1000-maxWait-1 {
		t.Fatalf("%d groups compressed on a lane that is slow again", n)
	}
}

func TestSampler(t *testing.T) {
	s := sampler{window: 1600, worth: 10}
	takes := func() (n int) {
		for h := range uint32(1600) {
			if s.takes(h) {
				n++
			}
		}
		return n
	}
	for want := 1600; want > 100; want /= 2 {
		if n := takes(); n != want {
			t.Fatalf("takes %d, should be %d", n, want)
		}
		for i := range want { // as many as it took of a window
			s.note(i < want/10-1)
		}
	}
	for range 10 * s.window {
		s.note(false)
	}
	if n := takes(); n != 100 {
		t.Fatalf("takes %d where nothing is found", n)
	}
	for i := range 3000 {
		s.note(i%9 == 0)
	}
	if n := takes(); n != 1600 {
		t.Fatalf("takes %d where one in ten is found", n)
	}
}
