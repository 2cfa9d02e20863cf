package migrate

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/plan"
)

// TestRehearse: a dry run leaves nothing at either end, and measures.
func TestRehearse(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		s.auto = true // landing takes a while
		l, src := s.newLife()
		r, err := Rehearse(l.ctx, src.cfg)
		if err != nil || r.Hello.Host != "b" {
			t.Fatalf("%+v, %v", r, err)
		}
		m := r.Measured
		if m.Tracker != "model" || m.Content != modelPages*page.Size || m.Sampled == 0 || !m.Curve.Known() ||
			m.Took < onlyLooks*onlyPause || (m.Rate == 0) != (r.Failed != nil) {
			t.Errorf("measured %+v, %v", m, r.Failed)
		}
		time.Sleep(time.Minute)
		s.want(copyRunning, copyNone)
		if s.arrival || len(s.disks[RoleDestination].last) != 0 || len(s.disks[RoleSource].last) != 0 {
			t.Error("an offer that was only asked about left something")
		}
	})
}

// TestRehearseUntracked: where the process cannot be tracked the destination is
// asked all the same.
func TestRehearseUntracked(t *testing.T) {
	stage(t, ModeStop, func(t *testing.T, s *scene) {
		s.stuck = []string{"track"}
		l, src := s.newLife()
		r, err := Rehearse(l.ctx, src.cfg)
		if err != nil || r.Hello.Host != "b" || !errors.Is(r.Failed, errInjected) || r.Measured.Tracker != "" {
			t.Fatalf("%+v, %v", r, err)
		}
		time.Sleep(time.Minute)
		s.want(copyRunning, copyNone)
		if s.arrival {
			t.Error("the destination keeps it")
		}
	})
}

// TestAutoUntracked: auto moves what cannot be tracked by post-copy, hybrid not.
func TestAutoUntracked(t *testing.T) {
	for _, auto := range []bool{true, false} {
		stage(t, ModeHybrid, func(t *testing.T, s *scene) {
			s.auto, s.stuck = auto, []string{"track"}
			l, src := s.newLife()
			o := s.await(s.begin(l, src.Run))
			switch {
			case auto && (o.res.Outcome != OutcomeDone || o.res.Chosen != ModePostCopy || len(o.res.Rounds) != 1 ||
				!strings.Contains(o.res.ChosenWhy, "tracked")):
				t.Errorf("%+v, %v", o.res, o.err)
			case !auto && (o.res.Outcome != OutcomeAborted || !errors.Is(o.err, errInjected)):
				t.Errorf("%+v, %v", o.res, o.err)
			}
		})
	}
}

// TestChoose: what the model says becomes the mode, and what it expects is noted.
func TestChoose(t *testing.T) {
	const gib = 1 << 30
	busy := plan.Curve{}
	busy.Add(plan.Point{Interval: 100 * time.Millisecond, Bytes: gib})
	busy.Add(plan.Point{Interval: time.Second, Bytes: 4 * gib})
	for _, c := range []struct {
		name   string
		mode   Mode
		auto   bool
		m      Measured
		rounds bool
		chosen Mode
		want   Mode // predicted
	}{
		{"idle", ModeHybrid, true, Measured{Content: 4 * gib, Rate: gib}, true, ModeHybrid, ModeHybrid},
		{"small", ModeHybrid, true, Measured{Content: 8 << 20, Rate: gib}, true, ModeHybrid, ModeHybrid},
		{"busy", ModeHybrid, true, Measured{Content: 4 * gib, Rate: gib, Curve: busy}, false, ModePostCopy, ModePostCopy},
		{"busy, hybrid by order", ModeHybrid, false, Measured{Content: 4 * gib, Rate: gib, Curve: busy}, true, "", ModeHybrid},
		{"busy, precopy by order", ModePreCopy, false, Measured{Content: 4 * gib, Rate: gib, Curve: busy}, true, "", ModePreCopy},
		{"no rate", ModeHybrid, true, Measured{Content: 4 * gib, Curve: busy}, true, ModeHybrid, ""},
	} {
		r := &rounds{s: bare(SourceConfig{Auto: c.auto})}
		r.s.rec.Mode = c.mode
		got, err := r.choose(&c.m)
		res := &r.s.res
		if err != nil || got != c.rounds || res.Chosen != c.chosen || (c.chosen != "") != (res.ChosenWhy != "") ||
			(c.chosen == ModePostCopy) != (res.Switch != "") {
			t.Errorf("%s: rounds %v, chosen %q (%s), %v", c.name, got, res.Chosen, res.ChosenWhy, err)
		}
		switch p := res.Predicted; {
		case (p != nil) != (c.want != ""):
			t.Errorf("%s: predicted %+v", c.name, p)
		case p != nil && (p.Mode != c.want || p.TotalMS <= 0 || p.DowntimeMS <= 0 || p.BytesWire == 0 || p.Rounds < 1):
			t.Errorf("%s: predicted %+v", c.name, p)
		}
	}
}

// TestSpread: a sample is of the pages, as large as asked for, and from all over.
func TestSpread(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		var s page.Set
		at := page.Addr(1 << 20)
		for range 1 + rng.IntN(40) {
			at += page.Addr(1+rng.IntN(2000)) << page.Shift
			r := page.Range{Start: at, End: at + page.Addr(1+rng.IntN(4000))<<page.Shift}
			s.Add(r)
			at = r.End
		}
		want := uint64(1+rng.IntN(64)) << 20
		out := spread(&s, want)
		if rest := page.Difference(&out, &s); !rest.Empty() {
			t.Fatalf("%v is none of the pages", rest.Ranges()[0])
		}
		if n := out.Bytes(); n+samplePiece < min(want, s.Bytes()) || n > want+want/8+samplePiece {
			t.Fatalf("%d bytes of %d, wanted %d", n, s.Bytes(), want)
		}
		if s.Bytes() <= want && out.Bytes() != s.Bytes() {
			t.Fatal("not all of what is less than wanted")
		}
		rs := s.Ranges()
		if mid := (rs[0].Start + rs[len(rs)-1].End) / 2; s.Bytes() > 2*want && out.Bytes() > 4*samplePiece && s.BytesIn(page.Range{Start: mid, End: at}) > s.Bytes()/3 &&
			out.BytesIn(page.Range{Start: mid, End: at}) == 0 {
			t.Fatal("nothing from the second half")
		}
	}
}
