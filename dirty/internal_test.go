package dirty

import (
	"context"
	"errors"
	"os"
	"reflect"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

func pages(from, to int) page.Range {
	return page.Range{Start: page.Addr(from) * page.Size, End: page.Addr(to) * page.Size}
}

func mapping(r page.Range, ino uint64, name string) proc.Mapping {
	m := proc.Mapping{Range: r, Ino: ino, Name: name}
	if ino != 0 {
		m.Offset = uint64(r.Start) // so that all of a file lie alike
	}
	return m
}

// bitsOf is a fake of the kernel's soft-dirty bits.
type bitsOf struct {
	content, dirty page.Set
	maps           []proc.Mapping
	shift          uint64 // of frames against addresses
	stopped        bool
	t              *testing.T
}

func (b *bitsOf) SoftDirty(r page.Range, _ bool, _ uint64, w proc.Walk) error {
	if !b.stopped {
		b.t.Error("bits are read while the process runs")
	}
	for _, c := range b.content.Intersect(r) {
		w.Content(c)
		for _, d := range b.dirty.Intersect(c) {
			w.Written(d)
		}
	}
	return nil
}

func (b *bitsOf) Entry(at page.Addr) (proc.Entry, error) {
	if !b.stopped {
		b.t.Error("frames are read while the process runs")
	}
	return proc.Entry{Present: true, Frame: uint64(at.Page()) + b.shift}, nil
}

func (b *bitsOf) Close() error { return nil }

func (b *bitsOf) write(r page.Range) {
	b.content.Add(r)
	b.dirty.Add(r)
}

func softDirtyOn(t *testing.T) (*softDirty, *bitsOf) {
	b := &bitsOf{t: t}
	s := &softDirty{pid: 1, pm: b}
	s.stop = func() (func() error, error) {
		b.stopped = true
		return func() error { b.stopped = false; return nil }, nil
	}
	s.list = func() ([]proc.Mapping, error) { return b.maps, nil }
	s.clear = func() error {
		if !b.stopped {
			t.Error("bits are cleared while the process runs")
		}
		b.dirty = page.Set{}
		return nil
	}
	return s, b
}

func check(t *testing.T, what string, s *softDirty, maps []proc.Mapping, want ...page.Range) {
	t.Helper()
	p, err := s.Collect(maps)
	if err != nil {
		t.Fatal(err)
	}
	if set := page.NewSet(want...); !reflect.DeepEqual(p.Written.Ranges(), set.Ranges()) {
		t.Errorf("%s: %v written, want %v", what, p.Written.Ranges(), set.Ranges())
	}
}

func TestSoftDirtyLogic(t *testing.T) {
	s, b := softDirtyOn(t)
	a, c := mapping(pages(10, 20), 0, ""), mapping(pages(30, 40), 0, "[heap]")
	b.write(pages(10, 15))
	b.shift = 1
	b.maps = []proc.Mapping{a}
	check(t, "first", s, []proc.Mapping{a}, pages(10, 15))
	check(t, "at rest", s, []proc.Mapping{a})
	b.write(pages(12, 13))
	check(t, "written", s, []proc.Mapping{a}, pages(12, 13))
	// It has come after the caller's list was read, or was not asked for.
	b.maps = []proc.Mapping{a, c}
	b.write(pages(30, 33))
	check(t, "not listed", s, []proc.Mapping{a})
	b.write(pages(10, 11))
	check(t, "not listed again", s, []proc.Mapping{a}, pages(10, 11))
	check(t, "listed", s, []proc.Mapping{a, c}, pages(30, 33))
	check(t, "at rest again", s, []proc.Mapping{a, c})
	// After an error nothing is known.
	fail := errors.New("no")
	clear := s.clear
	s.clear = func() error { return fail }
	if _, err := s.Collect([]proc.Mapping{a, c}); !errors.Is(err, fail) {
		t.Errorf("got %v", err)
	}
	if b.stopped {
		t.Error("the process still stands after an error")
	}
	s.clear = clear
	check(t, "after an error", s, []proc.Mapping{a, c}, pages(10, 15), pages(30, 33))
	// A large mapping is read in pieces, each once.
	big := mapping(page.Range{Start: 1 << 32, End: 1<<32 + 3*mostMapped}, 0, "")
	b.maps = []proc.Mapping{a, c, big}
	b.write(big.Range)
	check(t, "large", s, []proc.Mapping{a, c, big}, big.Range)
	check(t, "large, at rest", s, []proc.Mapping{a, c, big})
	// Other frames, and no bit says so.
	b.shift = 5000
	check(t, "moved", s, []proc.Mapping{a, c, big}, append(b.content.Intersect(pages(0, 100)), big.Range)...)
	check(t, "at rest after the move", s, []proc.Mapping{a, c, big})
	// None of the pages that are known is left to tell by.
	b.content = page.NewSet(pages(18, 20))
	check(t, "nothing to tell by", s, []proc.Mapping{a}, pages(18, 20))
	check(t, "at rest in the end", s, []proc.Mapping{a})
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestFresh(t *testing.T) {
	anon := func(from, to int) proc.Mapping { return mapping(pages(from, to), 0, "") }
	file := func(from, to int, ino uint64) proc.Mapping { return mapping(pages(from, to), ino, "/f") }
	shared := file(0, 10, 1)
	shared.Shared = true
	moved := file(0, 10, 1)
	moved.Offset += page.Size
	for i, c := range []struct {
		before, now []proc.Mapping
		want        []page.Range
	}{
		{nil, []proc.Mapping{anon(0, 10)}, []page.Range{pages(0, 10)}},
		{[]proc.Mapping{anon(0, 10)}, []proc.Mapping{anon(0, 10)}, nil},
		{[]proc.Mapping{anon(0, 10)}, []proc.Mapping{anon(2, 8)}, nil},
		{[]proc.Mapping{anon(2, 4), anon(6, 8)}, []proc.Mapping{anon(0, 10)}, []page.Range{pages(0, 2), pages(4, 6), pages(8, 10)}},
		{[]proc.Mapping{anon(0, 4), anon(4, 10)}, []proc.Mapping{anon(0, 10)}, nil},
		{[]proc.Mapping{file(0, 10, 1)}, []proc.Mapping{anon(0, 10)}, []page.Range{pages(0, 10)}},
		{[]proc.Mapping{file(0, 10, 1)}, []proc.Mapping{file(0, 10, 2)}, []page.Range{pages(0, 10)}},
		{[]proc.Mapping{file(0, 10, 1)}, []proc.Mapping{file(3, 5, 1)}, nil},
		{[]proc.Mapping{file(0, 10, 1)}, []proc.Mapping{moved}, []page.Range{pages(0, 10)}},
		{[]proc.Mapping{shared}, []proc.Mapping{file(0, 10, 1)}, []page.Range{pages(0, 10)}},
		{[]proc.Mapping{anon(0, 10)}, []proc.Mapping{shared}, nil},
		{[]proc.Mapping{anon(0, 6)}, []proc.Mapping{anon(0, 2), anon(4, 8)}, []page.Range{pages(6, 8)}},
	} {
		if got := fresh(c.before, c.now); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%d: %v, want %v", i, got, c.want)
		}
	}
}

func TestRuns(t *testing.T) {
	anon := func(at, bytes page.Addr) proc.Mapping { return mapping(page.Range{Start: at, End: at + bytes}, 0, "") }
	shared := anon(0x30000, 0x1000)
	shared.Shared = true
	const far = page.Addr(1 << 40)
	maps := []proc.Mapping{
		anon(0x10000, 0x1000), anon(0x20000, 0x1000), // one
		shared,
		anon(0x40000, 0x1000),
		mapping(page.Range{Start: 0x50000, End: 0x51000}, 7, "/lib"),
		anon(far, 3*mostMapped+page.Size),
		mapping(page.Range{Start: 2 * far, End: 2*far + 0x1000}, 0, "[vdso]"),
	}
	var got []page.Range
	var bytes uint64
	for _, r := range runs(maps) {
		got = append(got, r.Range)
		bytes += r.mapped
		if r.mapped > mostMapped {
			t.Errorf("%v: %d bytes at once", r.Range, r.mapped)
		}
		for _, m := range r.maps {
			if !m.Overlaps(r.Range) || !private(&m) {
				t.Errorf("%v has %v", r.Range, m.Range)
			}
		}
	}
	want := []page.Range{{Start: 0x10000, End: 0x21000}, {Start: 0x40000, End: 0x41000}, {Start: 0x50000, End: 0x51000},
		{Start: far, End: far + mostMapped}, {Start: far + mostMapped, End: far + 2*mostMapped},
		{Start: far + 2*mostMapped, End: far + 3*mostMapped}, {Start: far + 3*mostMapped, End: far + 3*mostMapped + page.Size}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if bytes != 0x4000+3*mostMapped+page.Size {
		t.Errorf("%d bytes in all runs", bytes)
	}
}

func TestHashes(t *testing.T) {
	h := newHashes(nil)
	mem := make([]byte, 200*page.Size)
	all := pages(1000, 1200)
	read := func(b []byte, at page.Addr) error { copy(b, mem[at-all.Start:]); return nil }
	differ := func() page.Set {
		var out page.Set
		if err := h.compare(all, read, out.Add); err != nil {
			t.Fatal(err)
		}
		return out
	}
	if got := differ(); got.Pages() != 200 {
		t.Errorf("%d of 200 pages differ from nothing", got.Pages())
	}
	h.sent([]page.Range{all}, mem, nil)
	if got := differ(); !got.Empty() {
		t.Errorf("%v differ", got.Ranges())
	}
	mem[70*page.Size+4095] = 1
	if got := differ(); !reflect.DeepEqual(got.Ranges(), []page.Range{pages(1070, 1071)}) {
		t.Errorf("%v differ, written page 1070", got.Ranges())
	}
	mem[70*page.Size+4095] = 0
	// What was dropped is unknown, though it comes back as it was.
	content := page.NewSet(pages(1000, 1010), pages(1150, 1200))
	gone := page.NewSet(pages(1010, 1150), pages(5000, 5500))
	h.drop(&gone)
	if got := differ(); !reflect.DeepEqual(got.Ranges(), []page.Range{pages(1010, 1150)}) {
		t.Errorf("%v unknown after all but %v was dropped", got.Ranges(), content.Ranges())
	}
	h.forget(pages(1005, 1160))
	if got := differ(); !reflect.DeepEqual(got.Ranges(), []page.Range{pages(1005, 1160)}) {
		t.Errorf("%v unknown", got.Ranges())
	}
	h.forget(everywhere)
	if len(h.blocks) != 0 {
		t.Errorf("%d blocks of nothing", len(h.blocks))
	}
	// Only what is in a set is noted where there is one.
	some := page.NewSet(pages(1000, 1001))
	h.sent([]page.Range{all}, mem, &some)
	if got := differ(); got.Pages() != 199 {
		t.Errorf("%d pages differ", got.Pages())
	}
	// What cannot be read is told, and forgotten.
	h.sent([]page.Range{all}, mem, nil)
	var out page.Set
	err := h.compare(all, func(b []byte, at page.Addr) error {
		if at <= all.Start+5*page.Size && all.Start+5*page.Size < at+page.Addr(len(b)) {
			return proc.ErrNoPage
		}
		return read(b, at)
	}, out.Add)
	if err != nil || !reflect.DeepEqual(out.Ranges(), []page.Range{pages(1005, 1006)}) {
		t.Errorf("%v told, page 1005 cannot be read: %v", out.Ranges(), err)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{{}, {PID: 1, Method: "other"}} {
		if _, _, err := New(t.Context(), c); err == nil {
			t.Errorf("%+v passes", c)
		}
	}
	// The best one that works, and why not the better.
	no := errors.New("the program forbids it")
	tr, lacking, err := New(t.Context(), Config{PID: os.Getpid(),
		OpenUserfault: func(context.Context) (*os.File, error) { return nil, no }})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	if tr.Method() != Hash || len(lacking) != 2 || lacking[0].Method != WPAsync || lacking[1].Method != SoftDirty {
		t.Errorf("%s, lacking %v", tr.Method(), lacking)
	}
	for _, l := range lacking {
		if l.Err == nil {
			t.Errorf("no reason why not %s", l.Method)
		}
	}
	if _, _, err := New(t.Context(), Config{PID: os.Getpid(), Method: SoftDirty}); err == nil {
		t.Error("soft-dirty without a way to stop the process")
	}
}
