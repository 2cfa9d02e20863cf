package checkpoint

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// waitsForChild has a thread that nothing can stop while it waits for the child of a vfork.
const waitsForChild = `
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>
static int us;
static void *work(void *arg) {
	pid_t c = vfork();
	if (c == 0) { usleep(us); _exit(0); }
	waitpid(c, 0, 0);
	printf("over\n"); fflush(stdout);
	return 0;
}
int main(int argc, char **argv) {
	pthread_t t;
	us = atoi(argv[1]) * 1000;
	pthread_create(&t, 0, work, 0);
	usleep(50000);
	printf("ready\n"); fflush(stdout);
	for (;;) pause();
}
`

// A thread that does not stop for longer than all others may stand still is waited for.
func TestFreezeWaitsForAThread(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "waits", waitsForChild), "2600")
	p.WaitText("ready", time.Minute)
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.patience = 50 * time.Millisecond
	if err := s.stop(t.Context()); !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "in vfork(2)") {
		t.Errorf("stopped once: %v", err)
	}
	began := time.Now()
	if err := s.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s.Since().Before(began) {
		t.Error("it is said to have stopped before it was asked to")
	}
	if err := s.letGo(); err != nil {
		t.Fatal(err)
	}
	p.WaitText("over", time.Minute)
}
