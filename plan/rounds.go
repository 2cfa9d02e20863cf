package plan

import (
	"errors"
	"fmt"
	"time"
)

// Config says what pre-copy is allowed. The zero value is pre-copy with the
// defaults.
type Config struct {
	// MaxDowntime is how long the program may stand still at the switch.
	// Default: 300 ms, as in QEMU (downtime-limit); with PostCopy 50 ms.
	MaxDowntime time.Duration
	// PostCopy allows the switch before everything is there: hybrid.
	PostCopy bool
	// MaxThrottle is how much of its time the program may be kept from running
	// where pre-copy does not converge otherwise, less than 1. Default: 0, it is
	// never slowed.
	MaxThrottle float64
	// Extra is how much more than the memory hybrid may send, as a part of it,
	// before it prefers post-copy, which sends every page once. Default: 0.25.
	Extra float64
	// Curve is what the scans before the first round saw ([History.Curve]).
	// Default: nothing; then a round is needed to find out.
	Curve Curve
	// WireRate is what the link is taken for until a round has measured it, in
	// bytes per second. Default: unknown.
	WireRate float64
}

// EnsureDefaults replaces zero values by the defaults.
func (c *Config) EnsureDefaults() {
	if c.MaxDowntime == 0 {
		c.MaxDowntime = 300 * time.Millisecond
		if c.PostCopy {
			c.MaxDowntime = 50 * time.Millisecond
		}
	}
	if c.Extra == 0 {
		c.Extra = 0.25
	}
}

// ErrConfig is in the chain of what Validate returns.
var ErrConfig = errors.New("plan: bad configuration")

// Validate reports what is wrong with a configuration that has its defaults.
func (c *Config) Validate() error {
	switch {
	case c.MaxDowntime <= 0:
		return fmt.Errorf("%w: a downtime of %v: must be more than 0", ErrConfig, c.MaxDowntime)
	case !(c.MaxThrottle >= 0 && c.MaxThrottle < 1):
		return fmt.Errorf("%w: a throttle of %v: must be at least 0 and less than 1", ErrConfig, c.MaxThrottle)
	case !(c.Extra >= 0):
		return fmt.Errorf("%w: extra traffic of %v: must not be negative", ErrConfig, c.Extra)
	case !(c.WireRate >= 0):
		return fmt.Errorf("%w: a wire rate of %v: must not be negative", ErrConfig, c.WireRate)
	}
	return nil
}

// Action is what comes next.
type Action int

const (
	Round    Action = iota // send what is dirty, while the program runs
	Switch                 // freeze, send the remainder, run at the destination
	PostCopy               // freeze, run at the destination, send the remainder after
	GiveUp                 // leave the process as it was
)

func (a Action) String() string {
	return [...]string{"round", "switch", "post-copy", "give up"}[a]
}

// Measure is what is known after a round and the scan that ended it.
type Measure struct {
	// Round is the number of the round that has ended. 0: none has begun, Dirty
	// is the whole memory.
	Round int
	// Sent is how many bytes of pages the round sent, in Took.
	Sent uint64
	Took time.Duration
	// Written is how many bytes the scan found written since the scan before
	// it, Elapsed ago.
	Written uint64
	Elapsed time.Duration
	// Dirty is how many bytes the next round would have to send, and Held how
	// many would be held back from it. Together they are the remainder.
	Dirty uint64
	Held  uint64
	// State is what the switch is estimated to cost without any page.
	State time.Duration
	// Lag is how long the program will have run on after this scan when it is
	// frozen: what it writes in that time is part of the remainder.
	Lag time.Duration
}

// Decision is what comes next, and what led to it.
type Decision struct {
	Action Action
	// Throttle is the part of its time in which the program is not to run from
	// now on, 0 to Config.MaxThrottle.
	Throttle float64
	// Downtime is what a switch now would cost; for PostCopy what it will cost,
	// faults after it not included. 0: the rate of the link is not known yet.
	Downtime time.Duration
	// DirtyRate is how fast the program dirties memory, over the time that the next
	// round would take, and WireRate what the link carries. Bytes per second.
	DirtyRate float64
	WireRate  float64
	// Reason is for people: why this, with the figures that decided.
	Reason string
}

// Rounds decides after each round of one migration what comes next. See the
// package comment for the rules. It is not safe for concurrent use.
//
// It always ends. A round is productive when it leaves at most nine tenths of the
// least remainder that any round has left, less than which pre-copy never
// counts as progress. Remainders are whole pages and at most the memory M, so at
// most log(M in pages)/log(10/9) rounds are productive: 142 for 8 GiB. Hybrid ends
// with the first unproductive one. Pre-copy allows two unproductive rounds in a
// row, then it throttles, which it does at most ten times as each step is a
// tenth at least or the last, then it gives up. (A round that was productive
// but has nothing but unproductive ones ahead counts as one of the two, and
// there are as few of those as of productive ones.)
type Rounds struct {
	cfg      Config
	curve    Curve // by time that the program ran, throttled or not
	wire     rate
	memory   uint64
	sent     uint64
	best     uint64
	planned  uint64 // what the round was to send
	skipped  float64
	overhead time.Duration // of a round: what it takes beside sending
	strikes  int
	throttle float64
}

