package rdma

import (
	"fmt"
	"runtime"
	"sync"
	"time"

	"github.com/pageferry/pageferry/transport"
)

// engineTick is how often the engine looks while others poll.
const engineTick = time.Millisecond

// engine makes progress when nobody else does, and takes the lane apart in the
// end. While somebody polls again and again and nobody sleeps, it does not arm the
// queue: the notification would wake it for each completion, to find nothing, and
// cost more than the round trip itself. It looks now and then instead.
func (l *Lane) engine() {
	defer close(l.engineDone)
	t := time.NewTimer(engineTick)
	defer t.Stop()
	for {
		armed, ok := l.round()
		if !ok {
			break
		}
		if !armed {
			t.Reset(engineTick)
			select {
			case <-t.C:
			case <-l.kick:
			case <-l.done:
			}
			continue
		}
		if err := l.cq.Wait(); err != nil {
			l.mu.Lock()
			l.fail(fmt.Errorf("%w: %w: %w", transport.ErrPeer, ErrDevice, err))
			l.mu.Unlock()
		}
	}
	l.discard()
	l.over.Close()
}

// block waits on c, for which the engine has to make progress.
func (l *Lane) block(c *sync.Cond) {
	l.blocked++
	if l.ticking {
		select {
		case l.kick <- struct{}{}:
		default:
		}
	}
	c.Wait()
	l.blocked--
}

// round polls until nothing comes. Then it arms and polls again, so that what came
// in between is not missed, unless others poll. ok is false when the lane has ended.
func (l *Lane) round() (armed, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for {
		for l.progress() > 0 {
			l.mu.Unlock()
			runtime.Gosched() // whoever waits for this comes first
			l.mu.Lock()
		}
		if l.err != nil {
			return false, false
		}
		if l.ticking = l.polled && l.blocked == 0; l.ticking {
			l.polled = false
			return false, true
		}
		if err := l.cq.Arm(); err != nil {
			l.fail(fmt.Errorf("%w: %w: %w", transport.ErrPeer, ErrDevice, err))
			return false, false
		}
		if l.progress() == 0 {
			return true, l.err == nil
		}
	}
}
