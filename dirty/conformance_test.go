package dirty_test

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/dirty/dirtytest"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

func TestMain(m *testing.M) { testutil.Main(m) }

var (
	seed   = flag.Uint64("seed", 0, "seed of the random tests; 0: by the clock")
	rounds = flag.Int("rounds", 0, "rounds of the random tests; 0: a few")
)

// can is a host that can track by m.
func can(m dirty.Method) testutil.Requirement {
	return testutil.Requirement{Name: "tracking by " + string(m), Check: func() error {
		for _, s := range dirty.Probe() {
			if s.Method == m {
				return s.Err
			}
		}
		return fmt.Errorf("not a method")
	}}
}

func track(t testing.TB, p *dirtytest.Program, m dirty.Method) dirty.Tracker {
	t.Helper()
	tr, _, err := dirty.New(t.Context(), dirty.Config{
		PID: p.Pid(), Method: m, OpenUserfault: p.Userfault, Stop: p.Stop, Shared: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		if err := tr.Close(); err != nil {
			t.Errorf("closed again: %v", err)
		}
	})
	return tr
}

// methods are those that a test runs with. Many hosts have no soft-dirty bits, so
// every test that asks is run in the guest as well, whose kernel has.
func methods(t testing.TB) []dirty.Method {
	t.Helper()
	if vmtest.Inside() {
		return []dirty.Method{inGuest}
	}
	name, _, _ := strings.Cut(t.Name(), "/")
	if strings.HasPrefix(name, "Test") && !slices.ContainsFunc(everyMethod(), func(c test) bool { return c.name == name }) {
		t.Errorf("%s is not in everyMethod, so it is not run in the guest", name)
	}
	list := []dirty.Method{dirty.WPAsync, dirty.Hash}
	if can(dirty.SoftDirty).Check() == nil {
		list = append(list, dirty.SoftDirty)
	}
	return list
}

// TestRandom is the oracle of lost writes: see dirtytest.
func TestRandom(t *testing.T) {
	for _, m := range methods(t) {
		t.Run(string(m), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
			testutil.NoLeaks(t)
			p := dirtytest.Start(t)
			if err := dirtytest.Run(t, p, track(t, p, m), dirtytest.Config{Seed: *seed, Rounds: *rounds}); err != nil {
				t.Error(err)
			}
		})
	}
}

// whole is a huge page's size.
const whole = 2 << 20

// each runs f on a fresh program and shadow for every method.
func each(t *testing.T, f func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, m dirty.Method)) {
	t.Helper()
	for _, m := range methods(t) {
		t.Run(string(m), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
			testutil.NoLeaks(t)
			p := dirtytest.Start(t)
			s := dirtytest.NewShadow(t, p.Pid(), track(t, p, m))
			f(t, p, s, m)
			resume, err := p.Stop()
			if err != nil {
				t.Fatal(err)
			}
			s.Last()
			if err := s.Diff(); err != nil {
				t.Error(err)
			}
			if err := resume(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A huge page that is given up whole leaves nothing in the page table of which
// the kernel could tell that it was written.
func TestHugePageDropped(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("thp", 3*whole/page.Size)
		p.Poke(a.Range, 1)
		if got := s.Round(); !got.Written.Covers(a.Range) {
			t.Errorf("the first look lacks %v", got.Written.Gaps(a.Range))
		}
		s.Round()
		middle := page.Range{Start: a.Start + whole, End: a.Start + 2*whole}
		p.Do("advise %x %d 4", uint64(middle.Start), middle.Pages()) // MADV_DONTNEED
		if got := s.Round(); got.Content.BytesIn(middle) != 0 {
			t.Errorf("%d bytes of what was given up are content", got.Content.BytesIn(middle))
		}
		if got := s.Round(); got.Content.BytesIn(middle) != 0 || !got.Content.Covers(page.Range{Start: a.Start, End: middle.Start}) {
			t.Errorf("later: %v of %v", got.Content.Intersect(a.Range), a.Range)
		}
		p.Poke(page.Range{Start: middle.Start, End: middle.Start + page.Size}, 1)
		if got := s.Round(); !got.Written.Contains(middle.Start) {
			t.Error("a write to it was not told")
		}
	})
}

// Pages of a file that were changed, watched and given up are the file's again.
func TestFilePageDropped(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		for _, sort := range []string{"file", "mempriv"} {
			a := p.Area(sort, 32)
			p.Poke(a.Range, 2)
			s.Round()
			if got := s.Round(); got.Content.BytesIn(a.Range) != 16*page.Size {
				t.Errorf("%s: %d pages of 16 changed ones are content", sort, got.Content.BytesIn(a.Range)>>page.Shift)
			}
			half := page.Range{Start: a.Start, End: a.Start + 16*page.Size}
			p.Do("advise %x %d 4", uint64(half.Start), half.Pages())
			if got := s.Round(); got.Content.BytesIn(half) != 0 {
				t.Errorf("%s: %d pages that were given up are content", sort, got.Content.BytesIn(half)>>page.Shift)
			}
			p.Do("peek %x 16 1", uint64(half.Start))
			p.Poke(page.Range{Start: half.Start, End: half.Start + 4*page.Size}, 1)
			if got := s.Round(); got.Written.BytesIn(half) != 4*page.Size {
				t.Errorf("%s: %d pages of 4 were told", sort, got.Written.BytesIn(half)>>page.Shift)
			}
		}
	})
}

