package appliance

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
)

// pauser is what a throttle stops and lets go; see checkpoint.Session.
type pauser interface {
	Pause(ctx context.Context) error
	Resume() error
}

// throttlePeriod is how often a throttled process is stopped: a client sees answers
// that are late by no more than that.
const throttlePeriod = 50 * time.Millisecond

// throttle keeps a process from running for a part of its time.
type throttle struct {
	p   pauser
	log *slog.Logger

	// turn is held by who has stopped the process: this, or a look.
	turn sync.Mutex

	mu     sync.Mutex
	cancel context.CancelFunc // nil where it is not at work
	done   chan struct{}
}

// set makes part the part of the time in which the process stands still. It returns
// with the process running, or about to be stopped the next time.
func (t *throttle) set(part float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.cancel != nil {
		t.cancel()
		<-t.done
		t.cancel = nil
	}
	if part <= 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.cancel, t.done = cancel, make(chan struct{})
	go t.run(ctx, time.Duration(part*float64(throttlePeriod)), t.done)
}

func (t *throttle) run(ctx context.Context, still time.Duration, done chan struct{}) {
	defer close(done)
	for sleep(ctx, throttlePeriod-still) {
		// A thread that cannot be stopped now can be some other time.
		if err := t.once(ctx, still); err != nil && !errors.Is(err, checkpoint.ErrStuck) {
			if ctx.Err() == nil {
				t.log.Warn("the process is not slowed any more", "err", err)
			}
			return
		}
	}
}

// once stops the process for a while.
func (t *throttle) once(ctx context.Context, still time.Duration) error {
	t.turn.Lock()
	defer t.turn.Unlock()
	if err := t.p.Pause(ctx); err != nil {
		return err
	}
	sleep(ctx, still)
	return t.p.Resume()
}

// stop makes the process stand still for somebody else.
func (t *throttle) stop() (resume func() error, err error) {
	t.turn.Lock()
	if err := t.p.Pause(context.Background()); err != nil {
		t.turn.Unlock()
		return nil, err
	}
	return func() error {
		defer t.turn.Unlock()
		return t.p.Resume()
	}, nil
}

// sleep reports whether ctx did not end meanwhile.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
