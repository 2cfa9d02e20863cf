package codec

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pageferry/pageferry/page"
)

func TestIsZeroEveryByte(t *testing.T) {
	for _, n := range []int{0, 1, 7, 8, 15, 16, 17, 63, 64, 65, page.Size - 1, page.Size, page.Size + 1, 3*page.Size + 5} {
		p := make([]byte, n)
		if !IsZero(p) {
			t.Fatalf("%d zero bytes are not zero", n)
		}
		for i := range p {
			p[i] = 0x80
			if IsZero(p) {
				t.Fatalf("byte %d of %d is set and was not seen", i, n)
			}
			p[i] = 0
		}
	}
}

func TestRunAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	for range 100 {
		data := make([]byte, (1+r.IntN(40))*page.Size)
		var model []bool
		for i := 0; i < len(data); i += page.Size {
			z := r.IntN(3) > 0
			if !z {
				data[i+r.IntN(page.Size)] = 1
			}
			model = append(model, z)
		}
		for len(data) > 0 {
			zero, n := Run(data)
			if n == 0 || zero != model[0] || n < len(model) && model[n] == zero {
				t.Fatalf("Run = %v, %d of %v", zero, n, model)
			}
			for _, z := range model[:n] {
				if z != zero {
					t.Fatalf("Run = %v, %d of %v", zero, n, model)
				}
			}
			data, model = data[n*page.Size:], model[n:]
		}
	}
}

func TestSums(t *testing.T) {
	// RFC 3720, B.4: 32 bytes of zeros.
	if s := Sum(make([]byte, 32)); s != 0x8a9136aa {
		t.Fatalf("CRC32C of 32 zero bytes is %08x", s)
	}
	data := make([]byte, 8*page.Size)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	sums := AppendSums(nil, data)
	if len(sums) != 8 {
		t.Fatalf("%d sums", len(sums))
	}
	if err := Verify(data, sums); err != nil {
		t.Fatal(err)
	}
	data[5*page.Size+77] ^= 4
	var e *SumError
	if err := Verify(data, sums); !errors.As(err, &e) || e.Index != 5 {
		t.Fatalf("damage in page 5: %v", err)
	}
	if err := Verify(data, sums[:7]); err == nil {
		t.Fatal("a page without a checksum passed")
	}
}

func benchmark(b *testing.B, f func(p []byte) bool, last byte) {
	const n = 4096 // 16 MiB: beyond the caches, as the pages of a process are
	data := make([]byte, n*page.Size)
	for i := range n {
		data[i*page.Size] = 1 - last
		data[(i+1)*page.Size-9] = last
	}
	b.SetBytes(page.Size)
	i := 0
	for b.Loop() {
		f(data[i*page.Size : (i+1)*page.Size])
		i = (i + 1) % n
	}
}

func BenchmarkIsZeroContent(b *testing.B) { benchmark(b, IsZero, 0) }
func BenchmarkIsZeroLate(b *testing.B)    { benchmark(b, IsZero, 1) }
func BenchmarkSum(b *testing.B) {
	benchmark(b, func(p []byte) bool { return Sum(p) == 0 }, 1)
}
