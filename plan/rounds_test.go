package plan

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

func rounds(t testing.TB, c Config) *Rounds {
	t.Helper()
	r, err := NewRounds(c)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// Whatever it is told, it ends, within the bound that its comment derives, and
// keeps to what it is allowed.
func TestRoundsEnd(t *testing.T) {
	r := random(t)
	count := map[Action]int{}
	most := 0
	for range 3000 {
		c := Config{PostCopy: r.IntN(2) == 0, MaxDowntime: time.Duration(1 + r.IntN(1e9))}
		if r.IntN(2) == 0 {
			c.MaxThrottle = r.Float64() * 0.999
		}
		if r.IntN(2) == 0 {
			c.WireRate = r.Float64() * gib
		}
		x := rounds(t, c)
		memory := page.Size * (1 + r.Uint64N(1<<r.IntN(22)))
		m := Measure{Dirty: memory, State: time.Duration(r.IntN(1e8))}
		// An adversary that keeps the remainder just below what counts as
		// progress, or throws dice.
		shrink := 0.8 + 0.3*r.Float64()
		bound := 2*(math.Log(float64(memory)/page.Size)/math.Log(1/productive)+2+10) + 3
		n, throttle := 0, 0.0
		for {
			d := x.Next(m)
			if d.Throttle < throttle || d.Throttle > c.MaxThrottle {
				t.Fatalf("round %d: a throttle of %.2f after %.2f, %.2f is allowed", n, d.Throttle, throttle, c.MaxThrottle)
			}
			if c.PostCopy == (d.Action == GiveUp) && c.PostCopy || !c.PostCopy && d.Action == PostCopy {
				t.Fatalf("round %d, post-copy %v: %v", n, c.PostCopy, d.Action)
			}
			if d.Reason == "" || d.Downtime < 0 || math.IsNaN(d.DirtyRate) || math.IsInf(d.DirtyRate, 0) {
				t.Fatalf("round %d: %+v", n, d)
			}
			if d.Action == Switch && d.Downtime > x.cfg.MaxDowntime {
				t.Fatalf("switches with %v of %v", d.Downtime, x.cfg.MaxDowntime)
			}
			throttle = d.Throttle
			if d.Action != Round {
				count[d.Action]++
				break
			}
			left := m.Dirty + m.Held
			next := uint64(float64(left)*shrink) &^ (page.Size - 1)
			if r.IntN(8) == 0 {
				next = r.Uint64N(memory+1) &^ (page.Size - 1)
			}
			m.Round, m.Sent = n+1, r.Uint64N(m.Dirty+1)
			m.Took = time.Duration(r.IntN(1e9))
			m.Elapsed = m.Took + time.Duration(r.IntN(1e8))
			m.Written = min(memory, next+r.Uint64N(next+1))
			if r.IntN(2) == 0 {
				m.Written = 0 // the most hopeful prediction
			}
			m.Held = r.Uint64N(next + 1)
			m.Dirty = next - m.Held
			if n++; float64(n) > bound {
				t.Fatalf("%d rounds of %d pages, at most %.0f are possible", n, memory/page.Size, bound)
			}
		}
		most = max(most, n)
	}
	t.Logf("most rounds: %d; ends: %v", most, count)
	for _, a := range []Action{Switch, PostCopy, GiveUp} {
		if count[a] < 10 {
			t.Errorf("%v was reached %d times: the test tests too little", a, count[a])
		}
	}
}

// after is a measure after a round over a link of 1 GiB/s.
func after(round int, sent, left uint64) Measure {
	took := seconds(float64(sent), gib)
	return Measure{Round: round, Sent: sent, Took: took, Elapsed: took, Written: left, Dirty: left, State: 10 * time.Millisecond}
}

func TestRoundsByHand(t *testing.T) {
	var quiet, busy Curve
	quiet.Add(Point{50 * time.Millisecond, 1 * mib})
	busy.Add(Point{50 * time.Millisecond, 150 * mib}) // 3000 MiB/s
	begin := Measure{Dirty: 4 * gib, State: 10 * time.Millisecond}
	for _, c := range []struct {
		name string
		cfg  Config
		in   []Measure
		want []Action
		says string
	}{
		{"small", Config{WireRate: gib}, []Measure{{Dirty: 100 * mib, State: time.Millisecond}}, []Action{Switch}, "100 MiB are left"},
		{"small, of an unknown link", Config{}, []Measure{{Dirty: 100 * mib}}, []Action{Round}, "nothing has been sent"},
		{"nothing", Config{}, []Measure{{}}, []Action{Switch}, ""},
		{"converges", Config{Curve: quiet}, []Measure{begin, after(1, 4*gib, 400*mib), after(2, 400*mib, 20*mib)},
			[]Action{Round, Round, Switch}, "20 MiB are left"},
		{"fits pre-copy, not hybrid", Config{}, []Measure{begin, after(1, 4*gib, 200*mib)}, []Action{Round, Switch}, "205 ms"},
		{"hybrid goes on", Config{PostCopy: true, Curve: quiet}, []Measure{begin, after(1, 4*gib, 200*mib)}, []Action{Round, Round}, "another round"},
		{"hybrid, too busy", Config{PostCopy: true, Curve: busy}, []Measure{begin, after(1, 3*gib, gib)},
			[]Action{Round, PostCopy}, "another round would leave"},
		{"hybrid, no progress", Config{PostCopy: true, Curve: quiet}, []Measure{begin, after(1, 4*gib, 4*gib)},
			[]Action{Round, PostCopy}, "no less than before"},
		{"hybrid, enough sent", Config{PostCopy: true, Extra: 0.01, Curve: quiet}, []Measure{begin, after(1, 4*gib, 500*mib)},
			[]Action{Round, PostCopy}, "are sent and 500 MiB left"},
		{"hybrid, soon enough sent", Config{PostCopy: true, Extra: 0.125, Curve: quiet}, []Measure{begin, after(1, 4*gib, 500*mib)},
			[]Action{Round, PostCopy}, "in all for 4.0 GiB"},
		{"hybrid, state too long", Config{PostCopy: true}, []Measure{{Dirty: gib, State: time.Second}, {Round: 1, Sent: gib, Took: time.Second, Elapsed: time.Second, State: time.Second}},
			[]Action{Round, PostCopy}, "nothing is left"},
		{"pre-copy, state too long", Config{}, []Measure{{Dirty: gib, State: time.Second}}, []Action{GiveUp}, "the state alone"},
		{"gives up", Config{Curve: busy}, []Measure{begin, after(1, 4*gib, gib), after(2, gib, gib), after(3, gib, gib)},
			[]Action{Round, Round, Round, GiveUp}, "a throttle, or hybrid"},
		{"slows, then gives up", Config{MaxThrottle: 0.25, Curve: busy},
			[]Measure{begin, after(1, 4*gib, gib), after(2, gib, gib), after(3, gib, gib), after(4, gib, gib), after(5, gib, gib)},
			[]Action{Round, Round, Round, Round, Round, GiveUp}, "a stronger throttle"},
		{"a bad round is forgiven", Config{Curve: quiet},
			[]Measure{begin, after(1, 4*gib, 2*gib), after(2, 2*gib, 2*gib), after(3, 2*gib, gib), after(4, gib, gib)},
			[]Action{Round, Round, Round, Round, Round}, ""},
	} {
		x := rounds(t, c.cfg)
		var d Decision
		for i, m := range c.in {
			d = x.Next(m)
			if d.Action != c.want[i] {
				t.Errorf("%s, round %d: %v (%s), want %v", c.name, i, d.Action, d.Reason, c.want[i])
				break
			}
		}
		if !strings.Contains(d.Reason, c.says) {
			t.Errorf("%s: %q does not say %q", c.name, d.Reason, c.says)
		}
	}
}

// The steps of the throttle: a fifth, then tenths, steps without effect passed over.
func TestThrottleSteps(t *testing.T) {
	// 1.05 GiB/s over a link of 1 GiB/s, everywhere: a fifth less converges.
	var c Curve
	c.Add(Point{time.Second, 1075 * mib})
	x := rounds(t, Config{MaxThrottle: 0.9, Curve: c})
	x.Next(Measure{Dirty: 4 * gib})
	for i := 1; i <= 2; i++ {
		if d := x.Next(after(i, 4*gib, 4*gib)); i == 2 && d.Throttle != throttleFrom {
			t.Errorf("the first throttle is %.2f (%s), want %.2f", d.Throttle, d.Reason, throttleFrom)
		}
	}
	// 5 GiB/s: nothing less than 0.9 will do, so that it is not tried.
	c = Curve{}
	c.Add(Point{time.Second, 5 * gib})
	x = rounds(t, Config{MaxThrottle: 0.9, Curve: c})
	x.Next(Measure{Dirty: 4 * gib})
	for i := 1; i <= 2; i++ {
		m := after(i, 4*gib, 4*gib)
		m.Written = 20 * gib // more than the memory, so that no bend misleads
		if d := x.Next(m); i == 2 && (d.Throttle < 0.8 || d.Throttle > 0.9) {
			t.Errorf("the first throttle is %.2f (%s), want one that works", d.Throttle, d.Reason)
		}
	}
}

func TestStop(t *testing.T) {
	for _, post := range []bool{false, true} {
		x := rounds(t, Config{PostCopy: post})
		x.Next(Measure{Dirty: 4 * gib})
		if x.Stop(2*gib, 2500*mib) {
			t.Error("stops though hardly anything was sent for nothing")
		}
		if x.Stop(3*gib, 2500*mib) != post {
			t.Errorf("post-copy %v: stop %v", post, !post)
		}
	}
}

func TestDowntimeCountsTheLag(t *testing.T) {
	x := rounds(t, Config{WireRate: gib})
	var c Curve
	c.Add(Point{time.Second, gib})
	x.curve = c
	d := x.Next(Measure{Dirty: 100 * mib, Lag: 100 * time.Millisecond})
	if want := 197 * time.Millisecond; d.Downtime < want || d.Downtime > want+4*time.Millisecond {
		t.Errorf("100 MiB and 100 ms of writing at 1 GiB/s take %v at 1 GiB/s", d.Downtime)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{{MaxDowntime: -1}, {MaxThrottle: 1}, {MaxThrottle: -0.1}, {MaxThrottle: math.NaN()},
		{Extra: -1}, {WireRate: -1}} {
		if _, err := NewRounds(c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
	for post, want := range map[bool]time.Duration{false: 300 * time.Millisecond, true: 50 * time.Millisecond} {
		if x := rounds(t, Config{PostCopy: post}); x.cfg.MaxDowntime != want {
			t.Errorf("default downtime with post-copy %v: %v, want %v", post, x.cfg.MaxDowntime, want)
		}
	}
}

// A slow link is believed after one round; a tiny round says nothing.
func TestWireRate(t *testing.T) {
	var w rate
	w.add(4*gib, 4*time.Second)
	w.add(64<<10, 10*time.Millisecond)
	if got := w.value() / gib; got < 0.95 {
		t.Errorf("after a round of one round trip the link carries %.2f GiB/s", got)
	}
	w.add(gib/2, 2*time.Second)
	if got := w.value() / gib; got > 0.5 {
		t.Errorf("after 2 s at 0.25 GiB/s the link carries %.2f GiB/s", got)
	}
}
