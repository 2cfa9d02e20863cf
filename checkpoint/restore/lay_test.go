package restore

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// lander writes pages into a skeleton as a pager does.
type lander struct {
	t   *testing.T
	s   *Skeleton
	ctx context.Context
}

func (l *lander) lay(vmas []image.VMA, mems ...image.SharedMemory) {
	l.t.Helper()
	b, err := image.EncodeLayout(&image.Layout{VMAs: vmas, Memories: mems})
	if err != nil {
		l.t.Fatal(err)
	}
	layout, err := image.DecodeLayout(b)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := l.s.Lay(l.ctx, layout); err != nil {
		l.t.Fatal(err)
	}
}

func (l *lander) write(r page.Range, data []byte) {
	l.t.Helper()
	n, err := sys.UffdCopy(int(l.s.Landing().Fd()), uint64(r.Start), data, 0)
	if back := l.s.Backed(); errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT) && back.Contains(r.Start) {
		local := []unix.Iovec{{Base: &data[0], Len: uint64(len(data))}}
		remote := []unix.RemoteIovec{{Base: uintptr(r.Start), Len: len(data)}}
		var m int
		m, err = unix.ProcessVMWritev(l.s.PID(), local, remote, 0)
		n = int64(m)
	}
	if err != nil || n != int64(len(data)) {
		l.t.Fatalf("write %v: %d, %v", r, n, err)
	}
	set := page.NewSet(r)
	if err := l.s.Holds(&set); err != nil {
		l.t.Fatal(err)
	}
	if err := l.s.Land(set); err != nil {
		l.t.Fatal(err)
	}
}

// huge makes huge pages of what it can, as the kernel does by itself where
// /sys/kernel/mm/transparent_hugepage/enabled says always: at the first write, or
// later (khugepaged). What had no page between the others is then a page of zeros.
func (l *lander) huge(vmas []image.VMA) {
	l.t.Helper()
	const size, madvCollapse = 2 << 20, 25 // <asm-generic/mman-common.h>, Linux 6.1
	sc := newScript(l.s.target.t)
	for i := range vmas {
		for at := (vmas[i].Start + size - 1) &^ (size - 1); at+size <= vmas[i].End; at += size {
			sc.call(unix.SYS_MADVISE, uint64(at), size, madvCollapse).Optional()
		}
	}
	if err := sc.run(l.s.target.pid); err != nil {
		l.t.Fatal(err)
	}
}

// TestLand lands most pages of real programs before the image comes, some of them
// right, some stale, some in mappings that go away again. The programs must not
// find a stale page, and those that were right must not be asked for.
func TestLand(t *testing.T) {
	require(t)
	programs := map[string]func(t *testing.T) (*testutil.Process, func()){
		"redis": func(t *testing.T) (*testutil.Process, func()) {
			r := testutil.RedisWith(t, testutil.RedisConfig{TCP: true})
			r.Populate(20000, 200)
			want := r.Digest()
			return r.Process, func() {
				if got := r.Digest(); got != want {
					t.Errorf("its data has digest %s, want %s", got, want)
				}
			}
		},
		"everything": func(t *testing.T) (*testutil.Process, func()) {
			p := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: testutil.NewRecorder(t)})
			return p.Process, func() { p.Beat(3); p.Check() }
		},
		"go": func(t *testing.T) (*testutil.Process, func()) {
			p := testutil.StartGo(t, testutil.ProgramConfig{Recorder: testutil.NewRecorder(t)})
			return p.Process, func() { p.Beat(3); p.Check() }
		},
	}
	for name, start := range programs {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rng := rand.New(rand.NewPCG(seed, 1))
			p, check := start(t)
			var kept, stale, lazy uint64
			trap := moveLaid(t, p, nil, func(s *Skeleton, sn *snapshot) {
				lazy = sn.mem[0].Lazy.Pages()
				kept, _, stale = landSome(&lander{t, s, timed(t)}, rng, sn)
			})
			if kept == 0 || stale == 0 {
				t.Fatalf("%d right and %d stale pages were landed", kept, stale)
			}
			asked := uint64(trap.st.Missing(true))
			check()
			trap.resident(t)
			check()
			if asked > lazy-kept {
				t.Errorf("%d pages were missing of %d, of which %d had landed", asked, lazy, kept)
			}
		})
	}
}

