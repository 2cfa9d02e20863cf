package pace

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

const (
	// Min is the least limit in bytes per second, 1 Mbit/s: below it a single
	// page is more than a twentieth of a second's worth.
	Min = 1e6 / 8
	// Max is above what any link carries, and far from overflowing.
	Max = 1 << 46

	// DefaultUrgentShare is how far faults may go above the limit.
	DefaultUrgentShare = 0.25

	// burst is how long a pause the limit is made up for after: a timer that
	// fired late, a reader that was slow. It bounds the excess in any second to
	// two hundredths, and is longer than most delays of a busy machine.
	burst = 20 * time.Millisecond
	// frame is how much of the limit is let go at once.
	frame = 5 * time.Millisecond
	// nap is the shortest sleep. At high limits several frames pass for one.
	nap = time.Millisecond

	// minBurst holds a page with its framing and the headers of packets of 536
	// bytes, the least that every host takes (RFC 9293, 3.7.1).
	minBurst = 5 << 10
	pageSize = 4 << 10
)

// Config is what a Limiter enforces.
type Config struct {
	// BytesPerSecond is the limit, from Min to Max.
	BytesPerSecond uint64
	// UrgentShare is by which part of the limit demand faults may go above it.
	// Default 0.25; negative is none.
	UrgentShare float64
}

// Limiter is a budget of bytes per second. Safe for concurrent use; a nil one
// limits nothing.
type Limiter struct {
	bytesPerSecond uint64
	debt           float64 // how far urgent frames may draw on what bulk frames will get

	// Whoever holds a turn is the next to go: bulk lanes in the order in which
	// they came, as channels serve their waiters, so that each gets one frame in
	// a round. Urgent frames have a turn of their own.
	turn, urgentTurn chan struct{}

	mu  sync.Mutex    // both change together
	own *rate.Limiter // R: bulk frames wait for it
	all *rate.Limiter // R and the share: urgent frames wait for it
}

// New returns a Limiter that begins with its burst unused.
func New(cfg Config) (*Limiter, error) {
	if cfg.BytesPerSecond < Min || cfg.BytesPerSecond > Max {
		return nil, fmt.Errorf("pace: limit of %d bytes per second, want %d to %d", cfg.BytesPerSecond, uint64(Min), uint64(Max))
	}
	if cfg.UrgentShare == 0 {
		cfg.UrgentShare = DefaultUrgentShare
	}
	share := max(0, cfg.UrgentShare)
	r := float64(cfg.BytesPerSecond)
	b := max(minBurst, int(r*burst.Seconds()))
	return &Limiter{
		bytesPerSecond: cfg.BytesPerSecond,
		debt:           share * r,
		turn:           make(chan struct{}, 1),
		urgentTurn:     make(chan struct{}, 1),
		own:            rate.NewLimiter(rate.Limit(r), b),
		// Twice the burst: bulk frames that come at once leave one for a fault.
		all: rate.NewLimiter(rate.Limit(r*(1+share)), 2*b),
	}, nil
}

// BytesPerSecond is the limit, 0 where there is none.
func (l *Limiter) BytesPerSecond() uint64 {
	if l == nil {
		return 0
	}
	return l.bytesPerSecond
}

// MaxPayload is how large a frame may be for the limit to hold in every second,
// in bytes: whole pages, at least one, at most room.
func (l *Limiter) MaxPayload(room int) int {
	if l == nil {
		return room
	}
	n := int(float64(l.bytesPerSecond) * frame.Seconds())
	return min(room, max(pageSize, n/pageSize*pageSize))
}

// Wait returns when bytes more of bulk frames may go, or with the cause of ctx's
// end. In the latter case what has been counted stays counted.
func (l *Limiter) Wait(ctx context.Context, bytes int) error {
	if l == nil {
		return nil
	}
	return l.pass(ctx, l.turn, l.own, bytes, func(now time.Time, n int) {
		l.own.ReserveN(now, n)
		l.all.ReserveN(now, n)
	})
}

// Urgent is Wait for the answer to a demand fault. It waits for other urgent
// frames only, and only where the share is used up.
func (l *Limiter) Urgent(ctx context.Context, bytes int) error {
	if l == nil {
		return nil
	}
	return l.pass(ctx, l.urgentTurn, l.all, bytes, func(now time.Time, n int) {
		l.all.ReserveN(now, n)
		if room := l.debt + l.own.TokensAt(now); room > 0 {
			l.own.ReserveN(now, min(n, int(room)))
		}
	})
}

// pass waits for its turn and then until the tokens in of suffice, and has them
// taken by take. What is larger than the burst goes in parts.
func (l *Limiter) pass(ctx context.Context, turn chan struct{}, of *rate.Limiter, bytes int, take func(time.Time, int)) error {
	select {
	case turn <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-turn }()
	for bytes > 0 {
		n := min(bytes, l.own.Burst())
		l.mu.Lock()
		now := time.Now()
		short := float64(n) - of.TokensAt(now)
		if short <= 0 {
			take(now, n)
		}
		l.mu.Unlock()
		if short <= 0 {
			bytes -= n
			continue
		}
		// Rounded up, or the last fraction of a byte would take another nap.
		d := time.Duration(math.Ceil(short / float64(of.Limit()) * 1e9))
		if err := sleep(ctx, max(d, nap)); err != nil {
			return err
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
