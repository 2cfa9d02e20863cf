package survive_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// changing is a program that ends, calls exec, or forks when it is told to.
const changing = `
import os, signal, time
def fork(*_):
    if os.fork() == 0:
        time.sleep(1000)
        os._exit(0)
signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))
signal.signal(signal.SIGUSR2, lambda *_: os.execv('/bin/sleep', ['sleep', '1000']))
signal.signal(signal.SIGHUP, fork)
print('ready', flush=True)
while True:
    time.sleep(0.001)
`

// living lists the processes of both hosts that call themselves pid, and those
// below them, with the host's name.
func (g *guest) living() (out []string) {
	for _, n := range g.r.nodes() {
		for _, p := range n.processes() {
			if p.comm != "pageferry" && p.comm != "pageferry-init" && p.state != 'Z' {
				out = append(out, n.name()+" "+p.comm)
			}
		}
	}
	return out
}

// A program that ends, calls exec or forks after it was looked at and before it
// is frozen, and one that is killed at any later moment, frozen or not.
func TestProgramThatChanges(t *testing.T) {
	begin(t)
	r, top := newRig(t), t
	python := python(t)
	launch := func(t *testing.T) *guest {
		g := r.launch(t, r.a, exec.Command(python, "-c", changing))
		g.identity = "changing"
		testutil.Eventually(t, 20*time.Second, func() error {
			if b, _ := os.ReadFile(g.output); !strings.Contains(string(b), "ready") {
				return fmt.Errorf("not ready: %s", b)
			}
			return nil
		})
		return g
	}
	// run moves it, sends sig when the source passes point and waits until that
	// has had its effect.
	run := func(t *testing.T, mode, point string, sig unix.Signal, effect func(g *guest, pid int) bool) (*guest, appliance.Report) {
		if r.broken {
			r = newRig(top)
		}
		r.watch(t)
		g := launch(t)
		pid := g.outer()
		reached := r.a.points.at(moment{source, point, 1, 0}, func() {
			_ = unix.Kill(pid, sig)
			for end := time.Now().Add(5 * time.Second); effect != nil && !effect(g, pid); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Errorf("%v had no effect", sig)
					return
				}
			}
		})
		rep, err := g.migrate(g.request(mode))
		r.a.points.do(nil)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-reached:
		default:
			t.Fatalf("%s was not passed: %s %s", point, rep.Outcome, rep.Reason)
		}
		t.Logf("%s %s", rep.Outcome, rep.Reason)
		if rep.Outcome != appliance.OutcomeDone && rep.Reason == "" {
			t.Errorf("outcome %s without a reason", rep.Outcome)
		}
		return g, rep
	}
	early := []struct{ mode, point string }{
		{"postcopy", "source/dial/after"}, {"postcopy", "source/recv/accept"}, {"postcopy", "source/engine/isolate/after"}, {"postcopy", "source/engine/freeze/before"},
		{"hybrid", "source/engine/track/before"}, {"precopy", "source/engine/track/after"}, {"hybrid", "source/engine/look/after"},
		{"precopy", "source/send/land/after"}, {"hybrid", "source/recv/landed"}, {"precopy", "source/engine/freeze/before"},
	}
	gone := func(_ *guest, pid int) bool {
		p := process{pid: pid}
		return !p.describe()
	}
	for _, e := range early {
		mode, point := e.mode, e.point
		top.Run("exits at "+point+", "+mode, func(t *testing.T) {
			g, rep := run(t, mode, point, unix.SIGUSR1, gone)
			if rep.Outcome != appliance.OutcomeFailed {
				t.Errorf("outcome %s", rep.Outcome)
			}
			if l := g.living(); len(l) > 0 {
				t.Errorf("there are %v", l)
			}
			r.clean(t)
		})
		top.Run("execs at "+point+", "+mode, func(t *testing.T) {
			g, rep := run(t, mode, point, unix.SIGUSR2, func(_ *guest, pid int) bool {
				p := process{pid: pid}
				return p.describe() && p.comm == "sleep"
			})
			want := "a sleep"
			if rep.Outcome == appliance.OutcomeDone {
				want = "b sleep"
			}
			if l := g.living(); len(l) != 1 || l[0] != want {
				t.Errorf("outcome %s, and there are %v", rep.Outcome, l)
			}
			g.comm = "sleep"
			r.clean(t, g)
			g.end()
			r.clean(t)
		})
		top.Run("forks at "+point+", "+mode, func(t *testing.T) {
			g, rep := run(t, mode, point, unix.SIGHUP, func(_ *guest, pid int) bool {
				b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
				return len(b) > 0
			})
			if rep.Outcome != appliance.OutcomeFailed && rep.Outcome != appliance.OutcomeRefused {
				t.Errorf("outcome %s", rep.Outcome)
			}
			if l := g.living(); len(l) != 2 || !strings.HasPrefix(l[0], "a ") || !strings.HasPrefix(l[1], "a ") {
				t.Errorf("there are %v", l)
			}
			for _, p := range r.a.processes() {
				if p.comm == g.comm {
					_ = unix.Kill(p.pid, unix.SIGKILL)
				}
			}
			r.clean(t)
		})
	}
	for _, point := range []string{"source/recv/accept", "source/engine/freeze/after", "source/send/state/after", "source/recv/ready",
		"source/engine/hold/after"} {
		top.Run("killed at "+point, func(t *testing.T) {
			// Nobody but the one who killed it ended it, and nobody makes
			// another of it.
			g, rep := run(t, "postcopy", point, unix.SIGKILL, nil)
			if l := g.living(); len(l) > 1 || len(l) == 1 && (l[0][:2] != "b " || rep.Outcome != appliance.OutcomeDone) {
				t.Errorf("outcome %s, and there are %v", rep.Outcome, l)
			}
			g.end()
			r.clean(t)
		})
	}
}

// The cgroup of a process that arrived and ended by itself is cleared away: by
// the next one that comes or goes, and by the next daemon.
func TestGroupsSwept(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	groups := func(n *node) (out []string) {
		for _, dir := range n.cgroups() {
			if strings.HasPrefix(dir, "pageferry/") {
				out = append(out, dir)
			}
		}
		return out
	}
	g := r.small(t, r.a)
	g.hop("postcopy")
	g.verify()
	r.clean(t)
	r.b.restart(t)
	if left := groups(r.b); len(left) > 0 {
		t.Errorf("after a restart there are %v", left)
	}
	for range 2 {
		g = r.small(t, r.a)
		g.hop("stop")
		g.verify()
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if left := groups(r.b); len(left) > 1 {
			return fmt.Errorf("after a second one came there are %v", left)
		}
		return nil
	})
	r.clean(t)
}
