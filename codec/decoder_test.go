package codec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/wire"
)

// mixed is a frame with runs of every kind against dst, whose pages 1000 to 1063
// are there.
func mixed(r *rand.Rand) (dst *memory, p wire.Pages, payload []byte) {
	dst = newMemory(1000, 256)
	copy(dst.bytes, randomBytes(r, 64*page.Size))
	for i := range 64 {
		dst.there[i] = true
	}
	add := func(kind wire.RunKind, first page.Num, content, enc []byte) {
		n := uint32(len(content) / page.Size)
		p.Runs = append(p.Runs, wire.Run{Kind: kind, First: first, Count: n})
		if kind.Encoded() {
			p.Lengths = append(p.Lengths, uint32(len(enc)))
		}
		if kind.Content() {
			p.Sums = AppendSums(p.Sums, content)
			payload = append(payload, enc...)
		}
	}
	raw := randomBytes(r, 2*page.Size)
	add(wire.RunData, 1070, raw, raw)
	add(wire.RunZero, 1080, make([]byte, page.Size), nil)
	text := pagesOf(r, 1, 4)
	var z LZ4
	block := make([]byte, len(text))
	add(wire.RunLZ4, 1090, text, block[:z.Compress(block, text)])
	next := bytes.Clone(dst.bytes[7*page.Size : 8*page.Size])
	next[9]++
	delta, _ := AppendDelta(nil, dst.bytes[7*page.Size:8*page.Size], next, 100)
	add(wire.RunDelta, 1007, next, delta)
	add(wire.RunSame, 1100, dst.bytes[10*page.Size:13*page.Size], binary.LittleEndian.AppendUint64(nil, 1010))
	add(wire.RunSame, 1110, text, binary.LittleEndian.AppendUint64(nil, 1090)) // of this very frame
	return dst, p, payload
}

