package survive_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// A pre-copy that is given up or goes wrong in one of its rounds leaves the program
// where it was, as it was, and the next one works.
func TestRoundsDisturbed(t *testing.T) {
	begin(t)
	r, top := newRig(t), t
	g := r.restless(t, r.a)
	for _, c := range []struct {
		name  string
		side  side
		point string
		do    func(t *testing.T, from, to *node)
		words string // of the reason
	}{
		{"canceled", source, "source/recv/landed", func(_ *testing.T, _, _ *node) { g.cancelAll() }, "cancel"},
		{"canceled while pages land", source, "source/send/land/after", func(_ *testing.T, _, _ *node) { g.cancelAll() }, "cancel"},
		{"link cut", source, "source/send/land/after", func(t *testing.T, from, _ *node) {
			if err := from.cut(); err != nil {
				t.Error(err)
			}
		}, ""},
		{"link cut at the destination", destination, "destination/engine/land/before", func(t *testing.T, from, _ *node) {
			if err := from.cut(); err != nil {
				t.Error(err)
			}
		}, ""},
		{"pager killed", destination, "destination/engine/land/before", func(t *testing.T, _, to *node) {
			if n := to.killPagers(); n != 1 {
				t.Errorf("%d pagers were there to be killed", n)
			}
		}, "the destination's pager has died"},
		{"pager crashes", destination, "destination/engine/land/before", func(t *testing.T, _, to *node) {
			if n := to.signalPagers(unix.SIGQUIT); n != 1 { // the runtime says so and where
				t.Errorf("%d pagers were there to crash", n)
			}
		}, "it said last: SIGQUIT"},
		{"pager and daemon killed", destination, "destination/engine/land/after", func(_ *testing.T, _, to *node) {
			_ = to.daemon.Load().Signal(unix.SIGSTOP)
			to.killPagers()
			to.kill()
		}, ""},
		{"out of memory", destination, "restore/lay/after", func(t *testing.T, _, to *node) { to.starve(t) }, "memory"},
	} {
		for round := range 4 {
			name := "the sample"
			if round > 0 {
				name = fmt.Sprintf("round %d", round)
			}
			top.Run(c.name+", "+name, func(t *testing.T) {
				if r.broken {
					g.end()
					r = newRig(top)
					g = r.restless(top, r.a)
				}
				r.watch(t)
				g.t = t
				defer func() { g.t = top }()
				from, to := g.at, r.other(g.at)
				m := moment{c.side, c.point, 1, round + 1}
				switch {
				case c.side == source:
					m.round += looksBefore
				case c.point != roundEnds[c.side]:
					m.round++ // its round begins with what ends the one before
				}
				rep := g.disturbAt(t, g.endless(), m, func() { c.do(t, from, to) })
				t.Logf("%s %s", rep.Outcome, rep.Reason)
				if g.at != from {
					t.Errorf("it lives on host %s", g.at.name())
				}
				if rep.Outcome != appliance.OutcomeFailed && rep.Outcome != appliance.OutcomeCanceled {
					t.Errorf("outcome %s", rep.Outcome)
				}
				if !strings.Contains(rep.Reason, c.words) {
					t.Errorf("the reason does not speak of %s", c.words)
				}
				if round%2 == 1 {
					g.hop("hybrid")
					g.beat(2)
				}
			})
		}
	}
	g.verify()
	r.clean(t)
}

// starve allows the process-to-be no more memory than it has: in its own cgroup
// where that has the controller, else in one of the first hierarchy.
func (n *node) starve(t *testing.T) {
	t.Helper()
	write := func(file string, v int) {
		if err := os.WriteFile(file, []byte(strconv.Itoa(v)), 0); err != nil {
			t.Error(err)
		}
	}
	for _, p := range n.processes() {
		if !strings.HasPrefix(p.cgroup, "pageferry/") {
			continue
		}
		if max := filepath.Join(n.host.Cgroup(), p.cgroup, "memory.max"); unix.Access(max, unix.F_OK) == nil {
			write(max, 64<<10)
			continue
		}
		group := filepath.Join("/sys/fs/cgroup/memory", testutil.Name())
		if err := os.Mkdir(group, 0o755); err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() {
			testutil.Eventually(t, 10*time.Second, func() error { return os.Remove(group) })
		})
		write(filepath.Join(group, "memory.limit_in_bytes"), 64<<10)
		write(filepath.Join(group, "cgroup.procs"), p.pid)
	}
}
