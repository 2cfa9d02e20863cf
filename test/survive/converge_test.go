package survive_test

import (
	"strconv"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
)

// A program writes faster than the link may carry: pre-copy gives up, says so, and
// the program runs on; hybrid switches, and its program does not wait for the pages.
func TestNoConvergence(t *testing.T) {
	begin(t)
	r, top := newRig(t), t
	// 8 MiB take 0.7 s on the link, and are written anew in 0.1.
	g := r.selfChecking(t, r.a, testutil.GoProgram(t, "./test/programs/workload"), "--size", "8MiB", "--rate", "80MiB/s", "--pattern", "edge")
	const link, allowed = "100Mbit", 300
	top.Run("precopy", func(t *testing.T) {
		r.watch(t)
		g.t = t
		r.a.refused(t, 1, "does not converge", strconv.Itoa(g.pid), "--to", r.b.addr(), "--mode", "precopy", "--max-bandwidth", link, "--compress", "none")
		r.clean(t, g)
		g.beat(5)
		g.oneOwner(0)
		reps, err := r.a.list()
		if err != nil || len(reps) != 1 {
			t.Fatalf("%v: %+v", err, reps)
		}
		if rep := reps[0]; g.at != r.a || len(rep.Rounds) < 2 || !strings.Contains(rep.Reason, "allow more downtime") {
			t.Errorf("it is on host %s after %d rounds: %s", g.at.name(), len(rep.Rounds), rep.Reason)
		}
	})
	top.Run("hybrid", func(t *testing.T) {
		r.watch(t)
		g.t = t
		req := g.request("hybrid")
		req.MaxBandwidth, req.MaxDowntimeMS, req.Compress = link, allowed, "none"
		rep, err := g.migrate(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s, downtime %.0f ms, %d pages, %d by faults, rounds %+v: %s", rep.Outcome, rep.DowntimeMS, rep.PagesTotal, rep.PagesFaulted, rep.Rounds, rep.SwitchReason)
		r.clean(t, g)
		g.beat(5)
		g.oneOwner(1)
		switch {
		case g.at != r.b || len(rep.Rounds) == 0:
			t.Errorf("it is on host %s after %d rounds: %s", g.at.name(), len(rep.Rounds), rep.Reason)
		case rep.DowntimeMS > allowed:
			t.Errorf("downtime %.0f ms, %d are allowed", rep.DowntimeMS, allowed)
		case rep.PagesFaulted == 0:
			t.Error("nothing was fetched after the switch")
		}
	})
	g.t = t
	g.verify()
	r.clean(t)
}
