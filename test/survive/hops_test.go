package survive_test

import "testing"

func TestSmoke(t *testing.T) {
	begin(t)
	r := newRig(t)
	g := r.small(t, r.a)
	for i := range 6 {
		rep := g.hop([]string{"stop", "postcopy"}[i%2])
		t.Logf("%s: total %.0f ms, downtime %.1f ms, %d pages", rep.Mode, rep.TotalMS, rep.DowntimeMS, rep.PagesTotal)
		g.beat(3)
	}
	t.Log(len(r.a.points.passed()), r.a.points.passed())
	g.verify()
	g.oneOwner(6)
	r.clean(t)
}