// What is decided by. See the package comment for why.
const (
	productive   = 0.9  // of the best remainder so far
	worthHybrid  = 0.75 // of the remainder, else hybrid stops sending twice
	mostStrikes  = 2    // unproductive rounds in a row: QEMU's dirty_rate_high_cnt
	throttleFrom = 0.2  // QEMU's cpu-throttle-initial
	throttleStep = 0.1  // QEMU's cpu-throttle-increment
)

// rate is bytes over time, in which the past counts a quarter at each round:
// slow rounds weigh as much as their time, tiny ones, which measure nothing but
// round trips, hardly at all.
type rate struct{ bytes, seconds float64 }

func (r *rate) add(bytes uint64, took time.Duration) {
	if bytes == 0 || took <= 0 {
		return
	}
	r.bytes = r.bytes/4 + float64(bytes)
	r.seconds = r.seconds/4 + took.Seconds()
}

func (r *rate) value() float64 {
	if r.seconds == 0 {
		return 0
	}
	return r.bytes / r.seconds
}

// NewRounds begins a migration.
func NewRounds(cfg Config) (*Rounds, error) {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	r := &Rounds{cfg: cfg, curve: cfg.Curve.Clone(), skipped: 1}
	if cfg.WireRate > 0 {
		// As little as a measurement of a millisecond: the first round counts.
		r.wire = rate{cfg.WireRate / 1000, 0.001}
	}
	return r, nil
}

// Room is how many bytes fit into the downtime beside state: what pre-copy may
// hold back. 0 until the rate of the link is known.
func (r *Rounds) Room(state time.Duration) uint64 {
	return uint64(max(0, (r.cfg.MaxDowntime-state).Seconds()) * r.wire.value())
}

// Takes is how long a round that has to send that many bytes would take, as far
// as is known.
func (r *Rounds) Takes(bytes uint64) time.Duration {
	return r.overhead + seconds(float64(bytes)*r.skipped, r.wire.value())
}

func seconds(bytes, rate float64) time.Duration {
	if bytes == 0 {
		return 0
	}
	const long = 1000 * time.Hour
	if s := bytes / rate; rate > 0 && s < long.Seconds() {
		return time.Duration(s * float64(time.Second))
	}
	return long
}

// learn takes a measure's figures in.
func (r *Rounds) learn(m Measure) {
	if m.Elapsed > 0 {
		ran := time.Duration(float64(m.Elapsed) * (1 - r.throttle))
		r.curve.Add(Point{max(ran, 1), m.Written})
	}
	left := m.Dirty + m.Held
	if m.Round == 0 {
		r.memory, r.best = left, left
	} else {
		if r.memory == 0 { // the caller began with round 1
			r.memory = max(m.Sent, left)
			r.best = r.memory
		}
		r.wire.add(m.Sent, m.Took)
		r.sent += m.Sent
		if r.planned > 0 {
			r.skipped = min(1, float64(m.Sent)/float64(r.planned))
		}
		r.overhead = max(0, m.Elapsed-m.Took)
	}
	r.planned = m.Dirty
}

// after predicts the remainder that another round would leave, under a throttle:
// what is written meanwhile, and what is held back, of which half is taken for
// written meanwhile, as it is likelier than not, and must not count twice.
func (r *Rounds) after(m Measure, throttle float64) uint64 {
	takes := r.Takes(m.Dirty).Seconds() * (1 - throttle)
	written := r.curve.At(time.Duration(takes * float64(time.Second)))
	return max(m.Held, min(uint64(written)+m.Held/2, r.memory))
}

// Stop reports whether a round should end in its middle, after a look there: in
// hybrid, when so much of what was sent has been written again that the switch
// should not wait. sent is what the round has sent so far, left what would be left
// if it ended now: what it has not sent, what was found written and what is held
// back. What it has not sent belongs to the Dirty of the next Measure.
func (r *Rounds) Stop(sent, left uint64) bool { return r.cfg.PostCopy && r.enough(sent, left) }

// enough reports whether hybrid has used up what it may send.
func (r *Rounds) enough(sent, left uint64) bool {
	return float64(r.sent+sent+left) > (1+r.cfg.Extra)*float64(r.memory)
}

// Next decides. It is called once before the first round, with Round 0, and
// after each scan that ends a round, until it says something other than Round.
func (r *Rounds) Next(m Measure) Decision {
	r.learn(m)
	left := m.Dirty + m.Held
	wire := r.wire.value()
	d := Decision{
		Throttle:  r.throttle,
		WireRate:  wire,
		DirtyRate: r.curve.Rate(r.Takes(m.Dirty)) * (1 - r.throttle),
	}
	if wire > 0 || left == 0 {
		d.Downtime = m.State + seconds(float64(left)+r.curve.At(m.Lag), wire)
	}
	switch {
	case d.Downtime > 0 && d.Downtime <= r.cfg.MaxDowntime, left == 0 && m.State <= r.cfg.MaxDowntime:
		d.Action = Switch
		d.Reason = fmt.Sprintf("%s are left, which take %s with the state; %s are allowed",
			size(left), ms(d.Downtime), ms(r.cfg.MaxDowntime))
	case !r.cfg.PostCopy && m.State >= r.cfg.MaxDowntime:
		d.Action = GiveUp
		d.Reason = fmt.Sprintf("the state alone takes %s at the switch, %s are allowed: allow more",
			ms(m.State), ms(r.cfg.MaxDowntime))
	case m.Round == 0:
		d.Reason = "nothing has been sent yet"
	case r.cfg.PostCopy:
		r.hybrid(m, &d)
	default:
		r.precopy(m, &d)
	}
	if d.Action == PostCopy {
		d.Downtime = m.State
	}
	d.Throttle = r.throttle
	return d
}

