package appliance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// clockedPauser counts how long it stood still.
type clockedPauser struct {
	since time.Time
	still time.Duration
	fail  atomic.Bool
}

func (p *clockedPauser) Pause(context.Context) error {
	if p.fail.Load() {
		return errors.New("it cannot be stopped")
	}
	p.since = time.Now()
	return nil
}

func (p *clockedPauser) Resume() error {
	p.still += time.Since(p.since)
	p.since = time.Time{}
	return nil
}

func TestThrottleTakesItsPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &clockedPauser{}
		th := throttle{p: p, log: slog.New(slog.DiscardHandler)}
		for _, part := range []float64{0.2, 0.5, 0.99} {
			p.still = 0
			begin := time.Now()
			th.set(part)
			time.Sleep(10 * time.Second)
			th.set(0)
			if !p.since.IsZero() {
				t.Fatal("it stands still")
			}
			got := p.still.Seconds() / time.Since(begin).Seconds()
			if got < part-0.01 || got > part+0.01 {
				t.Errorf("it stood still for %.2f of the time, want %.2f", got, part)
			}
			time.Sleep(time.Second)
			if p.still > time.Duration(part*10.1*float64(time.Second)) {
				t.Error("it is slowed still")
			}
		}
		p.fail.Store(true)
		th.set(0.5)
		time.Sleep(time.Second)
		th.set(0) // returns, though nobody is at work any more
	})
}

// TestThrottleRealProgram slows a program that computes all the time: it gets less
// processor time, has no tracer afterwards, and is what it was.
func TestThrottleRealProgram(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	rec := testutil.NewRecorder(t)
	p := testutil.StartGo(t, testutil.ProgramConfig{Recorder: rec})
	s, err := checkpoint.Open(p.Pid(), checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	slow := throttle{p: s, log: slog.New(slog.DiscardHandler)}
	used := func() time.Duration {
		clock := int32(^p.Pid()<<3 | 2) // CPUCLOCK_SCHED of a process: clock_getcpuclockid(3)
		var ts unix.Timespec
		if err := unix.ClockGettime(clock, &ts); err != nil {
			t.Fatal(err)
		}
		return time.Duration(ts.Nano())
	}
	slow.set(0.9)
	before, begin := used(), time.Now()
	time.Sleep(time.Second)
	got, wall := used()-before, time.Since(begin)
	slow.set(0)
	// An upper bound holds however busy the host is; two processors are there.
	if got > wall/2 {
		t.Errorf("%v of processor time in %v while it is stopped for nine tenths of it", got, wall)
	}
	st, err := proc.ReadStatus(p.Pid())
	if err != nil || st.TracerPID != 0 {
		t.Errorf("tracer %d, %v", st.TracerPID, err)
	}
	p.Beat(3)
	p.Check()
	p.Verify()
}

const ticker = `
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>
int main(void) {
	struct epoll_event ev;
	int ep = epoll_create1(0);
	for (;;) {
		if (epoll_wait(ep, &ev, 1, 200) != 0) return 1;
		if (write(1, ".", 1) != 1) return 1;
	}
}
`

// TestThrottleKeepsTimeouts: a thread that waits in epoll_wait for longer than the
// throttle lets it run is called back in time.
func TestThrottleKeepsTimeouts(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "ticker", ticker))
	p.WaitText(".", time.Minute)
	s, err := checkpoint.Open(p.Pid(), checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	slow := throttle{p: s, log: slog.New(slog.DiscardHandler)}
	slow.set(0.5)
	defer slow.set(0)
	before, begin := len(p.Text()), time.Now()
	const ticks = 5
	testutil.Eventually(t, 15*time.Second, func() error {
		if n := len(p.Text()) - before; n < ticks {
			return fmt.Errorf("%d ticks of 200 ms in %v", n, time.Since(begin))
		}
		return nil
	})
	// Not one too early: each has its 200 ms, but the first, which had begun before.
	if d := time.Since(begin); d < (ticks-1)*200*time.Millisecond {
		t.Errorf("%d ticks of 200 ms in %v", ticks, d)
	}
	if !p.Alive() {
		t.Error("it saw what it must not see")
	}
}
