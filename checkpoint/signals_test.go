package checkpoint

import (
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// signalsProgram counts SIGUSR1 and SIGTERM, blocks SIGUSR2 and has it pending,
// and a timer that sends SIGALRM all the time.
const signalsProgram = `
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>
#include <unistd.h>
static void on(int s) { char c = s == SIGUSR1 ? '1' : 'T'; write(1, &c, 1); }
static void none(int s) { (void)s; }
static void *worker(void *p) { (void)p; for (;;) pause(); return 0; }
int main(void) {
	struct itimerval itv = { { 0, 1000 }, { 0, 1000 } };
	pthread_t th;
	sigset_t m;
	signal(SIGUSR1, on);
	signal(SIGTERM, on);
	signal(SIGALRM, none);
	sigemptyset(&m); sigaddset(&m, SIGUSR2);
	sigprocmask(SIG_BLOCK, &m, 0);
	pthread_create(&th, 0, worker, 0);
	kill(getpid(), SIGUSR2);
	setitimer(ITIMER_REAL, &itv, 0);
	write(1, "\n", 1);
	for (;;) pause();
}`

// A signal that comes after the capture keeps the process here, which then gets
// it. What the image has, what means nothing and what timers send does not.
func TestSignaled(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "signals", signalsProgram)), time.Minute)
	p.WaitText("\n", 10*time.Second)
	send := func(sig unix.Signal) func() error { return func() error { return unix.Kill(p.Pid(), sig) } }
	tids, err := proc.Threads(p.Pid())
	if err != nil || len(tids) != 2 {
		t.Fatal(tids, err)
	}
	worker := func() error { return unix.Tgkill(p.Pid(), tids[1], unix.SIGTERM) }
	for _, c := range []struct {
		name          string
		stopped, held func() error // what comes while it is stopped, and held
		want, gets    string
	}{
		{"nothing", nil, nil, "", ""},
		{"what is pending already", nil, send(unix.SIGUSR2), "", ""},
		{"ignored, while stopped", send(unix.SIGWINCH), nil, "", ""},
		{"ignored, while held", nil, send(unix.SIGCHLD), "", ""},
		{"its timer's", nil, send(unix.SIGALRM), "", ""},
		{"while stopped", send(unix.SIGUSR1), nil, "SIGUSR1", "1"},
		{"while held", nil, send(unix.SIGUSR1), "SIGUSR1", "1"},
		{"for a thread", nil, worker, "SIGTERM", "T"},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := p.Text()
			s, ctx := openFor(t, p.Pid())
			must(t, s.Isolate(ctx))
			must(t, s.Freeze(ctx))
			if _, _, err := s.Capture(ctx); err != nil {
				t.Fatal(err)
			}
			if c.stopped != nil {
				must(t, c.stopped())
			}
			must(t, s.Hold(ctx))
			if c.held != nil {
				must(t, c.held())
			}
			began := time.Now()
			err := s.Signaled()
			t.Logf("%v, in %v", err, time.Since(began))
			if errors.Is(err, ErrSignaled) != (c.want != "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			must(t, s.Thaw(ctx))
			if c.gets != "" {
				p.WaitText(before+c.gets, 10*time.Second)
			}
		})
	}
}
