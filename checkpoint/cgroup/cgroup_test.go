package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

func TestLocate(t *testing.T) {
	const info = `24 29 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw
30 24 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755
31 30 0:27 /part /mnt/a\040b rw - cgroup2 cgroup2 rw
32 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate
33 30 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
`
	all := func(string) bool { return true }
	for _, c := range []struct{ p, want string }{
		{"/", "/sys/fs/cgroup/unified"},
		{"/system.slice/x.service", "/sys/fs/cgroup/unified/system.slice/x.service"},
		{"/part/y", "/mnt/a b/y"},
		{"/partial", "/sys/fs/cgroup/unified/partial"},
	} {
		if got, err := locate(info, c.p, all); got != c.want || err != nil {
			t.Errorf("locate %s = %s, %v, want %s", c.p, got, err, c.want)
		}
	}
	covered := func(dir string) bool { return dir != "/sys/fs/cgroup/unified" }
	if got, err := locate(info, "/x", covered); !errors.Is(err, ErrOutside) {
		t.Errorf("a mount that another one covers was taken: %s, %v", got, err)
	}
	if _, err := locate(info, "/../other", all); !errors.Is(err, ErrOutside) {
		t.Errorf("outside the namespace: %v", err)
	}
	if _, err := locate("", "/", all); !errors.Is(err, ErrNoTree) {
		t.Errorf("no tree: %v", err)
	}
}

// A mount that another namespace made can show more than this one has.
func TestRootIsInside(t *testing.T) {
	const other = "30 24 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
	const own = "31 30 0:26 / /mnt/own rw - cgroup2 cgroup2 rw\n"
	all := func(string) bool { return true }
	if g, err := highest(other+own, all); g.Dir() != "/mnt/own" || err != nil {
		t.Errorf("root %v, %v", g, err)
	}
	if g, err := highest(other, all); !errors.Is(err, ErrOutside) {
		t.Errorf("outside the namespace: %v, %v", g, err)
	}
	if g, err := highest("", all); !errors.Is(err, ErrNoTree) {
		t.Errorf("no tree: %v, %v", g, err)
	}
}

func TestLifeOfAGroup(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.CgroupV2)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	p := testutil.Start(t, "sleep", "1000")
	pid := p.Pid()
	own, err := Of(pid)
	if err != nil {
		t.Fatal(err)
	}
	g, err := own.Create(fmt.Sprintf("pageferry-test-%d", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	defer g.Remove(ctx)
	if g.Parent() != own || !g.Exists() {
		t.Errorf("%v is not a child of %v", g, own)
	}
	if err := g.Move(pid); err != nil {
		t.Fatal(err)
	}
	if ps, err := g.Procs(); err != nil || !slices.Equal(ps, []int{pid}) {
		t.Errorf("processes %v, %v", ps, err)
	}
	if now, err := Of(pid); err != nil || now != g {
		t.Errorf("it is in %v, %v", now, err)
	}
	if err := g.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	if f, err := g.Frozen(); !f || err != nil {
		t.Errorf("frozen %v, %v", f, err)
	}
	_ = unix.Kill(pid, unix.SIGCONT)
	if f, _ := g.Frozen(); !f {
		t.Error("SIGCONT ended the freeze")
	}
	if err := g.Thaw(); err != nil {
		t.Fatal(err)
	}
	if err := g.Thaw(); err != nil {
		t.Errorf("a second thaw: %v", err)
	}
	if err := g.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(ctx); err != nil {
		t.Errorf("a second removal: %v", err)
	}
	if _, err := os.Stat(path.Join(g.Dir())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is still there: %v", err)
	}
	if err := g.Move(1 << 22); err == nil {
		t.Error("moving into a group that is gone succeeded")
	}
}
