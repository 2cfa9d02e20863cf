package appliance

import (
	"context"
	"errors"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// TestLostLaneStaysLost: whoever asks second is told as well.
func TestLostLaneStaysLost(t *testing.T) {
	e := &epoch{lost: make(chan error, 1)}
	why := errors.New("reset")
	e.report(why)
	e.report(errors.New("another"))
	l := &lanes{now: e}
	if err := <-l.Lost(); !errors.Is(err, why) {
		t.Errorf("first: %v", err)
	}
	select {
	case err, open := <-l.Lost():
		if err != nil || open {
			t.Errorf("second: %v", err)
		}
	default:
		t.Error("the second who asks waits for ever")
	}
}

// TestAdoptSourceOfAnotherBoot: the number and the start are right, and yet it is
// another process.
func TestAdoptSourceOfAnotherBoot(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.CgroupV2)
	p := testutil.Start(t, "sleep", "1000")
	st, err := proc.ReadStat(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	opts := SourceOptions{}
	for _, c := range []struct {
		boot string
		want error
	}{{bootID(), nil}, {"of yesterday", migrate.ErrGone}} {
		opts.Hint = []byte("start " + strconv.FormatUint(st.StartTime, 10) + " boot " + c.boot)
		s, err := native{}.AdoptSource(t.Context(), transport.MigrationID{1}, p.Pid(), opts)
		if !errors.Is(err, c.want) {
			t.Errorf("boot %s: %v, want %v", c.boot, err, c.want)
		}
		if err == nil {
			s.Close()
		}
	}
}

// TestAdoptSourceOfAZombie: it has ended, only its parent does not know yet.
func TestAdoptSourceOfAZombie(t *testing.T) {
	testutil.Require(t, testutil.Root)
	z := exec.Command("true")
	if err := z.Start(); err != nil {
		t.Fatal(err)
	}
	defer z.Wait()
	testutil.Eventually(t, 5*time.Second, func() error {
		st, err := proc.ReadStat(z.Process.Pid)
		if err == nil && st.State != 'Z' {
			err = errors.New("still running")
		}
		return err
	})
	if _, err := (native{}).AdoptSource(context.Background(), transport.MigrationID{1}, z.Process.Pid, SourceOptions{}); !errors.Is(err, migrate.ErrGone) {
		t.Errorf("%v, want %v", err, migrate.ErrGone)
	}
}

// TestAdoptSourceAsItWasAskedToLeave: the request counts, not what the
// configuration says when the daemon comes back.
func TestAdoptSourceAsItWasAskedToLeave(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.CgroupV2)
	p := testutil.Start(t, "sleep", "1000")
	for _, asked := range []SourceOptions{{TCP: "close", OnSourceExit: "exit0"}, {}} {
		first, err := native{}.AdoptSource(t.Context(), transport.MigrationID{1}, p.Pid(), asked)
		if err != nil {
			t.Fatal(err)
		}
		hint := first.(migrate.Describer).Describe()
		first.Close()
		again, err := native{}.AdoptSource(t.Context(), transport.MigrationID{1}, p.Pid(),
			SourceOptions{Hint: hint, TCP: "refuse", OnSourceExit: "stop-unit"})
		if err != nil {
			t.Fatal(err)
		}
		if got := again.(*process).opts; got.TCP != asked.TCP || got.OnSourceExit != asked.OnSourceExit {
			t.Errorf("asked for %q %q, got %q %q", asked.TCP, asked.OnSourceExit, got.TCP, got.OnSourceExit)
		}
		again.Close()
	}
}

// TestAdoptSourceOfOneThatEnded: nothing of it is left.
func TestAdoptSourceOfOneThatEnded(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.Start(t, "sleep", "1000")
	s, err := checkpoint.Open(p.Pid(), checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Isolate(t.Context()); err != nil {
		t.Fatal(err)
	}
	group := cgroup.At(s.Group())
	s.Close()
	p.Signal(unix.SIGKILL)
	_ = p.Wait(10 * time.Second)
	if _, err := (native{}).AdoptSource(t.Context(), transport.MigrationID{1}, p.Pid(), SourceOptions{}); !errors.Is(err, migrate.ErrGone) {
		t.Errorf("%v, want %v", err, migrate.ErrGone)
	}
	if group.Exists() {
		t.Errorf("%s is left", group.Dir())
	}
}
