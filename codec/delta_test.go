package codec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pageferry/pageferry/page"
)

func newRand(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 3))
}

func randomPage(r *rand.Rand) []byte { return randomBytes(r, page.Size) }

func randomBytes(r *rand.Rand, n int) []byte {
	p := make([]byte, 0, n)
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, r.Uint64())
	}
	return p[:n]
}

func TestDeltaRoundTrip(t *testing.T) {
	r := newRand(t)
	for range 3000 {
		old := randomPage(r)
		next := bytes.Clone(old)
		changed := 0
		for range r.IntN(20) {
			n := 1 + r.IntN(1<<r.IntN(9))
			at := r.IntN(page.Size)
			if r.IntN(4) == 0 {
				at = r.IntN(2) * (page.Size - n) // the very ends
			}
			changed += copy(next[at:], randomBytes(r, n))
		}
		limit := r.IntN(page.Size)
		room := append(make([]byte, 0, len("before")+limit), "before"...)
		delta, ok := AppendDelta(room, old, next, limit)
		if &delta[0] != &room[0] {
			t.Fatalf("grew beyond the limit of %d", limit)
		}
		if !bytes.HasPrefix(delta, []byte("before")) {
			t.Fatal("what was in dst is gone")
		}
		delta = delta[len("before"):]
		if !ok {
			if len(delta) != 0 || 6*20+8*changed < limit {
				t.Fatalf("%d bytes left, %d bytes changed, limit %d", len(delta), changed, limit)
			}
			continue
		}
		if len(delta) > limit || bytes.Equal(old, next) != (len(delta) == 0) {
			t.Fatalf("a delta of %d bytes with a limit of %d", len(delta), limit)
		}
		if err := ApplyDelta(old, delta); err != nil || !bytes.Equal(old, next) {
			t.Fatalf("not the page that it was: %v", err)
		}
	}
}

// Every byte counts by itself, and a change of one takes four bytes at most.
func TestDeltaEveryByte(t *testing.T) {
	old := make([]byte, page.Size)
	next := make([]byte, page.Size)
	for i := range next {
		next[i] = 0x10
		delta, ok := AppendDelta(nil, old, next, 4)
		if !ok {
			t.Fatalf("byte %d: does not fit", i)
		}
		got := make([]byte, page.Size)
		if err := ApplyDelta(got, delta); err != nil || !bytes.Equal(got, next) {
			t.Fatalf("byte %d: %x, %v", i, delta, err)
		}
		next[i] = 0
	}
}

func TestDeltaLimit(t *testing.T) {
	old, next := make([]byte, page.Size), make([]byte, page.Size)
	copy(next[100:], bytes.Repeat([]byte{1}, 200))
	// skip 100 in one byte, copy 200 in two.
	if _, ok := AppendDelta(nil, old, next, 202); ok {
		t.Fatal("a delta longer than the limit")
	}
	if d, ok := AppendDelta(nil, old, next, 203); !ok || len(d) != 203 {
		t.Fatalf("%d bytes, %v", len(d), ok)
	}
	if d, ok := AppendDelta(nil, old, old, 0); !ok || len(d) != 0 {
		t.Fatal("pages that are equal need no byte")
	}
}

func TestDeltaHostile(t *testing.T) {
	for name, d := range map[string][]byte{
		"skip alone":      {5},
		"nothing copied":  {5, 0},
		"no skip":         {1, 1, 7, 0, 1, 7},
		"bytes missing":   {1, 2, 7},
		"beyond the page": {0x80, 0x20, 1, 7},
		"over the end":    {0xff, 0x1f, 2, 7, 7},
		"second beyond":   {0xfe, 0x1f, 1, 7, 1, 1, 7},
		"long form":       {0x81, 0x00, 1, 7},
		"long form 3":     {0x81, 0x80, 0x00, 1, 7},
		"four bytes":      {0x81, 0x80, 0x80, 0x01, 1, 7},
		"unfinished":      {0x80},
		"copy unfinished": {1, 0x80},
	} {
		if err := ApplyDelta(make([]byte, page.Size), d); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", name, err)
		}
	}
	p := make([]byte, page.Size)
	if err := ApplyDelta(p, []byte{0xff, 0x1f, 1, 7}); err != nil || p[page.Size-1] != 7 {
		t.Fatalf("the last byte: %v", err)
	}
}

