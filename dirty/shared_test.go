package dirty_test

import (
	"fmt"
	"os"
	"sync/atomic"
	"testing"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/dirty/dirtytest"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// told fails unless exactly the pages of r with these numbers were told.
func told(t *testing.T, what string, p dirty.Pages, r page.Range, want ...int) {
	t.Helper()
	var got []int
	for _, w := range p.Shared.Written.Intersect(r) {
		for at := w.Start; at < w.End; at += page.Size {
			got = append(got, int(at-r.Start)>>page.Shift)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: pages %v told, %v written", what, got, want)
	}
}

func every(n, step int) (out []int) {
	for i := 0; i < n; i += step {
		out = append(out, i)
	}
	return out
}

// Shared memory that nobody else has.
func TestSharedAnonymous(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("shared", 1100)
		p.Poke(a.Range, 1)
		told(t, "first", s.Round(), a.Range, every(1100, 1)...)
		told(t, "at rest", s.Round(), a.Range)
		p.Poke(a.Range, 50)
		got := s.Round()
		told(t, "poked", got, a.Range, every(1100, 50)...)
		if got.Content.BytesIn(a.Range) != 0 {
			t.Error("shared memory told as private")
		}
		// A page that leaves the page table and comes back was not written.
		p.Do("advise %x 1100 4", uint64(a.Start)) // MADV_DONTNEED: the object keeps it
		p.Do("peek %x 1100 7", uint64(a.Start))
		told(t, "given up and read", s.Round(), a.Range)
		p.Do("poke %x 4 2", uint64(a.Start))
		told(t, "and written", s.Round(), a.Range, 0, 2)
		// A hole in the object is no content, and what comes there later is new.
		hole := page.Range{Start: a.Start + 16*page.Size, End: a.Start + 900*page.Size}
		p.Do("advise %x %d 9", uint64(hole.Start), hole.Pages()) // MADV_REMOVE
		got = s.Round()
		if n := got.Shared.Content.BytesIn(hole); n != 0 {
			t.Errorf("%d bytes in a hole are content", n)
		}
		p.Do("poke %x 700 300", uint64(hole.Start))
		told(t, "in the hole", s.Round(), a.Range, 16, 316, 616)
		// Punched out and read: zero, and nobody wrote it.
		p.Do("advise %x 1 9", uint64(a.Start)+50*page.Size)
		p.Do("advise %x 1 9", uint64(a.Start))
		p.Do("peek %x 1 1", uint64(a.Start))
		told(t, "removed and read", s.Round(), a.Range, 0)
		told(t, "at rest again", s.Round(), a.Range)
	})
}

// Pages that come and go far apart.
func TestSharedHole(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("shared", 4096)
		p.Do("poke %x 1 1", uint64(a.Start))
		p.Do("poke %x 1 1", uint64(a.Start))
		told(t, "first", s.Round(), a.Range, 0)
		for _, i := range []int{4000, 2000, 1023} {
			p.Do("poke %x 1 1", uint64(a.Start)+uint64(i)*page.Size)
			told(t, "in the hole", s.Round(), a.Range, i)
		}
		p.Do("advise %x 4096 9", uint64(a.Start))
		p.Do("poke %x 4096 1000", uint64(a.Start))
		p.Do("advise %x 4096 4", uint64(a.Start))
		told(t, "removed, written and dropped", s.Round(), a.Range, every(4096, 1000)...)
		told(t, "at rest", s.Round(), a.Range)
	})
}

// A child that writes and is gone again leaves no trace.
func TestSharedFork(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("shared", 64)
		p.Poke(a.Range, 1)
		s.Round()
		told(t, "at rest", s.Round(), a.Range)
		p.Do("child %x 5", uint64(a.Start))
		got := s.Round()
		if n := got.Shared.Written.BytesIn(a.Range) >> page.Shift; n != 5 {
			t.Errorf("a child wrote 5 pages, %d told", n)
		}
		told(t, "at rest", s.Round(), a.Range)
		p.Do("child %x 5", uint64(a.Start)+5*page.Size)
		told(t, "by another child", s.Round(), a.Range, 5, 6, 7, 8, 9)
	})
}

// A memfd is written by a second mapping, by its descriptor and from outside.
func TestSharedMemfd(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("memfd", 40)
		first := a.Range
		if a.Second.Start < first.Start {
			first = a.Second
		}
		p.Poke(a.Range, 1)
		got := s.Round()
		told(t, "first", got, first, every(40, 1)...)
		if n := got.Shared.Content.BytesIn(a.Range) + got.Shared.Content.BytesIn(a.Second); n != a.Bytes() {
			t.Errorf("%d bytes of content in both mappings of %d", n, a.Bytes())
		}
		told(t, "at rest", s.Round(), first)
		p.Poke(a.Range, 20)
		told(t, "by one mapping", s.Round(), first, 0, 20)
		p.Poke(a.Second, 30)
		told(t, "by the other", s.Round(), first, 0, 30)
		p.Do("pwrite %d 7", a.FD)
		told(t, "by the descriptor", s.Round(), first, 7)
		f, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/%d", p.Pid(), a.FD), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b, err := unix.Mmap(int(f.Fd()), 0, 40*page.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Munmap(b)
		b[9*page.Size+11] ^= 1
		told(t, "by another process", s.Round(), first, 9)
	})
}

