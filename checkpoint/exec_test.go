package checkpoint

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// again calls exec of itself at SIGUSR1. Without randomization the kernel puts
// everything where it was.
const again = `
#include <signal.h>
#include <stdio.h>
#include <sys/personality.h>
#include <unistd.h>
int main(int argc, char **argv) {
	sigset_t set;
	int sig;
	sigemptyset(&set); sigaddset(&set, SIGUSR1); sigprocmask(SIG_BLOCK, &set, NULL);
	if (!(personality(0xffffffff) & ADDR_NO_RANDOMIZE)) {
		personality(ADDR_NO_RANDOMIZE);
		execv("/proc/self/exe", argv);
		return 1;
	}
	printf("ready\n"); fflush(stdout);
	sigwait(&set, &sig);
	execv("/proc/self/exe", argv);
	return 1;
}
`

// TestExecOfTheSameProgram: what was tracked is not the program that runs now,
// also where the two cannot be told apart by where they are.
func TestExecOfTheSameProgram(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "again", again))
	p.WaitText("ready", time.Minute)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Track(func([]proc.Mapping) (own, guards page.Set, err error) { return }); err != nil {
		t.Fatal(err)
	}
	if err := s.Freeze(ctx); err != nil {
		t.Fatalf("before it: %v", err)
	}
	if err := s.letGo(); err != nil {
		t.Fatal(err)
	}
	before, err := s.auxv()
	if err != nil {
		t.Fatal(err)
	}
	p.Signal(unix.SIGUSR1)
	testutil.Eventually(t, time.Minute, func() error {
		if strings.Count(p.Text(), "ready") < 2 {
			return errors.New("it has not called exec")
		}
		return nil
	})
	if after, err := s.auxv(); err != nil || string(after) != string(before) {
		t.Errorf("the two programs are told apart easily (%v): this tests nothing", err)
	}
	if err := s.Freeze(ctx); !errors.Is(err, ErrExec) {
		t.Errorf("after it: %v", err)
	}
}
