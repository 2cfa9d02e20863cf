package pager

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"golang.org/x/sys/unix"
)

// waitEvent waits for an event of a kind, passing over others.
func waitEvent(t testing.TB, c *Client, kind EventKind) Event {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		select {
		case e, ok := <-c.Events():
			if !ok {
				t.Fatalf("events ended before kind %d", kind)
			}
			if e.Kind == kind {
				return e
			}
		case <-limit:
			t.Fatalf("no event of kind %d", kind)
		}
	}
}

// drain reads a client's events so that none holds up the others.
func drain(c *Client) {
	go func() {
		for range c.Events() {
		}
	}()
}

func (r *rig) killPager() {
	r.t.Helper()
	old := r.c
	if err := unix.Kill(old.PID(), unix.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	waitEvent(r.t, old, Exited)
	if err := old.Close(); err != nil {
		r.t.Fatal(err)
	}
	r.cut()
}

func (r *rig) takeover() {
	r.t.Helper()
	c, err := Takeover(limit(r.t, 20*time.Second), r.cfg, 0)
	if err != nil {
		r.t.Fatal(err)
	}
	r.c = c
	r.t.Cleanup(func() { r.drop(c) })
}

// TestTakeover kills the pager again and again while the program churns: new
// ones go on, and the program never notices but for the wait.
func TestTakeover(t *testing.T) {
	for _, mode := range []string{"touch", "churn"} {
		t.Run(mode, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 1))
			r := newRig(t)
			p := startProgram(t, mode, 16384, 4, seed)
			r.connect(2)
			r.adopt(p)
			r.src.delay.Store(int64(4 * time.Millisecond))
			p.say(t)
			r.do("fetch", r.c.Fetch)
			kills := 0
			for kills < 5 {
				before := r.stats().PagesResident
				target := before + uint64(rnd.IntN(2000))
				testutil.Eventually(t, 20*time.Second, func() error {
					st := r.stats()
					if st.PagesResident >= target || st.PagesResident == st.PagesTotal {
						return nil
					}
					return errors.New("the stream does not advance")
				})
				if st := r.stats(); st.PagesResident == st.PagesTotal {
					break
				}
				r.killPager()
				kills++
				if rnd.IntN(2) == 0 { // the new one is killed before it has lanes
					r.takeover()
					r.killPager()
				}
				r.takeover()
				if st := r.stats(); st.PagesResident+64 < before {
					t.Fatalf("%d pages were resident, %d after the takeover", before, st.PagesResident)
				}
				r.connect(2)
			}
			r.src.delay.Store(int64(time.Millisecond))
			r.do("resident", r.c.WaitResident)
			t.Logf("%d kills, %+v", kills, r.stats())
			r.do("finish", func(ctx context.Context) error { return r.c.Finish(ctx) })
			t.Log(p.finish(t))
			if kills == 0 {
				t.Error("nothing was killed")
			}
		})
	}
}

// TestDaemonRestart: a client that goes away leaves the pager to the next one.
func TestDaemonRestart(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 4096, 2, 1)
	r.connect(1)
	r.adopt(p)
	r.src.delay.Store(int64(3 * time.Millisecond))
	p.say(t)
	r.do("fetch", r.c.Fetch)
	pid, keeper := r.c.PID(), r.c.KeeperPID()
	r.c.Close()
	c, err := Connect(limit(t, 10*time.Second), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.c = c
	t.Cleanup(func() { c.Close() })
	if c.PID() != pid || c.KeeperPID() != keeper {
		t.Errorf("connected to %d and %d, want %d and %d", c.PID(), c.KeeperPID(), pid, keeper)
	}
	if _, err := Takeover(limit(t, 10*time.Second), r.cfg, 0); err == nil {
		t.Error("takeover of a living pager")
	}
	drain(c)
	r.do("resident", c.WaitResident)
	r.do("finish", c.Finish)
	p.finish(t)
	if _, err := Connect(limit(t, 10*time.Second), r.cfg); !errors.Is(err, ErrNoPager) {
		t.Errorf("connect after the end: %v", err)
	}
	if left, _ := os.ReadDir(r.cfg.Dir); len(left) > 0 {
		t.Errorf("left in %s: %v", r.cfg.Dir, left)
	}
}

// TestKeeperDies: the pager starts another one, which can be taken over from.
func TestKeeperDies(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 4096, 2, 1)
	r.connect(1)
	r.adopt(p)
	keeper := r.c.KeeperPID()
	if err := unix.Kill(keeper, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if k := r.c.KeeperPID(); k == keeper || k == 0 {
			return errors.New("no other keeper")
		}
		return nil
	})
	r.src.delay.Store(int64(3 * time.Millisecond))
	p.say(t)
	r.do("fetch", r.c.Fetch)
	r.killPager()
	r.takeover()
	r.connect(1)
	r.do("resident", r.c.WaitResident)
	r.do("finish", r.c.Finish)
	p.finish(t)
}

