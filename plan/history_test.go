package plan

import (
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
)

func pages(from, n page.Num) page.Range {
	return page.Range{Start: from.Addr(), End: (from + n).Addr()}
}

// always is a round whose length does not depend on what it sends.
func always(d time.Duration) func(uint64) time.Duration {
	return func(uint64) time.Duration { return d }
}

func random(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 3))
}

// some returns random ranges of a space of 6 blocks that begins inside a block.
func some(r *rand.Rand, ranges, long int) page.Set {
	const first, n = 100_300, 6 * blockPages
	var s page.Set
	for range ranges {
		at := r.IntN(n)
		s.Add(pages(first+page.Num(at), page.Num(min(n-at, 1+r.IntN(long)))))
	}
	return s
}

// The model of a History is a byte for each page in a map, shifted one by one.
func TestHistoryAgainstModel(t *testing.T) {
	r := random(t)
	for range 60 {
		var h History
		model := map[page.Addr]uint8{}
		for range 1 + r.IntN(14) {
			l := Look{Written: some(r, r.IntN(20), 40), Content: some(r, 12, 2000), Elapsed: time.Duration(1+r.IntN(1000)) * time.Millisecond}
			h.Note(l)
			for a := range model {
				model[a] >>= 1
			}
			for _, w := range l.Written.Ranges() {
				for a := w.Start; a < w.End; a += page.Size {
					model[a] |= 0x80
				}
			}
			for a, age := range model {
				if age == 0 || !l.Content.Contains(a) {
					delete(model, a)
				}
			}
		}
		ask := some(r, 10, 900)
		got := map[page.Addr]uint8{}
		var covered page.Set
		h.runs(ask, func(r page.Range, age uint8) {
			if r.Empty() || !r.Aligned() || len(covered.Intersect(r)) > 0 {
				t.Fatalf("run %v is empty, unaligned or comes twice", r)
			}
			covered.Add(r)
			for a := r.Start; a < r.End; a += page.Size {
				got[a] = age
			}
		})
		if !slices.Equal(covered.Ranges(), ask.Ranges()) {
			t.Fatalf("runs cover %v, not %v", covered, ask)
		}
		for a, age := range got {
			if model[a] != age {
				t.Fatalf("age of %v is %08b, want %08b", a, age, model[a])
			}
		}
		checkOrder(t, &h, ask, model)
		checkHoldBack(t, &h, ask, model, r)
		checkCurve(t, &h, model)
		for _, b := range h.blocks {
			if b.empty() {
				t.Fatalf("block %d is kept for nothing", b.index)
			}
		}
	}
}

// The classes are a partition, and ordered: by the last write, then by their number.
func checkOrder(t *testing.T, h *History, ask page.Set, model map[page.Addr]uint8) {
	t.Helper()
	var all page.Set
	last, often := 0, 0
	for i, class := range h.Order(ask) {
		if class.Empty() {
			t.Fatalf("class %d is empty", i)
		}
		if twice := page.Intersection(&all, &class); !twice.Empty() {
			t.Fatalf("%v is in two classes", twice)
		}
		all = page.Union(&all, &class)
		first := model[class.Ranges()[0].Start]
		l, o := bits.Len8(first), bits.OnesCount8(first)
		if l < last || l == last && o < often {
			t.Fatalf("class %d: written as %08b, after %d, %d times", i, first, last, often)
		}
		last, often = l, o
		for _, r := range class.Ranges() {
			for a := r.Start; a < r.End; a += page.Size {
				if age := model[a]; bits.Len8(age) != l || bits.OnesCount8(age) != o {
					t.Fatalf("%08b and %08b are in one class", first, age)
				}
			}
		}
	}
	if !slices.Equal(all.Ranges(), ask.Ranges()) {
		t.Fatalf("the classes hold %v, not %v", all, ask)
	}
}

func checkHoldBack(t *testing.T, h *History, ask page.Set, model map[page.Addr]uint8, r *rand.Rand) {
	t.Helper()
	next := always(time.Duration(r.IntN(2000)) * time.Millisecond)
	everything := h.HoldBack(ask, next, 1<<60)
	if out := page.Difference(&everything, &ask); !out.Empty() {
		t.Fatalf("%v is held back and was not asked for", out)
	}
	for _, r := range everything.Ranges() {
		for a := r.Start; a < r.End; a += page.Size {
			if age := model[a]; age&0x80 == 0 || bits.OnesCount8(age) < 2 {
				t.Fatalf("a page written as %08b is held back", age)
			}
		}
	}
	most := uint64(r.IntN(1 << 21))
	part := h.HoldBack(ask, next, most)
	if part.Bytes() > most || part.Bytes() < min(everything.Bytes(), most&^(page.Size-1)) {
		t.Fatalf("%d bytes are held back, %d might be, of %d", part.Bytes(), most, everything.Bytes())
	}
	if out := page.Difference(&part, &everything); !out.Empty() {
		t.Fatalf("%v is held back only where less may be", out)
	}
	rest := page.Difference(&everything, &part)
	coldest, hottest := 1e9, 0.0
	h.runs(part, func(_ page.Range, age uint8) { coldest = min(coldest, h.rate(age)) })
	h.runs(rest, func(_ page.Range, age uint8) { hottest = max(hottest, h.rate(age)) })
	if !part.Empty() && hottest > coldest {
		t.Fatalf("a page of %.2f writes/s is held back and one of %.2f is not", coldest, hottest)
	}
}