// What is not written is not told, and what is new is told whole.
func TestExact(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, m dirty.Method) {
		a := p.Area("anon", 512)
		p.Poke(a.Range, 1)
		s.Round()
		s.Round()
		if got := s.Round(); got.Written.BytesIn(a.Range) != 0 {
			t.Errorf("%d pages told that nobody wrote", got.Written.BytesIn(a.Range)>>page.Shift)
		}
		p.Poke(a.Range, 8)
		if got := s.Round(); got.Written.BytesIn(a.Range) != 64*page.Size {
			t.Errorf("%d pages told, 64 written", got.Written.BytesIn(a.Range)>>page.Shift)
		}
		b := p.Area("anon", 512)
		p.Do("peek %x 512 1", uint64(b.Start))
		p.Poke(b.Range, 4)
		got := s.Round()
		if n := got.Content.BytesIn(b.Range) >> page.Shift; n != 128 && m == dirty.WPAsync {
			t.Errorf("%d pages of a mapping with 128 are content", n)
		}
		if n := got.Written.BytesIn(b.Range); n != got.Content.BytesIn(b.Range) {
			t.Errorf("%d bytes of a new mapping told of %d", n, got.Content.BytesIn(b.Range))
		}
	})
}

// Peek changes nothing and tells of what was asked for only.
func TestPeek(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	tr := track(t, p, dirty.WPAsync)
	a := p.Area("anon", 4096)
	p.Poke(a.Range, 1)
	if _, err := tr.Collect(p.Maps()); err != nil {
		t.Fatal(err)
	}
	p.Poke(a.Range, 3)
	var ask page.Set
	want := 0
	for i := 0; i < 4096; i += 2 {
		ask.Add(page.PageOf(a.Start + page.Addr(i)*page.Size))
		if i%3 == 0 {
			want++
		}
	}
	for range 2 {
		got, err := tr.Peek(&ask)
		if err != nil {
			t.Fatal(err)
		}
		if got.Pages() != uint64(want) {
			t.Errorf("%d pages seen, %d of those asked for were written", got.Pages(), want)
		}
		for _, r := range got.Ranges() {
			for at := r.Start; at < r.End; at += page.Size {
				if i := int(at-a.Start) >> page.Shift; i%6 != 0 {
					t.Fatalf("page %d was not asked for or not written", i)
				}
			}
		}
	}
	got, err := tr.Collect(p.Maps())
	if err != nil {
		t.Fatal(err)
	}
	if n := got.Written.BytesIn(a.Range) >> page.Shift; n != (4096+2)/3 {
		t.Errorf("%d pages told after the peeks, %d written", n, (4096+2)/3)
	}
}

// A closed tracker says so.
func TestClosedTracker(t *testing.T) {
	for _, m := range methods(t) {
		testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
		p := dirtytest.Start(t)
		tr := track(t, p, m)
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
		if _, err := tr.Collect(p.Maps()); err != dirty.ErrClosed {
			t.Errorf("%s: a closed tracker says %v", m, err)
		}
		tr.Sent([]page.Range{page.PageOf(page.Size)}, make([]byte, page.Size))
	}
}