// TestLaneCut cuts and reconnects lanes while a program waits for its pages.
func TestLaneCut(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 16384, 4, 7)
	r.connect(2)
	r.adopt(p)
	r.src.delay.Store(int64(2 * time.Millisecond))
	p.say(t)
	r.do("fetch", r.c.Fetch)
	for range 4 {
		want := r.stats().PagesResident + 1000
		testutil.Eventually(t, 20*time.Second, func() error {
			if r.stats().PagesResident < want {
				return errors.New("the stream does not advance")
			}
			return nil
		})
		r.cut()
		e := waitEvent(t, r.c, LaneLost)
		for e.Lane.Epoch < r.epoch {
			e = waitEvent(t, r.c, LaneLost)
		}
		if !errors.Is(e.Err, transport.ErrPeer) {
			t.Errorf("lane %+v lost: %v", e.Lane, e.Err)
		}
		r.connect(2)
	}
	drain(r.c)
	r.do("resident", r.c.WaitResident)
	st := r.stats()
	if n := r.src.reads.Load(); uint64(n) > st.PagesTotal+4*3*64+st.PagesFaulted {
		t.Errorf("%d pages were read for %d: the resume asks for what is here", n, st.PagesTotal)
	}
	t.Logf("%+v", st)
	r.do("finish", r.c.Finish)
	p.finish(t)
}

// TestPoison: when the source is gone for good, who touches a missing page gets
// SIGBUS, and who waits for one as well.
func TestPoison(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 4096, 2, 7)
	r.connect(1)
	r.adopt(p)
	r.src.gone.Store(true)
	p.say(t)
	e := waitEvent(t, r.c, LaneLost)
	if e.Err == nil {
		t.Error("lane lost without a reason")
	}
	drain(r.c)
	r.do("poison", r.c.Poison)
	err := p.Wait(20 * time.Second)
	if err == nil {
		t.Fatal("the program ended well")
	}
	if ws := unix.WaitStatus(exitStatus(err)); !ws.Signaled() || ws.Signal() != unix.SIGBUS {
		t.Errorf("the program ended with %v", err)
	}
	r.do("fetch", r.c.Fetch)
	if err := r.c.WaitResident(limit(t, 10*time.Second)); !errors.Is(err, ErrLost) {
		t.Errorf("resident: %v", err)
	}
}

// TestPageFile restores from a file, with eager regions written before the
// program runs.
func TestPageFile(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 4096, 2, 7)
	path := filepath.Join(t.TempDir(), "pages")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a := p.adoption()
	// Two of every four pages are eager and written through /proc/PID/mem.
	mem, err := os.OpenFile("/proc/"+itoa(p.Pid())+"/mem", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	a.Mem = mem
	b := make([]byte, page.Size)
	var index []FileRange
	off := int64(page.Size)
	for _, rg := range a.Lazy.Ranges() {
		index = append(index, FileRange{rg, off})
		for at := rg.Start; at < rg.End; at += page.Size {
			fillPage(b, uint64((at-arrivalBase)>>page.Shift))
			if _, err := f.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
			off += page.Size
		}
	}
	half := arrivalBase + 1024*page.Size
	for _, rg := range a.Lazy.Intersect(page.Range{Start: arrivalBase, End: half}) {
		a.Eager.Add(rg)
	}
	for _, rg := range a.Eager.Ranges() {
		a.Lazy.Remove(rg)
	}
	hot := a.Lazy.Ranges()[a.Lazy.Len()-1]
	a.Hot.Add(hot)
	if err := r.c.Adopt(limit(t, 10*time.Second), a); err != nil {
		t.Fatal(err)
	}
	p.uffd.Close()
	if err := r.c.AttachFile(limit(t, 10*time.Second), PageFile{File: f, Index: index}); err != nil {
		t.Fatal(err)
	}
	r.do("fetch", r.c.Fetch)
	r.do("eager", r.c.WaitEager)
	if n := r.stats().PagesEager; n != 0 {
		t.Errorf("%d eager pages are missing", n)
	}
	p.say(t)
	r.do("resident", r.c.WaitResident)
	r.do("finish", r.c.Finish)
	p.finish(t)
}

// TestRefusals: what cannot be served is refused when it is handed over.
func TestRefusals(t *testing.T) {
	r := newRig(t)
	p := startProgram(t, "touch", 64, 1, 7)
	ctx := limit(t, 20*time.Second)
	a := p.adoption()
	a.Regions = nil
	if err := r.c.Adopt(ctx, a); err == nil {
		t.Error("pages without a region were adopted")
	}
	a = p.adoption()
	a.UFFD = nil
	if err := r.c.Adopt(ctx, a); err == nil {
		t.Error("a trapped region without a userfaultfd was adopted")
	}
	a = p.adoption()
	a.Eager = a.Lazy.Clone()
	if err := r.c.Adopt(ctx, a); err == nil {
		t.Error("pages that are lazy and eager were adopted")
	}
	r.adopt(p)
	if err := r.c.Adopt(ctx, p.adoptionAgain()); err == nil {
		t.Error("a space was adopted twice")
	}
	if err := r.c.Finish(ctx); err == nil {
		t.Error("finished with pages missing")
	}
	id := transport.LaneID{Migration: r.cfg.ID, Epoch: 77, Kind: transport.Bulk}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := r.c.AttachLane(ctx, id, r.key, null, nil, nil); !errors.Is(err, transport.ErrAuth) {
		t.Errorf("lane of another epoch: %v", err)
	}
	if err := r.c.Abort(ctx); err != nil {
		t.Error(err)
	}
	waitEvent(t, r.c, Exited)
	if _, err := r.c.Stats(ctx); !errors.Is(err, ErrGone) {
		t.Errorf("stats of a dead pager: %v", err)
	}
}
