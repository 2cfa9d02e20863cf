package checkpoint

import (
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// alarmed gets signals of POSIX timers all the time.
const alarmed = `
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
static void on(int s) { (void)s; }
static void *work(void *arg) {
	struct sigevent ev = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN };
	struct itimerspec its = { { 0, 50000 }, { 0, 50000 } };
	timer_t id;
	ev._sigev_un._tid = gettid();
	if (timer_create(CLOCK_MONOTONIC, &ev, &id) || timer_settime(id, 0, &its, 0)) _exit(1);
	for (;;) pause();
}
int main(void) {
	pthread_t t[16];
	signal(SIGRTMIN, on);
	for (int i = 0; i < 16; i++) pthread_create(&t[i], 0, work, 0);
	printf("ready\n"); fflush(stdout);
	for (;;) pause();
}
`

// A thread that takes a signal in the moment in which it is asked to stop does stop.
func TestStopBesideSignals(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "alarmed", "#define _GNU_SOURCE\n"+alarmed))
	p.WaitText("ready", time.Minute)
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for i := range 2000 {
		if err := s.stop(t.Context()); err != nil {
			t.Fatalf("stop %d: %v", i, err)
		}
		if err := s.letGo(); err != nil {
			t.Fatal(err)
		}
	}
}
