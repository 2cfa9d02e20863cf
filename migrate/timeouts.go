package migrate

import (
	"context"
	"time"
)

// Timeouts bound what one side waits for. A zero field is its default.
type Timeouts struct {
	// Peer is how long a peer may be silent; it is pinged four times in it. 5 s.
	Peer time.Duration
	// Hello bounds dialling and the first exchange. 10 s.
	Hello time.Duration
	// Prepare bounds the answer to an offer. 30 s.
	Prepare time.Duration
	// Ready is how long the destination may rebuild without any page arriving
	// while the process stands still. 30 s.
	Ready time.Duration
	// Undo bounds a single attempt to thaw, abort or kill. 30 s.
	Undo time.Duration
	// Settle is how long the end of Run waits for the other side's word that
	// it has forgotten the migration, before it leaves that to Settle. 5 s.
	Settle time.Duration
	// Inquiry is how long a restarted source asks a destination that may have
	// been resolved to go on, before it lets a held process run. 2 s. A restarted
	// destination waits for it and BackoffMax until it lets one run whose COMMIT
	// was journalled and whose source is not heard.
	Inquiry time.Duration
	// BackoffMin and BackoffMax bound the pauses between attempts. 50 ms, 5 s.
	BackoffMin, BackoffMax time.Duration
	// Progress is how often a destination reports. 250 ms.
	Progress time.Duration
}

// WithDefaults returns t with its zero fields set.
func (t Timeouts) WithDefaults() Timeouts {
	for _, f := range []struct {
		at    *time.Duration
		value time.Duration
	}{
		{&t.Peer, 5 * time.Second}, {&t.Hello, 10 * time.Second}, {&t.Prepare, 30 * time.Second},
		{&t.Ready, 30 * time.Second}, {&t.Undo, 30 * time.Second}, {&t.Settle, 5 * time.Second},
		{&t.Inquiry, 2 * time.Second}, {&t.BackoffMin, 50 * time.Millisecond}, {&t.BackoffMax, 5 * time.Second},
		{&t.Progress, 250 * time.Millisecond},
	} {
		if *f.at <= 0 {
			*f.at = f.value
		}
	}
	return t
}

// backoff is the pause before the next attempt; it doubles.
type backoff struct {
	t    Timeouts
	next time.Duration
}

func (b *backoff) reset() { b.next = 0 }

// wait returns false where ctx ended first.
func (b *backoff) wait(ctx context.Context) bool {
	b.next = min(max(2*b.next, b.t.BackoffMin), b.t.BackoffMax)
	t := time.NewTimer(b.next)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