// layoutOfRunning is what a source would have said of sn while it ran: the mappings in
// which pages come, and the objects that they show.
func layoutOfRunning(sn *snapshot) (vmas []image.VMA, mems []image.SharedMemory) {
	p := &sn.img.Processes[0]
	index := map[int]int{}
	for i := range p.VMAs {
		v := p.VMAs[i]
		if !lies(&v) || v.Kind != image.VMAShared && sn.mem[0].Lazy.BytesIn(v.Range)+sn.mem[0].Eager.BytesIn(v.Range) == 0 {
			continue
		}
		if v.Kind == image.VMAShared {
			m := sn.img.Memories[v.Memory]
			if m.Size <= image.MaxInlineMemory {
				if !m.Memfd {
					continue
				}
				m.Size = 2 * image.MaxInlineMemory // it was that before
			}
			if _, ok := index[v.Memory]; !ok {
				m.Chunks = nil
				index[v.Memory] = len(mems)
				mems = append(mems, m)
			}
			v.Memory = index[v.Memory]
		}
		vmas = append(vmas, v)
	}
	return vmas, mems
}

// landSome lands pages of sn at random in three rounds. kept are right lazy pages,
// and eager right ones that are not.
func landSome(l *lander, rng *rand.Rand, sn *snapshot) (kept, eager, stale uint64) {
	vmas, mems := layoutOfRunning(sn)
	content := page.Union(&sn.mem[0].Lazy, &sn.mem[0].Eager)
	// A mapping that the process will not have, across the vdso that the seed came
	// with and the stub area, and another where one of its own will be.
	ms, err := proc.ReadMaps(l.s.PID())
	if err != nil {
		l.t.Fatal(err)
	}
	wrong := []image.VMA{
		{Range: page.Range{Start: vmas[0].Start, End: vmas[0].Start + page.Size}, Kind: image.VMAAnon, Flags: []string{"nr"}},
		{Range: page.Range{Start: seedArea.Start, End: seedArea.Start + 1<<20}, Kind: image.VMAAnon},
		{Range: vdsoAmong(ms).span(), Kind: image.VMAAnon},
	}
	slices.SortFunc(wrong, func(a, b image.VMA) int { return int(int64(a.Start) - int64(b.Start)) })
	l.lay(wrong)
	for _, v := range wrong {
		l.write(page.PageOf(v.Start), bytes.Repeat([]byte{0xee}, page.Size))
	}
	l.lay(vmas[:1+rng.IntN(len(vmas))], mems...)
	// The program has unmapped something since: what has landed there is not what the
	// image says of the same pages, or carries itself.
	last := slices.Clone(vmas)
	for i := range mems {
		at := page.Addr(0x200000000000 + i<<32)
		last = append(last, image.VMA{Range: page.Range{Start: at, End: at + 32*page.Size}, Kind: image.VMAShared, Shared: true, Memory: i})
	}
	slices.SortFunc(last, func(a, b image.VMA) int { return int(int64(a.Start) - int64(b.Start)) })
	l.lay(last, mems...)
	for i := range mems {
		for _, n := range []page.Addr{1, 10} {
			l.write(page.PageOf(page.Addr(0x200000000000+i<<32)+n*page.Size), bytes.Repeat([]byte{0xaa}, page.Size))
		}
	}
	gone := page.NewSet()
	for i, r := range sn.ranges {
		for at := r.Start; at < r.End; at += page.Size {
			one := page.PageOf(at)
			if !slices.ContainsFunc(vmas, func(v image.VMA) bool { return v.Contains(at) }) {
				continue
			}
			switch right := sn.content[i][at-r.Start:][:page.Size]; rng.IntN(5) {
			case 0: // never
			case 1: // stale
				l.write(one, bytes.Repeat([]byte{0xdd}, page.Size))
				sn.mem[0].Dirty.Add(one)
				stale++
			case 2: // given up early
				l.write(one, bytes.Repeat([]byte{0xcc}, page.Size))
				gone.Add(one)
			default:
				l.write(one, right)
				if sn.mem[0].Lazy.Contains(at) {
					kept++
				} else {
					eager++
				}
			}
		}
	}
	// And one of each mapping that has no content any more.
	for i := range vmas {
		if hole, ok := holeIn(vmas[i:i+1], &content); ok {
			l.write(hole, bytes.Repeat([]byte{0xbb}, page.Size))
			stale++
		}
	}
	if err := l.s.Drop(gone); err != nil {
		l.t.Fatal(err)
	}
	l.huge(vmas)
	return kept, eager, stale
}

