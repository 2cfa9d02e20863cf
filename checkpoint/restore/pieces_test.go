package restore

import (
	"bytes"
	"debug/elf"
	"errors"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

func TestSeedIsAnExecutable(t *testing.T) {
	b := seedELF()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if f.Entry != seedPauseAt {
		t.Errorf("entry %#x, want %#x", f.Entry, seedPauseAt)
	}
	load := f.Progs[0]
	if got := (page.Range{Start: page.Addr(load.Vaddr), End: page.Addr(load.Vaddr + load.Memsz)}); got.End != seedArea.End || got.Start != seedText.Start {
		t.Errorf("segment %v does not end with the stub area %v", got, seedArea)
	}
	if uint64(len(b)) > page.Size {
		t.Errorf("%d bytes do not fit the page before the stub area", len(b))
	}
	for at, code := range map[uint64][]byte{seedPauseAt: seedPause, seedReapAt: seedReap} {
		if off := at - uint64(seedBase); !bytes.HasPrefix(b[off:], code) {
			t.Errorf("no code at %#x", at)
		}
	}
}

func TestHole(t *testing.T) {
	r := func(a, b page.Addr) page.Range { return page.Range{Start: a, End: b} }
	for name, taken := range map[string][]page.Range{
		"nothing":       nil,
		"seed":          {r(seedBase, seedArea.End)},
		"all above":     {r(seedBase, userEnd)},
		"all but a gap": {r(0, 0x1000_0000_0000), r(0x1000_8000_0000, userEnd)},
		"unsorted":      {r(0x7000_0000_0000, userEnd), r(seedBase, 0x4000_0000_0000)},
	} {
		got, ok := hole(1<<20, taken)
		if !ok || got.Bytes() != 1<<20 || !got.Aligned() {
			t.Errorf("%s: %v, %v", name, got, ok)
		}
		wide := page.Range{Start: got.Start - apart, End: got.End + apart}
		if overlapsAny(wide, taken) {
			t.Errorf("%s: %v is too near", name, got)
		}
	}
	if got, ok := hole(1<<20, []page.Range{r(0, userEnd)}); ok {
		t.Errorf("found %v in a full space", got)
	}
}

func TestClocks(t *testing.T) {
	for _, c := range []clocks{{}, {time.Second, -time.Second}, {-1500 * time.Millisecond, 1<<50 + 1}, {-1, 1}} {
		got, err := parseOffsets(c.String())
		if err != nil || got != c {
			t.Errorf("%v written as %q is read as %v, %v", c, c.String(), got, err)
		}
	}
	if _, err := parseOffsets("monotonic x y\n"); err == nil {
		t.Error("nonsense is taken")
	}
	from := clocks{time.Hour, 2 * time.Hour}
	for d, want := range map[time.Duration]bool{0: true, time.Millisecond: true, -1: false, maxJump + 1: false} {
		if got := from.add(clocks{d, d}).continues(from); got != want {
			t.Errorf("%v ahead: continues %v", d, got)
		}
		if got := from.add(clocks{0, d}).continues(from); got != want {
			t.Errorf("boottime %v ahead: continues %v", d, got)
		}
	}
}

func TestPlanRegions(t *testing.T) {
	r := func(a, b page.Addr) page.Range { return page.Range{Start: a << 12, End: b << 12} }
	p := &image.Process{VMAs: []image.VMA{
		{Range: r(1, 3), Kind: image.VMAAnon}, {Range: r(3, 5), Kind: image.VMAFile},
		{Range: r(5, 7), Kind: image.VMAAnon}, {Range: r(7, 9), Kind: image.VMAShared, Shared: true},
	}}
	got, err := planRegions(p, &image.Memory{Lazy: page.NewSet(r(1, 2), r(8, 9)), Eager: page.NewSet(r(2, 3), r(4, 5))}, nil)
	want := []Region{{Range: r(1, 3), Kind: RegionUFFD}, {Range: r(3, 5), Kind: RegionWrite}, {Range: r(7, 9), Kind: RegionUFFD, Shared: true}}
	if err != nil || len(got) != len(want) {
		t.Fatalf("%v, %v", got, err)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("region %d is %v, want %v", i, got[i], want[i])
		}
	}
	for name, m := range map[string]image.Memory{
		"lazy in a file": {Lazy: page.NewSet(r(3, 4))},
		"outside":        {Lazy: page.NewSet(r(20, 21))},
	} {
		if rs, err := planRegions(p, &m, nil); err == nil {
			t.Errorf("%s: %v", name, rs)
		}
	}
}

func TestVDSO(t *testing.T) {
	testutil.Require(t, testutil.AMD64)
	v, err := ownVDSO()
	if err != nil {
		t.Fatal(err)
	}
	code, ok := v.code()
	if !ok {
		t.Fatal("this kernel has no vdso")
	}
	if len(v.elf) == 0 || uint64(len(v.elf)) > code.Bytes() {
		t.Fatalf("%d bytes of a vdso in a mapping of %d", len(v.elf), code.Bytes())
	}
	syms, err := vdsoSymbols(v.elf)
	if err != nil {
		t.Fatal(err)
	}
	for name := range bridged {
		if s, ok := syms[name]; ok && s.Size < uint64(len(appendJump(nil, 0))) {
			t.Errorf("%s has %d bytes, too few for a jump", name, s.Size)
		}
	}
	// What is in the slack behind the sections does not make it another one.
	dirty := append(bytes.Clone(v.elf), bytes.Repeat([]byte{0}, 100)...)
	dirty[len(v.elf)+50] = 1
	other := &vdso{parts: v.parts, elf: trimELF(dirty)}
	if !v.same(other) {
		t.Error("slack makes a difference")
	}
	dirty[100]++
	if v.same(&vdso{parts: v.parts, elf: trimELF(dirty)}) {
		t.Error("other code makes none")
	}
	for _, b := range [][]byte{nil, {1}, make([]byte, 64), bytes.Repeat([]byte{0xff}, 100)} {
		if len(trimELF(b)) != len(b) {
			t.Errorf("%d bytes of nonsense are trimmed", len(b))
		}
	}
}

// A kernel that gives none (vdso=0), and a process that has one.
func TestNoVDSO(t *testing.T) {
	p := &image.Process{VMAs: []image.VMA{{Range: page.Range{Start: 1 << 30, End: 1<<30 + 8192}, Kind: image.VMAVDSO}}}
	if _, err := placeVDSO(nil, &vdso{}, p, nil, false); !errors.Is(err, ErrUnsupported) {
		t.Errorf("placeVDSO: %v", err)
	}
}

func TestConfig(t *testing.T) {
	for _, c := range []Config{
		{}, {ID: "a/b"}, {ID: ".."}, {ID: "x", PIDNamespace: "maybe"}, {ID: "x", PID: -1},
		{ID: "x", CgroupParent: "relative"}, {ID: "x", CgroupParent: "/a/../.."},
	} {
		if err := c.Validate(); err == nil {
			t.Errorf("%+v is taken", c)
		}
	}
	if err := (&Config{ID: "x"}).Validate(); err != nil {
		t.Error(err)
	}
}