func FuzzApplyDelta(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0, 1, 7})
	f.Add([]byte{5, 2, 7, 7, 0xf0, 0x1f, 1, 9})
	f.Add([]byte{0x81, 0x00, 1, 7})
	f.Fuzz(func(t *testing.T, delta []byte) {
		const guard = 64
		mem := make([]byte, guard+page.Size+guard)
		p := mem[guard : guard+page.Size]
		err := ApplyDelta(p, delta)
		if !IsZero(mem[:guard]) || !IsZero(mem[guard+page.Size:]) {
			t.Fatal("written beside the page")
		}
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Fatal(err)
			}
			return
		}
		// What it did can be said again, in no more bytes for each that changed.
		again, ok := AppendDelta(nil, make([]byte, page.Size), p, 3*page.Size)
		if !ok {
			t.Fatal("a page cannot be described")
		}
		got := make([]byte, page.Size)
		if err := ApplyDelta(got, again); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("%x: %v", again, err)
		}
	})
}

func FuzzDelta(f *testing.F) {
	f.Add([]byte("some bytes"), []byte("same bytes"), 100)
	f.Add(make([]byte, 600), append(make([]byte, 599), 1), 3)
	f.Fuzz(func(t *testing.T, a, b []byte, limit int) {
		old, next := make([]byte, page.Size), make([]byte, page.Size)
		copy(old, a)
		copy(next, b)
		limit = min(max(limit, 0), page.Size)
		delta, ok := AppendDelta(nil, old, next, limit)
		if !ok {
			return
		}
		if len(delta) > limit {
			t.Fatalf("%d bytes, limit %d", len(delta), limit)
		}
		if err := ApplyDelta(old, delta); err != nil || !bytes.Equal(old, next) {
			t.Fatalf("not the page that it was: %v", err)
		}
	})
}

func benchmarkDelta(b *testing.B, changes int) {
	r := newRand(b)
	const n = 4096 // beyond the caches
	old := randomBytes(r, n*page.Size)
	next := bytes.Clone(old)
	for i := range n {
		for range changes {
			next[i*page.Size+r.IntN(page.Size)]++
		}
	}
	buf := make([]byte, 0, page.Size)
	b.SetBytes(page.Size)
	i, used := 0, 0
	for b.Loop() {
		at := i * page.Size
		if _, ok := AppendDelta(buf, old[at:at+page.Size], next[at:at+page.Size], page.Size/2); ok {
			used++
		}
		i = (i + 1) % n
	}
	b.ReportMetric(float64(used)/float64(b.N), "used/page")
}

func BenchmarkDeltaEqual(b *testing.B)   { benchmarkDelta(b, 0) }
func BenchmarkDeltaOneWord(b *testing.B) { benchmarkDelta(b, 1) }
func BenchmarkDelta32Words(b *testing.B) { benchmarkDelta(b, 32) }
func BenchmarkDeltaTooMany(b *testing.B) { benchmarkDelta(b, 2000) }
func BenchmarkApplyDelta32(b *testing.B) {
	r := newRand(b)
	old := randomPage(r)
	next := bytes.Clone(old)
	for range 32 {
		next[r.IntN(page.Size)]++
	}
	delta, _ := AppendDelta(nil, old, next, page.Size)
	b.SetBytes(page.Size)
	for b.Loop() {
		if ApplyDelta(old, delta) != nil {
			b.Fatal("damaged")
		}
	}
}