// hybrid goes on with rounds only as long as they are cheap: post-copy is there
// for the rest, and sends it once.
func (r *Rounds) hybrid(m Measure, d *Decision) {
	left, next := m.Dirty+m.Held, r.after(m, 0)
	total := float64(r.sent) + float64(m.Dirty)*r.skipped + float64(next)
	allowed := (1 + r.cfg.Extra) * float64(r.memory)
	d.Action = PostCopy
	switch {
	case left == 0:
		d.Reason = fmt.Sprintf("nothing is left, but the state takes %s and %s are allowed", ms(m.State), ms(r.cfg.MaxDowntime))
	case float64(left) > productive*float64(r.best):
		d.Reason = fmt.Sprintf("%s are left, no less than before the round", size(left))
	case float64(next) > worthHybrid*float64(left):
		d.Reason = fmt.Sprintf("another round would leave %s of %s: %s are dirtied and %s sent",
			size(next), size(left), speed(d.DirtyRate), speed(d.WireRate))
	case r.enough(0, left):
		d.Reason = fmt.Sprintf("%s are sent and %s left, of %s of memory", size(r.sent), size(left), size(r.memory))
	case total > allowed:
		d.Reason = fmt.Sprintf("another round would make it %s in all for %s of memory",
			size(uint64(total)), size(r.memory))
	default:
		r.best = left
		d.Action = Round
		d.Reason = fmt.Sprintf("%s are left, another round should leave %s", size(left), size(next))
	}
}

// precopy goes on until it has good reason to think that it will not converge,
// then slows the program as far as it may, then gives up.
func (r *Rounds) precopy(m Measure, d *Decision) {
	left, next := m.Dirty+m.Held, r.after(m, r.throttle)
	stalls := func(next uint64) bool { return float64(next) > productive*float64(left) }
	moved := float64(left) <= productive*float64(r.best)
	if moved {
		r.best = left
	}
	if moved && !stalls(next) {
		r.strikes = 0
		d.Reason = fmt.Sprintf("%s are left, another round should leave %s", size(left), size(next))
		return
	}
	if r.strikes++; r.strikes < mostStrikes {
		d.Reason = fmt.Sprintf("%s are left, another round may leave no less: once more", size(left))
		return
	}
	if r.throttle < r.cfg.MaxThrottle {
		// A step that would change nothing is not waited for.
		for step := throttleStep; ; step = throttleStep {
			if r.throttle == 0 {
				step = throttleFrom
			}
			r.throttle = min(r.cfg.MaxThrottle, r.throttle+step)
			if r.throttle == r.cfg.MaxThrottle || !stalls(r.after(m, r.throttle)) {
				break
			}
		}
		r.strikes = 0
		d.DirtyRate = r.curve.Rate(r.Takes(m.Dirty)) * (1 - r.throttle)
		d.Reason = fmt.Sprintf("%s do not become less: the program is slowed by %.0f %%", size(left), 100*r.throttle)
		return
	}
	d.Action = GiveUp
	d.Reason = fmt.Sprintf("does not converge: %s are dirtied and %s sent, %s stay, which take %s at the switch; %s are allowed: %s",
		speed(d.DirtyRate), speed(d.WireRate), size(left), ms(d.Downtime), ms(r.cfg.MaxDowntime), r.remedy())
}

func (r *Rounds) remedy() string {
	if r.throttle > 0 {
		return "allow more downtime, a stronger throttle, or hybrid"
	}
	return "allow more downtime, a throttle, or hybrid"
}

func ms(d time.Duration) string {
	if d < 10*time.Millisecond {
		return fmt.Sprintf("%.1f ms", d.Seconds()*1000)
	}
	return fmt.Sprintf("%.0f ms", d.Seconds()*1000)
}

func size(bytes uint64) string {
	switch b := float64(bytes); {
	case bytes >= 10<<30:
		return fmt.Sprintf("%.0f GiB", b/(1<<30))
	case bytes >= 1<<30:
		return fmt.Sprintf("%.1f GiB", b/(1<<30))
	case bytes >= 1<<20:
		return fmt.Sprintf("%.0f MiB", b/(1<<20))
	default:
		return fmt.Sprintf("%.0f KiB", b/(1<<10))
	}
}

func speed(bytesPerSecond float64) string { return size(uint64(max(0, bytesPerSecond))) + "/s" }