// A private mapping of a memfd has the process's own pages, and the object's.
func TestPrivateMemfd(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("mempriv", 30)
		p.Poke(a.Range, 10)
		got := s.Round()
		if n := got.Content.BytesIn(a.Range) >> page.Shift; n != 3 {
			t.Errorf("%d pages are the process's own, 3 were changed", n)
		}
		if got.Shared.Content.BytesIn(a.Range) != 0 {
			t.Error("pages of an object that no shared mapping shows were told")
		}
		p.Do("pwrite %d 7", a.FD)
		got = s.Round()
		if got.Written.BytesIn(a.Range) != 0 {
			t.Error("a write to the object told as one to the process's own page")
		}
	})
}

// A page that was otherwise while it was sent, and is again as it was before.
func TestToggled(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	tr := track(t, p, dirty.Hash)
	a := p.Area("anon", 1)
	p.Poke(a.Range, 1) // adds 1
	look := func() bool {
		t.Helper()
		got, err := tr.Collect(p.Maps())
		if err != nil {
			t.Fatal(err)
		}
		return got.Written.Contains(a.Start)
	}
	if !look() {
		t.Error("a new page is not told")
	}
	// What was sent of it has another lock word than the page at both looks.
	sent := make([]byte, page.Size)
	sent[0] = 2
	tr.Sent([]page.Range{a.Range}, sent)
	if !look() {
		t.Error("the page is as it was at the last look, but not as it was sent, and is not told")
	}
	sent[0] = 1
	tr.Sent([]page.Range{a.Range}, sent)
	if look() {
		t.Error("the page is as it was sent, and is told")
	}
}

// Another mapping at the same place begins anew on the other side, too, though its
// content is the same.
func TestBecomesShared(t *testing.T) {
	each(t, func(t *testing.T, p *dirtytest.Program, s *dirtytest.Shadow, _ dirty.Method) {
		a := p.Area("anon", 40)
		p.Poke(a.Range, 1)
		s.Round()
		s.Round()
		p.Do("share %x 40", uint64(a.Start))
		got := s.Round()
		told(t, "shared", got, a.Range, every(40, 1)...)
		if got.Content.BytesIn(a.Range) != 0 {
			t.Error("shared memory told as private")
		}
	})
}

// What was not sent is told, and not read for it.
func TestNotReadBeforeSent(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	var read atomic.Int64
	tr, _, err := dirty.New(t.Context(), dirty.Config{PID: p.Pid(), Method: dirty.Hash, Shared: true, Pace: func(n int) { read.Add(int64(n)) }})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	mem, err := proc.OpenMemory(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	a := p.Area("shared", 5000) // more than one goroutine takes
	p.Poke(a.Range, 1)
	if _, err := tr.Collect(p.Maps()); err != nil {
		t.Fatal(err)
	}
	var of proc.Mapping
	for _, m := range p.Maps() {
		if m.Range == a.Range {
			of = m
		}
	}
	for i, sent := range []int{1, 3, 200, 5000} {
		r := page.Range{Start: a.Start, End: a.Start + page.Addr(sent)*page.Size}
		buf := make([]byte, r.Bytes())
		if err := mem.ReadPages([]page.Range{r}, buf); err != nil {
			t.Fatal(err)
		}
		tr.Sent([]page.Range{r}, buf)
		read.Store(0)
		got, err := tr.Collect([]proc.Mapping{of})
		if err != nil {
			t.Fatal(err)
		}
		if n := got.Shared.Written.BytesIn(a.Range) >> page.Shift; n != uint64(5000-sent) || read.Load() != int64(r.Bytes()) {
			t.Errorf("look %d: %d pages told of 5000 of which %d were sent, %d bytes read", i, n, sent, read.Load())
		}
	}
}

// A page that the program gave up in a private mapping of a file is not one of its
// own, whoever asks, though the kernel keeps a note of its protection.
func TestGivenUpInFile(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	a := p.Area("file", 20)
	p.Poke(a.Range, 1)
	tr := track(t, p, dirty.WPAsync)
	if _, err := tr.Collect(p.Maps()); err != nil {
		t.Fatal(err)
	}
	p.Do("advise %x 5 4", uint64(a.Start)) // MADV_DONTNEED
	got, err := tr.Collect(p.Maps())
	if err != nil {
		t.Fatal(err)
	}
	pm, err := proc.OpenPagemap(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	defer pm.Close()
	var own page.Set
	if err := pm.Find(a.Range, false, own.Add, func(page.Range) {}); err != nil {
		t.Fatal(err)
	}
	if n, m := got.Content.BytesIn(a.Range)>>page.Shift, own.Pages(); n != 15 || m != 15 {
		t.Errorf("of 15 pages %d are told and %d found", n, m)
	}
}
