package pager

import (
	"math/rand/v2"
	"testing"
	"time"
)

func TestTouchWhileItArrives(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 16384, 4, rand.Uint64())
	r.connect(2)
	r.adopt(p)
	r.src.delay.Store(int64(2 * time.Millisecond))
	p.say(t)
	r.do("fetch", r.c.Fetch)
	r.do("resident", r.c.WaitResident)
	st := r.stats()
	t.Logf("%+v", st)
	r.do("finish", r.c.Finish)
	t.Log(p.finish(t))
	if st.PagesResident != st.PagesTotal || st.PagesFaulted == 0 {
		t.Errorf("%d of %d pages resident, %d faulted", st.PagesResident, st.PagesTotal, st.PagesFaulted)
	}
	if st.PagesDouble > st.PagesTotal/100+5 {
		t.Errorf("%d doubles", st.PagesDouble)
	}
}
