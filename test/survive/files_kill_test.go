package survive_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// TestFilesKilled kills pager, daemon and both of the host to which a program comes that
// has none of its files there.
func TestFilesKilled(t *testing.T) {
	begin(t)
	h := newHome(t)
	rigged := func() *rig {
		r := newRig(t)
		r.b.hide(t, h.dir)
		return r
	}
	r := rigged()
	for _, point := range []string{
		"destination/recv/state",
		"restore/check/after",
		"restore/mappings/after",
		"restore/trap/after",
		"restore/descriptors/after",
		"destination/journal/ready/after",
		"destination/engine/release/after",
		"destination/journal/running/after",
		"destination/engine/resident/before",
		"inject/settle-noted",
		"inject/settle-copy",
		"inject/settle-copied",
	} {
		for _, who := range []string{"pager", "daemon", "both"} {
			t.Run(point+", "+who, func(t *testing.T) {
				if r.broken {
					r = rigged()
				}
				r.watch(t)
				g := r.selfChecking(t, r.a, h.args...)
				req := g.request("postcopy")
				req.MaxBandwidth = "40MiB/s" // it waits for files for a while
				rep := g.disturbAt(t, req, moment{destination, point, 1, 0}, func() {
					if who != "pager" {
						// Stopped, it cannot put another in the pager's place.
						_ = r.b.daemon.Load().Signal(unix.SIGSTOP)
					}
					if who != "daemon" {
						if n := r.b.killPagers(); n != 1 {
							t.Errorf("%d pagers were there to be killed", n)
						}
					}
					if who != "pager" {
						r.b.kill()
					}
				})
				t.Logf("%s %s", rep.Outcome, rep.Reason)
				if !strings.HasPrefix(point, "destination/recv/state") && !strings.HasPrefix(point, "restore/") && point != "destination/journal/ready/after" {
					if rep.Outcome != appliance.OutcomeDone {
						t.Errorf("it was committed, and then %s: %s", rep.Outcome, rep.Reason)
					}
				}
				if g.at == r.b {
					g.settled(t, h.dir)
				}
				g.fork(t)
				g.verify()
				r.clean(t)
			})
		}
	}
}

// beginStrange begins to move a program to host b, which has none of its files, slowly.
func beginStrange(t *testing.T) (g *guest, h *home, id string) {
	t.Helper()
	begin(t)
	r := newRig(t)
	h = newHome(t)
	r.b.hide(t, h.dir)
	r.watch(t)
	g = r.selfChecking(t, r.a, h.args...)
	req := g.request("postcopy")
	req.MaxBandwidth = "3MiB/s"
	id, err := g.begin(req)
	if err != nil {
		t.Fatal(err)
	}
	return g, h, id
}

// awaitReport waits until what n reports of a migration is ok.
func (g *guest) awaitReport(t *testing.T, n *node, id, when string, ok func(rep appliance.Report) bool) {
	t.Helper()
	testutil.Eventually(t, 30*time.Second, func() error {
		rep, there := g.reportOf(n, id)
		if !there || !ok(rep) {
			return fmt.Errorf("%s, host %s says: %+v", when, n.name(), rep)
		}
		return nil
	})
}

// TestFilesOfALostSource: while the source is away a program waits that needs more of
// its files; people are told, and it goes on when the source is back.
func TestFilesOfALostSource(t *testing.T) {
	g, h, id := beginStrange(t)
	r := g.r
	report := func(when string, ok func(rep appliance.Report) bool) {
		t.Helper()
		g.awaitReport(t, r.b, id, when, ok)
	}
	report("when it was moved", func(rep appliance.Report) bool {
		if rep.State == "running" && rep.BytesWire > 8<<20 {
			t.Errorf("%d bytes came before it ran: files were read ahead, that it has changed pages of", rep.BytesWire)
		}
		return rep.State == "running"
	})
	r.a.kill()
	g.at = r.b
	testutil.Eventually(t, 20*time.Second, func() error {
		before := r.recorder.Beats(g.identity).Count
		time.Sleep(300 * time.Millisecond)
		if now := r.recorder.Beats(g.identity).Count; now != before {
			return fmt.Errorf("it does not wait for the source: %d beats, then %d", before, now)
		}
		return nil
	})
	report("while the source is away", func(rep appliance.Report) bool { return !rep.Finished() && rep.Reason != "" })
	// The mount can be looked at all the same, but for what is at the source.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if out, err := r.b.host.Run(ctx, "cat", "/run/pageferry/"+id+"/status"); err != nil || !strings.Contains(out, "PagesTotal") {
		t.Errorf("its status: %v: %s", err, out)
	}
	r.a.start(t)
	testutil.Eventually(t, 30*time.Second, g.calm)
	g.beat(5)
	g.settled(t, h.dir)
	g.fork(t)
	g.verify()
	r.clean(t)
}

// TestFilesWhole: after stop and pre-copy a program needs nothing of its source any more,
// also where it had its files from there.
func TestFilesWhole(t *testing.T) {
	begin(t)
	r := newRig(t)
	h := newHome(t)
	r.b.hide(t, h.dir)
	r.watch(t)
	for _, mode := range []string{"stop", "precopy"} {
		g := r.selfChecking(t, r.a, h.args...)
		reached := r.b.points.at(moment{destination, "destination/journal/running/after", 1, 0}, func() { r.a.kill() })
		id, err := g.begin(g.request(mode))
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-reached:
		case <-time.After(30 * time.Second):
			t.Fatal("it was never moved")
		}
		r.b.points.do(nil)
		g.at = r.b
		g.beat(20)
		g.fork(t)
		g.awaitReport(t, r.b, id, "after it was moved", func(rep appliance.Report) bool { return rep.State == "resident" })
		g.settled(t, h.dir)
		r.a.start(t)
		testutil.Eventually(t, 30*time.Second, g.calm)
		g.verify()
		r.clean(t)
	}
}

// TestFilesOfAnEndedSource: the source's copy ends, and its daemon with it, before all
// files are here. What is lost is said, and nothing is left.
func TestFilesOfAnEndedSource(t *testing.T) {
	g, _, id := beginStrange(t)
	r, copied := g.r, g.outer()
	g.awaitReport(t, r.b, id, "when it was moved", func(rep appliance.Report) bool {
		return rep.State == "running" && rep.PagesResident >= rep.PagesTotal
	})
	r.a.kill()
	if err := unix.Kill(copied, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.a.start(t)
	g.awaitReport(t, r.b, id, "when its copy had ended", func(rep appliance.Report) bool {
		return rep.Outcome == appliance.OutcomeLost && strings.Contains(rep.Reason, "SIGBUS")
	})
	g.at = r.b
	g.end()
	r.clean(t)
}
