package appliance

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/plan"
	"github.com/pageferry/pageferry/transport"
)

// TestRemembered: the last migration to the same peer, under the same limit, that
// was large enough says how fast the link is.
func TestRemembered(t *testing.T) {
	report := func(id, peer string, rounds ...Round) Report {
		return Report{ID: id, Role: RoleSource, Outcome: OutcomeDone, Peer: peer, Rounds: rounds}
	}
	gib := Round{Pages: 1 << 18, MS: 1000, BytesWire: 1 << 29}
	half := Round{Pages: 1 << 17, MS: 1000, BytesWire: 1 << 29}
	slow := report("limited", "b", Round{Pages: 1 << 18, MS: 9000, BytesWire: 1 << 30})
	slow.MaxBandwidth = 1 << 27
	failed := report("failed", "b", half)
	failed.Outcome = OutcomeFailed
	arrived := report("arrived", "b", half)
	arrived.Role = RoleDestination
	for _, c := range []struct {
		name string
		rs   []Report
		want float64 // bytes per second, 0 none
		from string
	}{
		{"none", nil, 0, ""},
		{"one round", []Report{report("one", "b:7300", gib)}, 1 << 30, "one"},
		{"the last counts", []Report{report("old", "b", half), report("new", "b", gib)}, 1 << 30, "new"},
		{"others", []Report{report("x", "c", gib), slow, failed, arrived}, 0, ""},
		{"too small", []Report{report("old", "b", gib), report("new", "b", Round{Pages: 2000, MS: 40}), report("new", "b", Round{Pages: 1 << 18, MS: 20})}, 1 << 30, "old"},
		{"the last of several rounds is not known", []Report{report("r", "b", half, Round{Pages: 1 << 20, MS: 100})}, 1 << 29, "r"},
	} {
		l := remembered(c.rs, "b:7300", 0)
		switch {
		case (l != nil) != (c.want != 0):
			t.Errorf("%s: %+v", c.name, l)
		case l != nil && (math.Abs(l.BytesPerSecond-c.want) > 1 || !strings.Contains(l.From, c.from) || l.WireShare <= 0):
			t.Errorf("%s: %+v, want %v from %s", c.name, l, c.want, c.from)
		}
	}
	if l := remembered([]Report{slow}, "b:7300", slow.MaxBandwidth); l == nil {
		t.Error("under the same limit it counts")
	}
}

func TestNewOutlook(t *testing.T) {
	const gib = 1 << 30
	link := &Link{BytesPerSecond: gib, WireShare: 0.5, From: "a test"}
	var c plan.Curve
	c.Add(plan.Point{Interval: 50 * time.Millisecond, Bytes: 1 << 20})
	c.Add(plan.Point{Interval: 150 * time.Millisecond, Bytes: 2 << 20})
	o, err := newOutlook(migrate.Measured{Tracker: "x", Content: gib, Curve: c, Threads: 4, Rate: gib, Took: time.Second}, link, SourceOptions{})
	if err != nil || len(o.Predictions) != 4 || o.Auto != migrate.ModeHybrid || len(o.Measured.Dirty) != 2 || o.Measured.Dirty[1].Bytes != 2<<20 {
		t.Fatalf("%+v, %v", o, err)
	}
	for _, p := range o.Predictions {
		if p.BytesWire != p.BytesSent/2 || p.BytesSent < gib-page.Size || p.TotalMS < 1000 || p.Reason == "" {
			t.Errorf("%+v", p)
		}
		if long := p.DowntimeMS > 1000; long != (p.Mode == migrate.ModeStop) {
			t.Errorf("downtime %+v", p)
		}
	}
	// Without a look at the process nothing is said of rounds.
	o, err = newOutlook(migrate.Measured{Content: gib}, link, SourceOptions{})
	if err != nil || len(o.Predictions) != 2 || o.Measured != nil || o.Auto != migrate.ModePostCopy {
		t.Errorf("%+v, %v", o, err)
	}
	if o, err = newOutlook(migrate.Measured{Tracker: "x", Content: gib}, nil, SourceOptions{}); err != nil || len(o.Predictions) != 0 || o.Auto != "" {
		t.Errorf("without a link: %+v, %v", o, err)
	}
}

// TestPredictedIsReported: what was expected stands beside what happened, and what
// auto chose is the mode.
func TestPredictedIsReported(t *testing.T) {
	a, b := twoDaemons(t)
	a.engine.memory = page.Range{Start: 1 << 30, End: 1<<30 + fakeMemory}
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil || r.Mode != "auto" {
		t.Fatalf("%+v, %v", r, err)
	}
	got := finish(t, a, r.ID)
	if got.Outcome != OutcomeDone || got.Mode != "hybrid" || got.Predicted == nil || got.Predicted.Mode != migrate.ModeHybrid || got.Predicted.BytesSent < fakeMemory-page.Size {
		t.Errorf("%+v, predicted %+v", got, got.Predicted)
	}
	if all := strings.Join(got.Remarks, "\n"); !strings.Contains(all, "mode: hybrid, chosen by auto") {
		t.Errorf("remarks %q", all)
	}
	// A mode without rounds is foreseen by what the last migration took.
	before := newMigration(transport.MigrationID{1}, RoleSource, Report{Outcome: OutcomeDone, Peer: b.Config().Listen,
		Started: time.Now(), Rounds: []Round{{Pages: 1 << 18, MS: 1000}}})
	if err := a.registry.finish(before, nil); err != nil {
		t.Fatal(err)
	}
	if r, err = a.client.Migrate(t.Context(), MigrateRequest{PID: 4243, To: b.Config().Listen, Mode: "stop"}); err != nil {
		t.Fatal(err)
	}
	got = finish(t, a, r.ID)
	if p := got.Predicted; got.Mode != "stop" || p == nil || p.Mode != migrate.ModeStop || p.DowntimeMS < 1000*fakeMemory/(1<<30) {
		t.Errorf("%+v, predicted %+v", got, p)
	}
}