func TestDecoder(t *testing.T) {
	dst, p, payload := mixed(newRand(t))
	d := NewDecoder(dst)
	for range 2 { // a decoder serves many frames
		if err := dst.take(d, frame{wire.AppendPages(nil, p), payload}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(dst.bytes[110*page.Size:114*page.Size], dst.bytes[90*page.Size:94*page.Size]) || IsZero(dst.bytes[90*page.Size:91*page.Size]) {
			t.Fatal("pages that equal others are not as these are")
		}
		// The delta stands on the page as it was.
		dst.bytes[7*page.Size+9]--
	}
}

// Every byte of the payload, and every checksum, is covered by a check.
func TestDecoderDamage(t *testing.T) {
	r := newRand(t)
	dst, p, payload := mixed(r)
	d := NewDecoder(dst)
	start := bytes.Clone(dst.bytes)
	good := func() []byte {
		if err := dst.take(d, frame{wire.AppendPages(nil, p), payload}); err != nil {
			t.Fatal(err)
		}
		got := bytes.Clone(dst.bytes)
		copy(dst.bytes, start)
		return got
	}()
	check := func(what string, i int, f frame) {
		err := dst.take(d, f)
		var sum *SumError
		switch {
		case err == nil:
			// There are blocks and deltas in another form that say the same, and
			// other pages that are alike.
			if !bytes.Equal(dst.bytes, good) {
				t.Fatalf("%s %d: damage went through", what, i)
			}
		case !errors.As(err, &sum) && !errors.Is(err, ErrDamaged) && !errors.Is(err, errMissing):
			t.Fatalf("%s %d: %v", what, i, err)
		}
		// Only whole runs that were right have been placed.
		for k := range len(dst.there) {
			got := dst.bytes[k<<page.Shift : (k+1)<<page.Shift]
			if !bytes.Equal(got, start[k<<page.Shift:(k+1)<<page.Shift]) && !bytes.Equal(got, good[k<<page.Shift:(k+1)<<page.Shift]) {
				t.Fatalf("%s %d: page %d was placed damaged", what, i, k)
			}
		}
		copy(dst.bytes, start)
	}
	meta := wire.AppendPages(nil, p)
	for i := 0; i < len(payload); i += 1 + r.IntN(1+len(payload)/400) {
		b := bytes.Clone(payload)
		b[i] ^= byte(1 << r.IntN(8))
		check("byte", i, frame{meta, b})
	}
	for i := len(payload) - 40; i < len(payload); i++ { // the short ones in full
		for bit := range 8 {
			b := bytes.Clone(payload)
			b[i] ^= 1 << bit
			check("byte", i, frame{meta, b})
		}
	}
	for i := range p.Sums {
		p.Sums[i]++
		if err := dst.take(d, frame{wire.AppendPages(nil, p), payload}); err == nil {
			t.Fatalf("sum %d is wrong", i)
		} else if sum := new(SumError); !errors.As(err, &sum) || sum.Index != i {
			t.Fatalf("sum %d is wrong: %v", i, err)
		}
		p.Sums[i]--
		copy(dst.bytes, start)
	}
}

func TestDecoderRefuses(t *testing.T) {
	same := func(of uint64, n uint32) (wire.Pages, []byte) {
		return wire.Pages{Runs: []wire.Run{{Kind: wire.RunSame, First: 1, Count: n}}, Sums: make([]uint32, n), Lengths: []uint32{8}},
			binary.LittleEndian.AppendUint64(nil, of)
	}
	var asked []page.Num
	reader := readerFunc(func(first page.Num, buf []byte) error {
		asked = append(asked, first, first+page.Num(len(buf)>>page.Shift))
		return errMissing
	})
	for _, c := range []struct {
		of     uint64
		n      uint32
		reader Reader
		want   error
	}{
		{1 << 52, 1, reader, ErrDamaged}, {1<<52 - 2, 2, reader, ErrDamaged}, {1<<64 - 1, 1, reader, ErrDamaged},
		{1<<64 - 1, 2, reader, ErrDamaged}, {5, 1, nil, ErrDamaged}, {5, 1, reader, errMissing}, {1<<52 - 3, 2, reader, errMissing},
	} {
		p, payload := same(c.of, c.n)
		var q wire.Pages
		if err := wire.ParsePages(wire.AppendPages(nil, p), len(payload), &q); err != nil {
			t.Fatal(err)
		}
		d := NewDecoder(c.reader)
		d.Begin(&q, payload)
		if _, err := d.Next(); !errors.Is(err, c.want) {
			t.Errorf("%d pages from %#x: %v", c.n, c.of, err)
		}
	}
	for _, n := range asked {
		if n > 1<<52-1 {
			t.Errorf("page %#x was asked for", n)
		}
	}
}

type readerFunc func(first page.Num, buf []byte) error

func (f readerFunc) ReadPages(_ page.Space, first page.Num, buf []byte) error { return f(first, buf) }

func FuzzDecoder(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 1))
	_, p, payload := mixed(r)
	f.Add(wire.AppendPages(nil, p), payload)
	one := wire.Pages{Runs: []wire.Run{{Kind: wire.RunSame, First: 1, Count: 2}}, Sums: []uint32{1, 2}, Lengths: []uint32{8}}
	f.Add(wire.AppendPages(nil, one), make([]byte, 8))
	one.Runs[0] = wire.Run{Kind: wire.RunDelta, First: 1, Count: 1}
	one.Sums, one.Lengths = one.Sums[:1], []uint32{3}
	f.Add(wire.AppendPages(nil, one), []byte{0, 1, 7})
	one.Runs[0].Kind, one.Lengths[0] = wire.RunLZ4, 12
	f.Add(wire.AppendPages(nil, one), []byte{0x1f, 7, 1, 0, 255, 255, 255, 255, 255, 255, 255, 255})
	reader := readerFunc(func(first page.Num, buf []byte) error {
		if first%3 == 0 {
			return errMissing
		}
		clear(buf)
		return nil
	})
	f.Fuzz(func(t *testing.T, meta, payload []byte) {
		var p wire.Pages
		if wire.ParsePages(meta, len(payload), &p) != nil {
			return
		}
		d := NewDecoder(reader)
		d.Begin(&p, payload)
		sums := p.Sums
		for _, run := range p.Runs {
			content, err := d.Next()
			if err != nil {
				if sum := new(SumError); !errors.As(err, &sum) && !errors.Is(err, ErrDamaged) && !errors.Is(err, errMissing) {
					t.Fatal(err)
				}
				return
			}
			if !run.Kind.Content() {
				if content != nil {
					t.Fatalf("content for a run that is %s", run.Kind)
				}
				continue
			}
			if len(content) != int(run.Count)*page.Size || Verify(content, sums[:run.Count]) != nil {
				t.Fatalf("%d bytes for %+v", len(content), run)
			}
			sums = sums[run.Count:]
		}
		if len(d.payload) != 0 || len(sums) != 0 || d.lengths != len(p.Lengths) {
			t.Fatal("something was left over")
		}
	})
}
