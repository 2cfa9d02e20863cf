package codec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pageferry/pageferry/page"
)

// kinds are pages of the kinds that memory is made of.
var kinds = []struct {
	name string
	fill func(r *rand.Rand, p []byte)
}{
	{"sparse", func(r *rand.Rand, p []byte) { // a few words of 8 bytes, zeros else
		for range len(p) / 256 {
			binary.LittleEndian.PutUint64(p[r.IntN(len(p)/8)*8:], r.Uint64())
		}
	}},
	{"text", func(r *rand.Rand, p []byte) {
		words := []string{"user", "session", "=", "/index.html", " ", "\r\n", "Content-Type", ": ", "timestamp", "error", "the", "of", "\"name\":"}
		for n := 0; n < len(p); {
			w := words[r.IntN(len(words))]
			if r.IntN(4) == 0 {
				w = fmt.Sprint(r.IntN(100000), ";")
			}
			n += copy(p[n:], w)
		}
	}},
	{"heap", func(r *rand.Rand, p []byte) { // objects of 48 bytes: header, pointers, counts, a short string
		for n := 0; n+48 <= len(p); n += 48 {
			o := p[n : n+48]
			binary.LittleEndian.PutUint64(o, 0x31)
			binary.LittleEndian.PutUint64(o[8:], 0x7f3a10000000+uint64(r.IntN(1<<26))*16)
			binary.LittleEndian.PutUint64(o[16:], 0x7f3a10000000+uint64(r.IntN(1<<26))*16)
			binary.LittleEndian.PutUint32(o[24:], uint32(r.IntN(100)))
			copy(o[32:], fmt.Sprintf("key:%011d", r.IntN(1000000)))
		}
	}},
	{"random", func(r *rand.Rand, p []byte) {
		for i := 0; i+8 <= len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], r.Uint64())
		}
	}},
}

func pagesOf(r *rand.Rand, kind, n int) []byte {
	p := make([]byte, n*page.Size)
	for i := range n {
		kinds[kind].fill(r, p[i*page.Size:(i+1)*page.Size])
	}
	return p
}

func TestLZ4RoundTrip(t *testing.T) {
	r := newRand(t)
	var z LZ4
	for kind, k := range kinds {
		for _, pages := range []int{1, 2, 16, 64} {
			src := pagesOf(r, kind, pages)
			dst := make([]byte, len(src))
			n := z.Compress(dst, src)
			if (n == 0) != (k.name == "random") || n > len(src)-len(src)/16 {
				t.Fatalf("%s: %d pages became %d bytes", k.name, pages, n)
			}
			if n == 0 {
				continue
			}
			got := make([]byte, len(src))
			if err := Decompress(got, dst[:n]); err != nil || !bytes.Equal(got, src) {
				t.Fatalf("%s: not the pages that they were: %v", k.name, err)
			}
			// Neither more nor less than the block holds.
			for _, d := range []int{-page.Size, -1, 1, page.Size} {
				if err := Decompress(make([]byte, len(src)+d), dst[:n]); !errors.Is(err, ErrDamaged) {
					t.Fatalf("%s: %d pages into %+d bytes: %v", k.name, pages, d, err)
				}
			}
			if err := Decompress(got, dst[:n-1]); !errors.Is(err, ErrDamaged) {
				t.Fatalf("%s: a block without its last byte: %v", k.name, err)
			}
		}
	}
	if err := Decompress(make([]byte, page.Size), nil); !errors.Is(err, ErrDamaged) {
		t.Fatalf("no block at all: %v", err)
	}
}

// What saves next to nothing goes as it is.
func TestLZ4DoesNotPay(t *testing.T) {
	r := newRand(t)
	var z LZ4
	for _, c := range []struct {
		pages, same int // bytes at the end that repeat
		pays        bool
	}{
		{1, page.Size / 16, false}, {1, page.Size / 4, true},
		{16, page.Size / 2, false}, {16, 2 * page.Size, true},
	} {
		src := randomBytes(r, c.pages*page.Size)
		copy(src[len(src)-c.same:], bytes.Repeat([]byte{9}, c.same))
		if n := z.Compress(make([]byte, len(src)), src); (n != 0) != c.pays {
			t.Errorf("%d pages with %d bytes alike became %d", c.pages, c.same, n)
		}
	}
}

