package fleet

import (
	"math"
	"math/rand/v2"
	"testing"
)

const mb = 1e6

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-6*max(math.Abs(a), math.Abs(b), 1) }

func TestShare(t *testing.T) {
	for _, c := range []struct {
		name   string
		budget float64
		rs     []Running
		want   []float64
	}{
		{"no budget", 0, []Running{{}, {}}, []float64{0, 0}},
		{"clean ones get the same", 100 * mb, []Running{{}, {Left: 5}}, []float64{50 * mb, 50 * mb}},
		{"all converge at their part", 100 * mb, []Running{{DirtyRate: 30 * mb}, {DirtyRate: 3 * mb}}, []float64{50 * mb, 50 * mb}},
		{"who cannot converge waits", 100 * mb, []Running{{DirtyRate: 300 * mb}, {DirtyRate: 3 * mb}}, []float64{.5 * mb, 99.5 * mb}},
		{"after the switch nothing is dirtied", 100 * mb, []Running{{DirtyRate: 300 * mb, PostCopy: true}, {DirtyRate: 3 * mb}}, []float64{50 * mb, 50 * mb}},
		{"a newcomer takes only what is left", 100 * mb, []Running{{DirtyRate: 60 * mb, Rate: 90 * mb}, {DirtyRate: 3 * mb}}, []float64{80 * mb, 20 * mb}},
		{"who converges and is ahead gives way to no one", 100 * mb, []Running{{DirtyRate: 70 * mb, Rate: 99 * mb}, {}}, []float64{70 * 4 / 3. * mb, (100 - 70*4/3.) * mb}},
		{"nobody converges: one after the other, the shorter first", 100 * mb,
			[]Running{{DirtyRate: 300 * mb, Left: 2e9}, {DirtyRate: 300 * mb, Left: 1e9}}, []float64{.5 * mb, 99.5 * mb}},
		{"one alone", 100 * mb, []Running{{DirtyRate: 300 * mb}}, []float64{100 * mb}},
		{"post-copy keeps its part beside those that converge", 90 * mb,
			[]Running{{DirtyRate: 60 * mb, Rate: 80 * mb}, {PostCopy: true}, {}}, []float64{59.7 * mb, 30 * mb, .3 * mb}},
	} {
		got := Share(c.budget, c.rs)
		for i := range got {
			if math.Abs(got[i]-c.want[i]) > .6*mb {
				t.Errorf("%s: got %.1f, want %.1f", c.name, got, c.want)
				break
			}
		}
	}
}

func TestShareHoldsForAll(t *testing.T) {
	waiting, converging := 0, 0
	for range 20_000 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 2))
		rs := make([]Running, 1+r.IntN(8))
		for i := range rs {
			rs[i] = Running{Left: r.Uint64N(1 << 34), PostCopy: r.IntN(5) == 0}
			if r.IntN(3) > 0 {
				rs[i].DirtyRate = float64(r.IntN(20)) * 10 * mb
			}
			if r.IntN(2) > 0 {
				rs[i].Rate = float64(r.IntN(20)) * 15 * mb
			}
		}
		budget := math.Pow(10, 3+7*r.Float64())
		a, b := Share(budget, rs), Share(budget*(1+r.Float64()), rs)
		sum := 0.0
		for i := range rs {
			sum += a[i]
			if !(a[i] > 0) {
				t.Fatalf("seed %d: %d gets %v", seed, i, a[i])
			}
			if a[i] > b[i] && !near(a[i], b[i]) {
				t.Fatalf("seed %d: %d gets %v of %v, and %v of more", seed, i, a[i], budget, b[i])
			}
			if rs[i].PostCopy && a[i] < budget/float64(len(rs))*(1-1e-9) {
				t.Fatalf("seed %d: %d is in post-copy and gets %v of %v", seed, i, a[i], budget)
			}
		}
		if !near(sum, budget) {
			t.Fatalf("seed %d: %v of %v", seed, sum, budget)
		}
		// All but one that do not get what they need are at the floor, or
		// converged before and have something left of it. Who needs less gets no less than who needs more and did not converge before.
		floor, between := floorPart*budget/float64(len(rs)), 0
		for i := range rs {
			switch enough := a[i] >= rs[i].need()*(1-1e-9); {
			case enough:
				converging++
			case near(a[i], floor):
				waiting++
			default:
				between++
			}
			for j := range rs {
				if !rs[i].PostCopy && !rs[j].PostCopy && rs[i].need() < rs[j].need() && rs[j].Rate < rs[j].need() && a[i] < a[j] && !near(a[i], a[j]) && a[j] >= rs[j].need() {
					t.Fatalf("seed %d: %d needs %v and gets %v, %d needs %v and gets %v", seed, i, rs[i].need(), a[i], j, rs[j].need(), a[j])
				}
			}
		}
		if between > 1 {
			t.Fatalf("seed %d: %d get neither what they need nor the floor: %v of %+v", seed, between, a, rs)
		}
	}
	t.Logf("%d converge, %d wait", converging, waiting)
	if waiting < 1000 || converging < 1000 {
		t.Error("too few to tell anything")
	}
}
