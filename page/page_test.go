package page

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// The model of a Set is a plain array of booleans.
func TestSetAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		const n = 128
		var model [n]bool
		var s Set
		for range 60 {
			a, b := Addr(r.IntN(n)), Addr(r.IntN(n))
			rg := Range{min(a, b), max(a, b)}
			add := r.IntN(2) == 0
			var cut uint64
			if add {
				s.Add(rg)
			} else {
				for _, c := range s.Remove(rg) {
					cut += c.Bytes()
				}
			}
			for i := rg.Start; i < rg.End; i++ {
				if !add && model[i] {
					cut--
				}
				model[i] = add
			}
			if cut != 0 {
				t.Fatalf("Remove(%v) returned %d bytes too many", rg, int64(cut))
			}
			var count uint64
			for i, want := range model {
				if want {
					count++
				}
				if s.Contains(Addr(i)) != want {
					t.Fatalf("Contains(%d) = %v", i, !want)
				}
			}
			if s.Bytes() != count {
				t.Fatalf("Bytes() = %d, want %d", s.Bytes(), count)
			}
			rs := s.Ranges()
			for i := range rs {
				if rs[i].Empty() || i > 0 && rs[i-1].End >= rs[i].Start {
					t.Fatalf("ranges not canonical: %v", rs)
				}
			}
			var gaps, in uint64
			for _, g := range s.Gaps(rg) {
				gaps += g.Bytes()
			}
			for _, g := range s.Intersect(rg) {
				in += g.Bytes()
			}
			if gaps+in != rg.Bytes() {
				t.Fatalf("gaps %d + inside %d != %d", gaps, in, rg.Bytes())
			}
		}
	}
}

// Union, Difference and Intersection of two sets, against arrays of booleans.
func TestSetAlgebra(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	const n = 96
	random := func() (s Set, in [n]bool) {
		for range r.IntN(12) {
			a := r.IntN(n)
			b := min(n, a+1+r.IntN(16))
			s.Add(Range{Addr(a), Addr(b)})
			for i := a; i < b; i++ {
				in[i] = true
			}
		}
		return s, in
	}
	for range 3000 {
		a, ina := random()
		b, inb := random()
		wasA, wasB := a.Clone(), b.Clone()
		for _, c := range []struct {
			name string
			got  Set
			want func(x, y bool) bool
		}{
			{"union", Union(&a, &b), func(x, y bool) bool { return x || y }},
			{"difference", Difference(&a, &b), func(x, y bool) bool { return x && !y }},
			{"intersection", Intersection(&a, &b), func(x, y bool) bool { return x && y }},
		} {
			for i := range n {
				if want := c.want(ina[i], inb[i]); c.got.Contains(Addr(i)) != want {
					t.Fatalf("%s of %v and %v is %v: %d in it: %v", c.name, a, b, c.got, i, !want)
				}
			}
			rs := c.got.Ranges()
			for i := range rs {
				if rs[i].Empty() || i > 0 && rs[i-1].End >= rs[i].Start {
					t.Fatalf("%s of %v and %v: ranges not canonical: %v", c.name, a, b, rs)
				}
			}
		}
		if !slices.Equal(a.Ranges(), wasA.Ranges()) || !slices.Equal(b.Ranges(), wasB.Ranges()) {
			t.Fatalf("%v and %v were changed to %v and %v", wasA, wasB, a, b)
		}
	}
}

func BenchmarkDifference(b *testing.B) {
	var all, some Set
	for i := range Addr(200_000) {
		all.Add(Range{i * 4 * Size, (i*4 + 3) * Size})
		if i%2 == 0 {
			some.Add(Range{(i*4 + 1) * Size, (i*4 + 2) * Size})
		}
	}
	for b.Loop() {
		Difference(&all, &some)
		Intersection(&all, &some)
	}
}

func TestBitmapRanges(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for range 300 {
		n := 1 + r.IntN(300)
		b := NewBitmap(n)
		model := make([]bool, n)
		for range 30 {
			i := r.IntN(n)
			j := i + r.IntN(n-i+1)
			set := r.IntN(2) == 0
			want := 0
			for k := i; k < j; k++ {
				if model[k] != set {
					want++
				}
				model[k] = set
			}
			got := 0
			if set {
				got = b.AtomicSetRange(i, j)
			} else {
				got = b.AtomicClearRange(i, j)
			}
			if got != want {
				t.Fatalf("range %d-%d set=%v changed %d bits, want %d", i, j, set, got, want)
			}
			count := 0
			for k, v := range model {
				if v {
					count++
				}
				if b.AtomicGet(k) != v {
					t.Fatalf("bit %d = %v", k, !v)
				}
			}
			if b.Count() != count {
				t.Fatalf("Count = %d, want %d", b.Count(), count)
			}
			k := r.IntN(n)
			ns, nc := k, k
			for ns < n && !model[ns] {
				ns++
			}
			for nc < n && model[nc] {
				nc++
			}
			if b.NextSet(k, n) != ns || b.NextClear(k, n) != nc {
				t.Fatalf("NextSet/NextClear(%d) = %d/%d, want %d/%d", k, b.NextSet(k, n), b.NextClear(k, n), ns, nc)
			}
		}
	}
}

// TestUnion compares with adding one after the other, and counts inside ranges.
func TestUnion(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	some := func() Range {
		a := Addr(rnd.IntN(200))
		return Range{a, a + Addr(rnd.IntN(10))}
	}
	for range 500 {
		var rs []Range
		var parts [2]Set
		for range rnd.IntN(20) {
			r := some()
			rs = append(rs, r)
			parts[rnd.IntN(2)].Add(r)
		}
		want := NewSet(rs...)
		got := Union(&parts[0], &parts[1])
		if !slices.Equal(got.Ranges(), want.Ranges()) {
			t.Fatalf("%v and %v make %v, want %v", parts[0], parts[1], got, want)
		}
		r := some()
		var n uint64
		for _, p := range got.Intersect(r) {
			n += p.Bytes()
		}
		if got.BytesIn(r) != n || got.Covers(r) != (len(got.Gaps(r)) == 0) {
			t.Fatalf("%v in %v: %d bytes, want %d; covers: %v", r, got, got.BytesIn(r), n, got.Covers(r))
		}
	}
}