// Blocks that were right once, with some bytes changed, cut or repeated: most get
// far into the decoder. The fuzzer does not see into its assembly.
func TestDecompressDamaged(t *testing.T) {
	r := newRand(t)
	var z LZ4
	const guard = 256
	for range 3000 {
		n := (1 + r.IntN(4)) * page.Size
		src := pagesOf(r, r.IntN(3), n/page.Size)
		block := make([]byte, n)
		block = block[:z.Compress(block, src)]
		for range 1 + r.IntN(4) {
			switch at := r.IntN(len(block)); r.IntN(5) {
			case 0:
				block[at] = byte(r.Uint32())
			case 1:
				block[at] = 0xff // long lengths, far offsets
			case 2:
				block[at] = 0
			case 3:
				block = block[:1+at]
			case 4:
				block = append(block, bytes.Clone(block[at:min(len(block), at+r.IntN(40))])...)
			}
		}
		mem := bytes.Repeat([]byte{0xa5}, guard+n+guard)
		if err := Decompress(mem[guard:guard+n], block); err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
		for i, b := range mem {
			if b != 0xa5 && (i < guard || i >= guard+n) {
				t.Fatalf("written %d bytes from the pages: %x", i-guard, block)
			}
		}
	}
}

func FuzzDecompress(f *testing.F) {
	var z LZ4
	r := rand.New(rand.NewPCG(1, 1))
	for kind := range kinds {
		src := pagesOf(r, kind, 1)
		dst := make([]byte, len(src))
		f.Add(dst[:z.Compress(dst, src)], 1)
		src = pagesOf(r, kind, 3)
		dst = make([]byte, len(src))
		f.Add(dst[:z.Compress(dst, src)], 3)
	}
	f.Add([]byte{0x1f, 7, 1, 0, 255, 255, 255, 255}, 1)
	f.Fuzz(func(t *testing.T, block []byte, pages int) {
		const guard = 4096
		n := (pages&63 + 1) * page.Size
		mem := make([]byte, guard+n+guard)
		in := bytes.Clone(block)
		err := Decompress(mem[guard:guard+n], in)
		if !IsZero(mem[:guard]) || !IsZero(mem[guard+n:]) {
			t.Fatal("written beside the pages")
		}
		if !bytes.Equal(in, block) {
			t.Fatal("the block was written to")
		}
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatal(err)
		}
	})
}

func FuzzLZ4(f *testing.F) {
	var z LZ4
	f.Add([]byte("text text text text"), 3)
	f.Add([]byte{0}, 1)
	f.Fuzz(func(t *testing.T, b []byte, pages int) {
		src := make([]byte, (pages&7+1)*page.Size)
		for n := 0; len(b) > 0 && n < len(src); {
			n += copy(src[n:], b)
		}
		dst := make([]byte, len(src))
		n := z.Compress(dst, src)
		if n == 0 {
			return
		}
		got := make([]byte, len(src))
		if err := Decompress(got, dst[:n]); err != nil || !bytes.Equal(got, src) {
			t.Fatalf("not the pages that they were: %v", err)
		}
	})
}

func BenchmarkLZ4(b *testing.B) {
	const total = 1024 // pages: beyond the second cache
	for kind, k := range kinds {
		data := pagesOf(rand.New(rand.NewPCG(1, 1)), kind, total)
		for _, group := range []int{1, 4, 16, 32, 64} {
			size := group * page.Size
			dst := make([]byte, size)
			var z LZ4
			name := fmt.Sprintf("%s/%d", k.name, group)
			b.Run("Compress/"+name, func(b *testing.B) {
				b.SetBytes(int64(size))
				at, in, out := 0, 0, 0
				for b.Loop() {
					n := z.Compress(dst, data[at:at+size])
					if n == 0 {
						n = size
					}
					in, out = in+size, out+n
					at = (at + size) % len(data)
				}
				b.ReportMetric(float64(in)/float64(out), "ratio")
			})
			n := z.Compress(dst, data[:size])
			if n == 0 {
				continue
			}
			b.Run("Decompress/"+name, func(b *testing.B) {
				got := make([]byte, size)
				b.SetBytes(int64(size))
				for b.Loop() {
					if Decompress(got, dst[:n]) != nil {
						b.Fatal("damaged")
					}
				}
			})
		}
	}
}
