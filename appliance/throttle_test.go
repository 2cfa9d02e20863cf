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
	fail  atomic.Pointer[error]
}

func (p *clockedPauser) Pause(context.Context) error {
	if err := p.fail.Load(); err != nil {
		return *err
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
		stuck, gone := fmt.Errorf("%w (thread 7)", checkpoint.ErrStuck), errors.New("it cannot be stopped")
		p.fail.Store(&stuck)
		th.set(0.5)
		time.Sleep(time.Second)
		p.fail.Store(nil)
		p.still = 0
		time.Sleep(time.Second)
		if th.set(0); p.still < 400*time.Millisecond {
			t.Errorf("a thread could not be stopped for a while, and then it stood still for %v of a second", p.still)
		}
		p.fail.Store(&gone)
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

// ticker waits in a call of its choice for what does not come, 200 ms at a time.
const ticker = `
#define _GNU_SOURCE
#include <errno.h>
#include <linux/aio_abi.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static struct timespec span = {0, 200000000};
static int pair[2];
static void *feed(void *arg) {
	for (;;) {
		usleep(100000);
		if (write(pair[1], "x", 1) != 1) _exit(3);
	}
}
static int again(long r) { return r == -1 && errno == EAGAIN; }
int main(int argc, char **argv) {
	const char *call = argv[1];
	struct epoll_event ev;
	struct io_event io;
	aio_context_t ctx = 0;
	sigset_t usr1;
	struct sembuf down = {0, -1, 0};
	int ep = epoll_create1(0), sem = -1;
	char buf[1 << 16];
	struct iovec iov = {buf, sizeof buf};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	struct timeval tv = {0, 200000};
	pthread_t th;
	if (!strcmp(call, "fed")) tv.tv_sec = 1;
	sigemptyset(&usr1);
	sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, 0);
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	if (setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv) || setsockopt(pair[0], SOL_SOCKET, SO_SNDTIMEO, &tv, sizeof tv)) return 2;
	if (!strcmp(call, "semtimedop")) {
		if (unshare(CLONE_NEWIPC)) return 2; // it goes with us
		if ((sem = semget(IPC_PRIVATE, 1, 0600)) < 0) return 2;
	}
	if (strstr(call, "getevents") && syscall(SYS_io_setup, 8, &ctx)) return 2;
	if (!strcmp(call, "write")) while (send(pair[0], buf, sizeof buf, MSG_DONTWAIT) > 0);
	if (!strcmp(call, "fed") && pthread_create(&th, 0, feed, 0)) return 2;
	for (;;) {
		int ok = 0;
		if (!strcmp(call, "fed")) ok = read(pair[0], buf, 1) == 1;
		if (!strcmp(call, "epoll_wait")) ok = epoll_wait(ep, &ev, 1, 200) == 0;
		if (!strcmp(call, "epoll_pwait2")) ok = syscall(SYS_epoll_pwait2, ep, &ev, 1, &span, 0, 8) == 0;
		if (!strcmp(call, "rt_sigtimedwait")) ok = again(sigtimedwait(&usr1, 0, &span));
		if (!strcmp(call, "semtimedop")) ok = again(semtimedop(sem, &down, 1, &span));
		if (!strcmp(call, "io_getevents")) ok = syscall(SYS_io_getevents, ctx, 1, 1, &io, &span) == 0;
		if (!strcmp(call, "io_pgetevents")) ok = syscall(SYS_io_pgetevents, ctx, 1, 1, &io, &span, 0) == 0;
		if (!strcmp(call, "read")) ok = again(read(pair[0], buf, 1));
		if (!strcmp(call, "recvfrom")) ok = again(recv(pair[0], buf, 1, 0));
		if (!strcmp(call, "recvmsg")) ok = again(recvmsg(pair[0], &msg, 0));
		if (!strcmp(call, "write")) ok = again(write(pair[0], buf, sizeof buf));
		if (!strcmp(call, "select")) {
			struct timeval left = tv;
			ok = select(0, 0, 0, 0, &left) == 0;
		}
		if (!ok) return 1;
		if (write(1, ".", 1) != 1) return 1;
	}
}
`

// TestThrottleKeepsTimeouts: a thread that waits for longer than the throttle lets
// it run is called back in time.
func TestThrottleKeepsTimeouts(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	for _, call := range []string{
		"epoll_wait", "epoll_pwait2", "rt_sigtimedwait", "semtimedop", "io_getevents", "io_pgetevents",
		"read", "recvfrom", "recvmsg", "write", "select",
	} {
		t.Run(call, func(t *testing.T) {
			testutil.NoLeaks(t)
			keepsTimeouts(t, call, 3, 200*time.Millisecond)
		})
	}
	// What has been waited for came: the next call, of the same arguments, has a time
	// of its own.
	t.Run("one after the other", func(t *testing.T) {
		testutil.NoLeaks(t)
		keepsTimeouts(t, "fed", 25, 0)
	})
}

func keepsTimeouts(t *testing.T, call string, ticks int, each time.Duration) {
	p := testutil.Start(t, testutil.CCText(t, "ticker", ticker), call)
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
	testutil.Eventually(t, 15*time.Second, func() error {
		if n := len(p.Text()) - before; n < ticks {
			return fmt.Errorf("%d ticks in %v", n, time.Since(begin))
		}
		return nil
	})
	// Not one too early: each has its time, but the first, which had begun before.
	if d := time.Since(begin); d < time.Duration(ticks-1)*each {
		t.Errorf("%d ticks of %v in %v", ticks, each, d)
	}
	if !p.Alive() {
		t.Error("it saw what it must not see")
	}
}