// The last point that Curve adds is the newest look, and is believed.
func checkCurve(t *testing.T, h *History, model map[page.Addr]uint8) {
	t.Helper()
	var newest uint64
	for _, age := range model {
		newest += uint64(age>>7) * page.Size
	}
	c := h.Curve()
	// Where no look has seen a write there is one point, over all of them.
	var all time.Duration
	for _, d := range h.elapsed[:h.looks] {
		all += d
	}
	for _, p := range c.Points() {
		if p.Bytes == newest && (p.Interval == h.elapsed[0] || len(model) == 0 && p.Interval == all) {
			return
		}
	}
	t.Fatalf("the last look, %v and %d bytes, is not in %v", h.elapsed[0], newest, c)
}

func TestOrderByHand(t *testing.T) {
	const m = page.Num(256) // pages of a MiB
	var h History
	all := page.NewSet(pages(0, 2048*m))
	look := func(r ...page.Range) {
		h.Note(Look{Written: page.NewSet(r...), Content: all, Elapsed: time.Second})
	}
	old, once, twice := pages(1024*m, 1), pages(1024*m+1, 1), pages(1024*m+2, 1)
	look(old, twice)
	look(once, twice)
	order := h.Order(all)
	n := len(order)
	for i, want := range []page.Range{old, once, twice} {
		if got := order[n-3+i].Ranges(); len(got) != 1 || got[0] != want {
			t.Errorf("class %d is %v, want %v", n-3+i, got, want)
		}
	}
	// What nobody wrote: the further from what was, the earlier.
	far := []page.Num{1024, 300, 30, 3}
	if n != 3+len(far) {
		t.Fatalf("%d classes: %v", n, order)
	}
	for i, d := range far {
		for _, at := range []page.Num{(1024 - min(d, 1000)) * m, (1024 + min(d, 1000)) * m} {
			if !order[i].Contains(at.Addr()) {
				t.Errorf("class %d is %v and lacks the page at %d MiB", i, order[i], at/m)
			}
		}
	}
	held := h.HoldBack(all, always(10*time.Second), 1<<40)
	if got := held.Ranges(); len(got) != 1 || got[0] != twice {
		t.Errorf("held back is %v, want %v", got, twice)
	}
	// 2 writes in 1 s of watched time: in 100 ms it is more likely not written.
	if held := h.HoldBack(all, always(100*time.Millisecond), 1<<40); !held.Empty() {
		t.Errorf("%v is held back from a short round", held)
	}
	// A habit that has ended.
	look()
	if held := h.HoldBack(all, always(10*time.Second), 1<<40); !held.Empty() {
		t.Errorf("%v is held back though the last look did not find it", held)
	}
}

// A hot set is held back when it is written again faster than it can be sent.
func TestHoldBackDependsOnTheSize(t *testing.T) {
	var h History
	all := page.NewSet(pages(0, 1<<18))
	hot := page.NewSet(pages(1000, 1<<16)) // 256 MiB
	for range 3 {
		h.Note(Look{Written: hot, Content: all, Elapsed: time.Second})
	}
	for _, c := range []struct {
		rate float64 // of the link
		want uint64
	}{{2 << 30, 0}, {1 << 29, 256 << 20}} {
		held := h.HoldBack(all, func(bytes uint64) time.Duration { return seconds(float64(bytes), c.rate) }, 1<<40)
		if held.Bytes() != c.want {
			t.Errorf("of 256 MiB written each second, %s are held back from a link of %s, want %s", size(held.Bytes()), speed(c.rate), size(c.want))
		}
	}
}

// A page's address given up and mapped again is another page.
func TestForget(t *testing.T) {
	var h History
	all, part := page.NewSet(pages(0, 1000)), page.NewSet(pages(0, 10), pages(20, 980))
	h.Note(Look{Written: all, Content: all, Elapsed: time.Second})
	h.Note(Look{Written: page.Set{}, Content: part, Elapsed: time.Second})
	h.Note(Look{Written: all, Content: all, Elapsed: time.Second})
	h.runs(all, func(r page.Range, age uint8) {
		want := uint8(0b10100000)
		if r == pages(10, 10) {
			want = 0b10000000
		}
		if age != want {
			t.Errorf("%v is %08b, want %08b", r, age, want)
		}
	})
}

// 8 GiB, of which 100 000 single pages are written between two looks.
func benchmarkNote(b *testing.B, note bool) {
	const n = 2 << 20
	r := rand.New(rand.NewPCG(1, 2))
	content := page.NewSet(pages(1000, n))
	var looks [4]Look
	for i := range looks {
		var w page.Set
		for p := range page.Num(100_000) {
			w.Add(pages(1000+p*20+page.Num(r.IntN(18)), 1))
		}
		looks[i] = Look{Written: w, Content: content, Elapsed: time.Second}
	}
	var h History
	for _, l := range looks {
		h.Note(l)
	}
	b.ReportMetric(float64(len(h.blocks)*blockPages), "bytes")
	i := 0
	for b.Loop() {
		if i++; note {
			h.Note(looks[i%4])
		} else {
			h.Order(content)
		}
	}
}

func BenchmarkNote(b *testing.B)  { benchmarkNote(b, true) }
func BenchmarkOrder(b *testing.B) { benchmarkNote(b, false) }
func BenchmarkHoldBack(b *testing.B) {
	var h History
	r := rand.New(rand.NewPCG(1, 2))
	content := page.NewSet(pages(1000, 2<<20))
	var w page.Set
	for range 4 {
		w = page.Set{}
		for p := range page.Num(100_000) {
			w.Add(pages(1000+p*20+page.Num(r.IntN(3)), 1))
		}
		h.Note(Look{Written: w, Content: content, Elapsed: time.Second})
	}
	for b.Loop() {
		h.HoldBack(w, always(time.Second), 1<<40)
	}
}
