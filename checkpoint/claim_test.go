package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// TestHeldForAnother: what one session holds, because the process belongs to
// another host by now, no other session may let run.
func TestHeldForAnother(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.Start(t, "sleep", "1000")
	settled(t, p.Pid())
	before, ctx := openFor(t, p.Pid()) // knows nothing of the group
	s, _ := openFor(t, p.Pid())
	must(t, s.Isolate(ctx))
	if c, err := Open(p.Pid(), Options{}); !errors.Is(err, ErrBusy) {
		t.Errorf("taken twice: %v", err)
		if err == nil {
			c.Close()
		}
	}
	if err := before.Isolate(ctx); !errors.Is(err, ErrBusy) {
		t.Errorf("isolated twice: %v", err)
	}
	must(t, s.Freeze(ctx))
	if _, _, err := s.Capture(ctx); err != nil {
		t.Fatal(err)
	}
	must(t, s.Hold(ctx))
	group := cgroup.At(s.Group())
	held := func() error {
		f, err := group.Frozen()
		if err != nil || !f {
			return fmt.Errorf("the group is not frozen: %v", err)
		}
		if g, err := cgroup.Of(p.Pid()); err != nil || g != group {
			return fmt.Errorf("the process is in %v: %v", g, err)
		}
		return nil
	}
	must(t, before.Thaw(ctx))
	must(t, held())

	// The daemon has ended: only a session that takes it up may have it.
	must(t, s.Close())
	if c, err := Open(p.Pid(), Options{}); !errors.Is(err, ErrHeld) {
		t.Errorf("a held process was taken: %v", err)
		if err == nil {
			c.Close()
		}
	}
	must(t, before.Thaw(ctx))
	must(t, held())
	s, err := Reattach(ctx, p.Pid(), Options{})
	must(t, err)
	defer s.Close()
	must(t, s.Thaw(ctx))
}

// TestHoldOfAnEmptyGroup: a frozen group holds only who is in it.
func TestHoldOfAnEmptyGroup(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.Start(t, "sleep", "1000")
	settled(t, p.Pid())
	own, err := cgroup.Of(p.Pid())
	must(t, err)
	s, ctx := openFor(t, p.Pid())
	must(t, s.Isolate(ctx))
	must(t, s.Freeze(ctx))
	must(t, own.Move(p.Pid())) // by an administrator, say
	if err := s.Hold(ctx); err == nil {
		t.Error("held a process that is not in the group")
	}
	must(t, s.Thaw(ctx))
	testutil.Eventually(t, 5*time.Second, func() error {
		st, err := proc.ReadStat(p.Pid())
		if err == nil && st.State != 'S' {
			err = fmt.Errorf("state %c", st.State)
		}
		return err
	})
}

// TestForkWhileIsolated: a child that is made in the group leaves it with its
// parent.
func TestForkWhileIsolated(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	in, out := pipe(t)
	cmd := exec.Command("/bin/sh", "-c", "read x; sleep 1000 & read y; kill $!; wait")
	cmd.Stdin = in
	p := testutil.StartCmd(t, cmd, testutil.DefaultLimit)
	own, err := cgroup.Of(p.Pid())
	must(t, err)
	s, ctx := openFor(t, p.Pid())
	must(t, s.Isolate(ctx))
	if _, err := out.WriteString("fork\n"); err != nil {
		t.Fatal(err)
	}
	var child int
	testutil.Eventually(t, 5*time.Second, func() error {
		pids, err := cgroup.At(s.Group()).Procs()
		if err != nil || len(pids) != 2 {
			return fmt.Errorf("in the group: %v, %v", pids, err)
		}
		child = pids[0] + pids[1] - p.Pid()
		return nil
	})
	must(t, s.Freeze(ctx))
	var refused *RefusedError
	if _, _, err := s.Capture(ctx); !errors.As(err, &refused) {
		t.Errorf("capture of a process with a child: %v", err)
	}
	group := s.Group()
	must(t, s.Thaw(ctx))
	if cgroup.At(group).Exists() {
		t.Error("the group is still there")
	}
	if g, err := cgroup.Of(child); err != nil || g != own {
		t.Errorf("the child is in %v: %v", g, err)
	}
	if _, err := out.WriteString("end\n"); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 5*time.Second, func() error {
		if unix.Kill(child, 0) == nil {
			return errors.New("the child does not end")
		}
		return nil
	})
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}
