package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

// envVictim makes the test binary a tracer that takes a process through a whole
// session and dies by SIGKILL at a kill point: "PID N", or "PID 0" to come
// through and print the points it passed.
const envVictim = "PAGEFERRY_TEST_VICTIM"

func TestMain(m *testing.M) {
	if v := os.Getenv(envVictim); v != "" {
		if err := victim(v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if v := os.Getenv(envSettling); v != "" {
		if err := settlingVictim(v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testutil.Main(m)
}

func victim(v string) error {
	var pid, at int
	if _, err := fmt.Sscan(v, &pid, &at); err != nil {
		return err
	}
	n := 0
	inject.KillPoint = func(name string) {
		n++
		if at == 0 {
			fmt.Println(name)
		}
		if n == at {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	s, err := Reattach(ctx, pid, Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	if err := s.Isolate(ctx); err != nil {
		return err
	}
	if err := s.Freeze(ctx); err != nil {
		return err
	}
	var refused *fds.RefusedError
	if _, _, err := s.Capture(ctx); err != nil && !errors.As(err, &refused) {
		return err
	}
	pages, err := ownPages(pid)
	if err != nil {
		return err
	}
	d, err := nullDomain()
	if err != nil {
		return err
	}
	if _, err := s.Register(ctx, d, pages); err != nil {
		return err
	}
	if err := s.Hold(ctx); err != nil {
		return err
	}
	return s.Thaw(ctx)
}