// unwatched starts a program that has registered an area, all of it written, with a
// userfaultfd of its own, as long as the test goes on.
func unwatched(t *testing.T) (*dirtytest.Program, dirtytest.Area) {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	f, err := p.Userfault(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	a := p.Area("anon", 64)
	p.Poke(a.Range, 1)
	if _, _, err := sys.UffdAPI(int(f.Fd()), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := sys.UffdRegister(int(f.Fd()), uint64(a.Start), a.Bytes(), sys.UffdioRegisterModeMissing); err != nil {
		t.Fatal(err)
	}
	return p, a
}

// What the program has registered with a userfaultfd of its own cannot be watched.
func TestRegisteredByProgram(t *testing.T) {
	p, a := unwatched(t)
	tr := track(t, p, dirty.WPAsync)
	for range 3 {
		got, err := tr.Collect(p.Maps())
		if err != nil {
			t.Fatal(err)
		}
		if !got.Content.Covers(a.Range) || !got.Written.Covers(a.Range) {
			t.Errorf("%v of %v told", got.Written.Intersect(a.Range), a.Range)
		}
	}
}

// Memory takes the place of other memory of the same kind: where it lies alike in
// its huge pages the kernel moves whole page tables and touches no entry.
func TestMovedOnto(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		from, to := p.Area("thp", 3*whole/page.Size), p.Area("thp", 3*whole/page.Size)
		for _, a := range []dirtytest.Area{from, to} {
			p.Do("advise %x %d 15", uint64(a.Start), a.Pages()) // MADV_NOHUGEPAGE
			p.Do("advise %x %d 4", uint64(a.Start), a.Pages())
			p.Poke(a.Range, 2)
		}
		p.Poke(from.Range, 2) // so that they differ
		s.Round()
		s.Round()
		p.Do("onto %x %d %x", uint64(from.Start), from.Pages(), uint64(to.Start))
		got := s.Round()
		if n := got.Written.BytesIn(to.Range); n < to.Bytes()/2 || got.Content.BytesIn(from.Range) != 0 {
			t.Errorf("%d pages told of %d that were moved", n>>page.Shift, to.Pages()/2)
		}
	})
}

// Mappings of one kind can be looked at apart from the others.
func TestKindsApart(t *testing.T) {
	for _, m := range methods(t) {
		t.Run(string(m), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
			testutil.NoLeaks(t)
			p := dirtytest.Start(t)
			tr := track(t, p, m)
			areas := map[string]page.Range{}
			for _, sort := range []string{"anon", "file", "shared"} {
				areas[sort] = p.Area(sort, 60).Range
				p.Poke(areas[sort], 1)
			}
			mem, err := proc.OpenMemory(p.Pid())
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			look := func(sort string) uint64 {
				t.Helper()
				var maps []proc.Mapping
				for _, m := range p.Maps() {
					if m.Shared == (sort == "shared") && (m.Shared || (m.Ino == 0) == (sort == "anon")) {
						maps = append(maps, m)
					}
				}
				got, err := tr.Collect(maps)
				if err != nil {
					t.Fatal(err)
				}
				for other, r := range areas {
					if other != sort && got.Content.BytesIn(r)+got.Shared.Content.BytesIn(r) != 0 {
						t.Errorf("asked for %s, told of %s", sort, other)
					}
				}
				wrote := page.Union(&got.Written, &got.Shared.Written)
				for _, r := range wrote.Ranges() {
					b := make([]byte, r.Bytes())
					if mem.ReadPages([]page.Range{r}, b) == nil {
						tr.Sent([]page.Range{r}, b)
					}
				}
				return wrote.BytesIn(areas[sort]) >> page.Shift
			}
			sorts := []string{"anon", "file", "shared"}
			for _, sort := range sorts {
				if n := look(sort); n != 60 {
					t.Errorf("first look at %s: %d pages of 60", sort, n)
				}
			}
			for range 2 {
				look("anon")
				look("file")
			}
			for _, sort := range sorts {
				if n := look(sort); n != 0 {
					t.Errorf("%s at rest: %d pages told", sort, n)
				}
			}
			for _, sort := range sorts {
				p.Poke(areas[sort], 6)
			}
			look("anon")
			look("anon")
			if n := look("file"); n != 10 {
				t.Errorf("%d pages of a file told, 10 written, before two looks at the others", n)
			}
			if n := look("shared"); n != 10 {
				t.Errorf("%d shared pages told, 10 written", n)
			}
			if n := look("anon"); n != 0 {
				t.Errorf("%d pages told again", n)
			}
		})
	}
}
