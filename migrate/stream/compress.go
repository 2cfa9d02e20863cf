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
func (c *compression) begin(number uint32, again bool, send, gone *page.Set) {
	c.mu.Lock()
	defer c.mu.Unlock()
	rate := math.Float64frombits(c.rate.Load())
	c.round = codec.Round{Number: number, Keep: again && (c.mode == codec.Always || rate > 0 && rate < slowLink)}
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

// measured is what a lane may also be: it knows what the path carries for it.
type measured interface{ DeliveryRate() float64 }

// gauge tells a lane's encoder how fast the lane is. That the lane waits to be asked
// says nothing about the link: the destination may be at work. So it is the
// transport that says what the path carries; where it does not know, pages go as
// they are.
type gauge struct {
	c       *compression
	chooser *codec.Chooser
	enc     *codec.Encoder
	lane    transport.Lane
	id      uint8
	limit   float64 // of the lane, by the limiter; 0 for none
	looked  time.Time
}

// gaugeEvery is how often the transport is asked.
const gaugeEvery = 20 * time.Millisecond

// newGauge returns what encodes the pages of a lane, which has limit bytes per second
// of its own at most, 0 for any.
func (c *compression) newGauge(lane transport.Lane, limit float64) *gauge {
	g := &gauge{c: c, chooser: &codec.Chooser{Mode: c.mode}, lane: lane, limit: limit, id: lane.ID().Index}
	if lane.ID().Kind == transport.Urgent {
		g.id = math.MaxUint8
	}
	g.enc = codec.NewEncoder(codec.EncoderConfig{Chooser: g.chooser, Sent: c.sent, Twins: c.twins})
	c.mu.Lock()
	c.encoders = append(c.encoders, g.enc)
	c.mu.Unlock()
	return g
}

// asked is called with every request.
func (g *gauge) asked() {
	g.enc.SetRound(g.c.now(g.id))
	now := time.Now()
	if now.Sub(g.looked) < gaugeEvery {
		return
	}
	g.looked = now
	rate := g.limit
	if m, ok := g.lane.(measured); ok {
		if r := m.DeliveryRate(); r > 0 && (rate == 0 || r < rate) {
			rate = r
		}
	}
	if rate > 0 {
		g.chooser.SetRate(rate)
		g.c.rate.Store(math.Float64bits(rate))
	}
}

// Round tells what is fetched next while the process runs: pages of it may stand
// on what was sent before. All of the round before has been placed. again says that
// these pages were sent already, and are likely to be once more. gone are pages that
// the destination gives up.
func (s *Server) Round(number uint32, again bool, send, gone *page.Set) {
	s.compress.begin(number, again, send, gone)
}

// EndRounds says that from here on the process may run at the destination: nothing
// may stand on anything. What follows is asked for after that.
func (s *Server) EndRounds() { s.compress.begin(0, false, new(page.Set), new(page.Set)) }

// Saved is what was sent how so far.
func (s *Server) Saved() codec.Stats { return s.compress.stats() }