// holeIn is a page of some mapping that is not in set.
func holeIn(vmas []image.VMA, set *page.Set) (page.Range, bool) {
	for i := range vmas {
		if gs := set.Gaps(vmas[i].Range); len(gs) > 0 {
			return page.PageOf(gs[0].Start), true
		}
	}
	return page.Range{}, false
}

// TestLandRefuses: what cannot be, and what comes too late.
func TestLandRefuses(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	cfg := config(t)
	ctx := timed(t)
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	vmas := []image.VMA{{Range: page.Range{Start: 0x10000, End: 0x20000}, Kind: image.VMAAnon}}
	if err := s.Lay(ctx, &image.Layout{VMAs: vmas}); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without a process: %v", err)
	}
	if err := s.Abort(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Lay(ctx, &image.Layout{VMAs: vmas}); !errors.Is(err, ErrState) {
		t.Errorf("after the abort: %v", err)
	}
	if err := s.Drop(page.NewSet(vmas[0].Range)); !errors.Is(err, ErrState) {
		t.Errorf("drop after the abort: %v", err)
	}
	all := page.NewSet(vmas[0].Range)
	if err := s.Holds(&all); err == nil {
		t.Error("pages outside of every mapping are held")
	}
}

// TestLayingLeavesNoOtherMappings: rounds in which nothing changes, the giving up
// of many pages, one by one, and the unmapping of as many ranges take none of the
// address space but the stub area. The kernel would put what injected calls need more
// where the process is going to have something itself.
func TestLayingLeavesNoOtherMappings(t *testing.T) {
	l := early(t)
	s, ctx := l.s, l.ctx
	const pages = 1 << 20
	whole := page.Range{Start: 0x200000000000, End: 0x200000000000 + pages*page.Size}
	vmas := []image.VMA{{Range: whole, Kind: image.VMAAnon, Flags: []string{"nr"}}}
	var some page.Set
	for at := whole.Start; at < whole.End; at += 2 * page.Size {
		some.Add(page.PageOf(at))
	}
	for range 2 {
		for range 3 {
			if err := s.Lay(ctx, &image.Layout{VMAs: vmas}); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Land(some); err != nil {
			t.Fatal(err)
		}
		if err := s.Drop(some); err != nil {
			t.Fatal(err)
		}
	}
	// More calls than the stub area has room for.
	ms, err := proc.ReadMaps(s.PID())
	if err != nil {
		t.Fatal(err)
	}
	keep := append(some.Ranges(), page.Range{Start: whole.Start + page.Size, End: whole.End}, s.area, vdsoAmong(ms).span())
	for at := whole.End + page.Size; len(keep) < areaBytes/80+some.Len(); at += 2 * page.Size {
		keep = append(keep, page.PageOf(at))
	}
	sc := newScript(s.target.t)
	sc.clear(s.target.pid, keep...)
	if err := sc.run(s.target.pid); err != nil {
		t.Fatal(err)
	}
	if ms, err = proc.ReadMaps(s.PID()); err != nil {
		t.Fatal(err)
	}
	for _, m := range ms {
		if m.Name == "" && !s.area.Covers(m.Range) && !whole.Covers(m.Range) {
			t.Errorf("a mapping that nobody asked for: %v", m.Range)
		}
	}
}
