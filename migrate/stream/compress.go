package stream

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// compression is what the lanes of a server share.
type compression struct {
	mode  codec.Mode
	sent  *codec.Sent
	twins *codec.Twins
	rate  atomic.Uint64 // float64: what a bulk lane carries, in bytes per second

	mu       sync.Mutex
	round    codec.Round
	encoders []*codec.Encoder
}

// slowLink is the rate of a lane below which it pays to remember what was sent, so
// that only what has changed goes the next time: remembering a page takes 4 us,
// and sending it at this rate 16.
const slowLink = 256 << 20

func newCompression(mode codec.Mode) *compression {
	c := &compression{mode: mode}
	if mode != codec.Never {
		c.sent, c.twins = codec.NewSent(codec.SentConfig{}), codec.NewTwins(codec.TwinsConfig{})
	}
	return c
}

// begin sets what the next round may stand on: not what it sends itself, nor what
// the destination gives up.
func (c *compression) begin(number uint32, send, gone *page.Set) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rate := math.Float64frombits(c.rate.Load())
	c.round = codec.Round{Number: number, Keep: number > 1 && (c.mode == codec.Always || rate > 0 && rate < slowLink)}
	if c.twins == nil {
		return
	}
	for _, r := range send.Ranges() {
		c.twins.Forget(0, r)
	}
	for _, r := range gone.Ranges() {
		c.twins.Forget(0, r)
		c.sent.Forget(0, r)
	}
}

// now is the round that goes on, on a lane.
func (c *compression) now(lane uint8) codec.Round {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.round
	r.Lane = lane
	return r
}

func (c *compression) stats() (s codec.Stats) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.encoders {
		s.Add(e.Stats())
	}
	return s
}

// gauge measures what one lane carries, the time of its own codec taken off: what
// it would carry if pages went as they are. A lane that waits to be asked waits for
// the link or for the destination, in good order, but for pauses in which there is
// nothing to send.
type gauge struct {
	c       *compression
	chooser *codec.Chooser
	bulk    bool
	enc     *codec.Encoder
	id      uint8

	since time.Time
	bytes int
	spent time.Duration // encoding
}

// Measured over at least this, and without pauses of more than that.
const (
	gaugeWindow = 20 * time.Millisecond
	gaugePause  = 10 * time.Millisecond
)

// newGauge returns what encodes the pages of a lane.
func (c *compression) newGauge(id transport.LaneID) *gauge {
	p := &gauge{c: c, chooser: &codec.Chooser{Mode: c.mode}, bulk: id.Kind == transport.Bulk, id: id.Index}
	if !p.bulk {
		p.id = math.MaxUint8
	}
	p.enc = codec.NewEncoder(codec.EncoderConfig{Chooser: p.chooser, Sent: c.sent, Twins: c.twins})
	c.mu.Lock()
	c.encoders = append(c.encoders, p.enc)
	c.mu.Unlock()
	return p
}

// asked notes that a request has come after a wait since from.
func (p *gauge) asked(from time.Time) {
	now := time.Now()
	if now.Sub(from) > gaugePause || p.since.IsZero() {
		p.since, p.bytes, p.spent = now, 0, 0
	}
	p.enc.SetRound(p.c.now(p.id))
}

// sent notes a frame of which bytes went, and that encoding it took that long.
func (p *gauge) sent(bytes int, encoding time.Duration) {
	if !p.bulk { // answers to faults wait for nothing: they take the rate of the others
		p.chooser.SetRate(math.Float64frombits(p.c.rate.Load()))
		return
	}
	p.bytes += bytes
	p.spent += encoding
	if took := time.Since(p.since); took >= gaugeWindow {
		rate := float64(p.bytes) / max(took-p.spent, gaugeWindow/100).Seconds()
		p.chooser.SetRate(rate)
		p.c.rate.Store(math.Float64bits(rate))
		p.since, p.bytes, p.spent = time.Now(), 0, 0
	}
}

// Round tells what is fetched next while the process runs: pages of it may stand
// on what was sent before. All of the round before has been placed. gone are pages
// that the destination gives up.
func (s *Server) Round(number uint32, send, gone *page.Set) { s.compress.begin(number, send, gone) }

// EndRounds says that from here on the process may run at the destination: nothing
// may stand on anything. What follows is asked for after that.
func (s *Server) EndRounds() { s.compress.begin(0, new(page.Set), new(page.Set)) }

// Saved is what was sent how so far.
func (s *Server) Saved() codec.Stats { return s.compress.stats() }
