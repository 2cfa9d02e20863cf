package checkpoint

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// TestSweepLeft: the group of a process that ended without a session goes, and
// no other.
func TestSweepLeft(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	var groups []cgroup.Group
	for range 2 {
		p := testutil.Start(t, "sleep", "1000")
		settled(t, p.Pid())
		s, ctx := openFor(t, p.Pid())
		must(t, s.Isolate(ctx))
		must(t, s.Freeze(ctx))
		must(t, s.Hold(ctx))
		groups = append(groups, cgroup.At(s.Group()))
		if len(groups) == 1 { // a daemon ends, and then its process
			must(t, s.Close())
			must(t, unix.Kill(p.Pid(), unix.SIGKILL))
			_ = p.Wait(10 * time.Second)
		}
	}
	gone, alive := groups[0], groups[1]
	// A session has made it, and not moved the process yet: its number and start
	// are right. Another's name only looks alike.
	g, err := cgroup.Of(unix.Getppid())
	must(t, err)
	st, err := statOf(unix.Getppid())
	must(t, err)
	for _, name := range []string{fmt.Sprintf("%s%d-%d", groupPrefix, unix.Getppid(), st), groupPrefix + "12-x" + filepath.Base(alive.Dir())} {
		made, err := g.Create(name)
		must(t, err)
		defer func() { must(t, made.Remove(context.Background())) }()
		groups = append(groups, made)
	}
	// Those of another PID namespace: nobody here has such a number. One has a
	// process in it, the other a session.
	full, err := g.Create(groupPrefix + "4194303-1")
	must(t, err)
	p := testutil.Start(t, "sleep", "1000")
	must(t, full.Move(p.Pid()))
	defer func() {
		must(t, g.Move(p.Pid()))
		must(t, full.Remove(context.Background()))
	}()
	claimed, err := g.Create(groupPrefix + "4194303-2")
	must(t, err)
	other := &Session{child: claimed, claim: -1}
	must(t, other.claimChild())
	defer func() {
		other.unclaim()
		must(t, claimed.Remove(context.Background()))
	}()
	groups = append(groups, full, claimed)
	if !gone.Exists() {
		t.Fatal("the group went by itself")
	}
	must(t, SweepLeft())
	if gone.Exists() {
		t.Errorf("%v is left", gone)
	}
	for _, g := range groups[1:] {
		if !g.Exists() {
			t.Errorf("%v is gone", g)
		}
	}
}

func statOf(pid int) (uint64, error) {
	st, err := proc.ReadStat(pid)
	if err != nil {
		return 0, err
	}
	return st.StartTime, nil
}
