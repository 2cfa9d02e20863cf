package dirty_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/dirty/dirtytest"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// A look that is told of fewer mappings does not make the next one forget what is
// in the others.
func TestLeftOut(t *testing.T) {
	for _, m := range methods(t) {
		t.Run(string(m), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
			testutil.NoLeaks(t)
			p := dirtytest.Start(t)
			a := p.Area("anon", 300)
			p.Poke(a.Range, 3)
			tr := track(t, p, m)
			look := func(maps []proc.Mapping) dirty.Pages {
				t.Helper()
				got, err := tr.Collect(maps)
				if err != nil {
					t.Fatal(err)
				}
				return got
			}
			all := p.Maps()
			less := slices.DeleteFunc(slices.Clone(all), func(m proc.Mapping) bool { return m.Overlaps(a.Range) })
			look(all)
			if got := look(less); got.Content.BytesIn(a.Range) != 0 {
				t.Error("content is told of a mapping that was not listed")
			}
			p.Poke(page.Range{Start: a.Start, End: a.Start + page.Size}, 1)
			look(less)
			got := look(all)
			if n := got.Content.BytesIn(a.Range) >> page.Shift; n != 100 {
				t.Errorf("%d pages have content, want 100", n)
			}
			if !got.Written.Contains(a.Start) {
				t.Error("what was written while the mapping was not listed was not told")
			}
		})
	}
}

// What is given up in a mapping that cannot be watched is no content any more.
func TestGivenUpUnwatched(t *testing.T) {
	p, a := unwatched(t)
	tr, area := track(t, p, dirty.WPAsync), a.Range
	for _, look := range []func([]proc.Mapping) (dirty.Pages, error){tr.Collect, tr.Collect, tr.Last} {
		a.End -= 16 * page.Size
		p.Do("advise %x %d 4", uint64(a.End), 16) // MADV_DONTNEED
		got, err := look(p.Maps())
		if err != nil {
			t.Fatal(err)
		}
		if rs := got.Content.Intersect(area); len(rs) != 1 || rs[0] != a.Range {
			t.Errorf("%v has content, want %v", rs, a.Range)
		}
	}
}

// Guards are told by every look as a walk of all page tables tells them, and are no
// content; what they replaced is gone.
func TestGuards(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		const install, remove = 102, 103 // MADV_GUARD_INSTALL, Linux 6.13
		a := p.Area("anon", 200)
		p.Poke(a.Range, 1)
		at := func(n int) page.Addr { return a.Start + page.Addr(n)*page.Size }
		for i, look := range []func() dirty.Pages{s.Round, s.Round, s.Last, s.Round} {
			p.Do("advise %x 3 %d", uint64(at(10*i)), install)
			if i > 0 {
				p.Do("advise %x 3 %d", uint64(at(10*i-10)), remove)
			}
			look()
			if err := s.Exact(); err != nil {
				t.Errorf("look %d: %v", i, err)
			}
		}
	})
}

// A process that reserved much and uses little keeps its small page tables: looks
// do not note what is not there.
func TestReservedStaysEmpty(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	a := p.Area("anon", 64<<20/page.Size)
	p.Poke(page.Range{Start: a.Start, End: a.Start + page.Size}, 1)
	tr := track(t, p, dirty.WPAsync)
	before := tables(t, p.Pid())
	for _, look := range []func([]proc.Mapping) (dirty.Pages, error){tr.Collect, tr.Collect, tr.Collect, tr.Last} {
		p.Poke(page.Range{Start: a.Start, End: a.Start + page.Size}, 1)
		if _, err := look(p.Maps()); err != nil {
			t.Fatal(err)
		}
	}
	if after := tables(t, p.Pid()); after > before+4 {
		t.Errorf("page tables have %d KiB, %d before", after, before)
	}
}

// tables is how many KiB of page tables a process has.
func tables(t *testing.T, pid int) (kib int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmPTE:")
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		t.Fatal(err)
	}
	return kib
}

// A mapping that is walked in several pieces is told whole by the look that finds
// it, whichever that is.
func TestNewLargeMapping(t *testing.T) {
	for _, m := range methods(t) {
		t.Run(string(m), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
			testutil.NoLeaks(t)
			p := dirtytest.Start(t)
			tr := track(t, p, m)
			for i, look := range []func([]proc.Mapping) (dirty.Pages, error){tr.Collect, tr.Collect, tr.Last} {
				a := p.Area("anon", 600<<20/page.Size)
				p.Poke(a.Range, 256)
				got, err := look(p.Maps())
				if err != nil {
					t.Fatal(err)
				}
				if c, w := got.Content.BytesIn(a.Range), got.Written.BytesIn(a.Range); c != 600<<20/256 || w != c {
					t.Errorf("look %d: %d pages told, %d of them written, want %d", i, c>>page.Shift, w>>page.Shift, 600)
				}
			}
		})
	}
}
