package pager

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"
)

// TestChurn lets a program drop, move, grow, shrink, unmap and fork its memory
// while it arrives: it must never see a stale byte or a wrong zero.
func TestChurn(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := newRig(t)
	p := startProgram(t, "churn", 16384, 4, seed)
	r.connect(2)
	r.adopt(p)
	r.src.delay.Store(int64(3 * time.Millisecond))
	p.say(t)
	r.do("fetch", r.c.Fetch)
	r.do("resident", r.c.WaitResident)
	st := r.stats()
	t.Logf("%+v", st)
	r.do("finish", func(ctx context.Context) error { return r.c.Finish(ctx) })
	t.Log(p.finish(t))
	if st.Removes == 0 || st.Remaps == 0 || st.Unmaps == 0 || st.Forks == 0 || st.PagesFaulted == 0 || st.PagesDropped == 0 {
		t.Errorf("something did not happen: %+v", st)
	}
}
