package codec

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/wire"
)

// memory is pages at the destination, from number base on.
type memory struct {
	base  page.Num
	bytes []byte
	there []bool
}

var errMissing = errors.New("not here")

func newMemory(base page.Num, pages int) *memory {
	return &memory{base, make([]byte, pages*page.Size), make([]bool, pages)}
}

func (m *memory) ReadPages(_ page.Space, first page.Num, buf []byte) error {
	i, n := int(first)-int(m.base), len(buf)>>page.Shift
	if first < m.base || i+n > len(m.there) {
		return errMissing
	}
	for k := i; k < i+n; k++ {
		if !m.there[k] {
			return errMissing
		}
	}
	copy(buf, m.bytes[i<<page.Shift:])
	return nil
}

func (m *memory) place(r wire.Run, content []byte) {
	i := int(r.First - m.base)
	to := m.bytes[i<<page.Shift : (i+int(r.Count))<<page.Shift]
	if content == nil {
		clear(to)
	} else if len(content) == len(to) {
		copy(to, content)
	} else {
		panic("content of another length")
	}
	for k := range int(r.Count) {
		m.there[i+k] = true
	}
}

// frame is one that is on its way.
type frame struct{ meta, payload []byte }

func encode(e *Encoder, p *wire.Pages, ranges []page.Range, data []byte) frame {
	n := e.Encode(p, 0, ranges, data)
	return frame{wire.AppendPages(nil, *p), bytes.Clone(data[:n])}
}

func (m *memory) take(d *Decoder, f frame) error {
	var p wire.Pages
	if err := wire.ParsePages(f.meta, len(f.payload), &p); err != nil {
		return err
	}
	d.Begin(&p, f.payload)
	for _, r := range p.Runs {
		content, err := d.Next()
		if err != nil {
			return err
		}
		m.place(r, content)
	}
	return nil
}

// without is an encoding as it was before there were others than zero pages.
func without(ranges []page.Range, data []byte) (wire.Pages, []byte) {
	var p wire.Pages
	var out []byte
	for _, r := range ranges {
		for first := r.Start.Page(); first < r.End.Page(); {
			zero, n := Run(data[:(r.End.Page()-first)<<page.Shift])
			run := wire.Run{Kind: wire.RunZero, Count: uint32(n), First: first}
			if !zero {
				run.Kind = wire.RunData
				out = append(out, data[:n<<page.Shift]...)
				p.Sums = AppendSums(p.Sums, data[:n<<page.Shift])
			}
			p.Runs = append(p.Runs, run)
			first += page.Num(n)
			data = data[n<<page.Shift:]
		}
	}
	return p, out
}

func TestEncoderPlain(t *testing.T) {
	r := newRand(t)
	for _, cfg := range []EncoderConfig{{}, {Chooser: &Chooser{Mode: Never}}, {Chooser: &Chooser{}}, {Chooser: &Chooser{}, Sent: NewSent(SentConfig{}), Twins: NewTwins(TwinsConfig{})}} {
		e := NewEncoder(cfg)
		var p wire.Pages
		for range 50 {
			ranges, n := randomRanges(r, 64)
			data := make([]byte, n<<page.Shift)
			for i := range n {
				if r.IntN(3) > 0 {
					copy(data[i<<page.Shift:], randomPage(r))
				}
			}
			want, payload := without(ranges, bytes.Clone(data))
			got := encode(e, &p, ranges, data)
			if !bytes.Equal(got.meta, wire.AppendPages(nil, want)) || !bytes.Equal(got.payload, payload) {
				t.Fatalf("%+v, should be %+v", p, want)
			}
		}
	}
}

func randomRanges(r *rand.Rand, pages int) (rs []page.Range, n int) {
	for at := page.Num(100); n < pages; {
		k := min(1+r.IntN(20), pages-n)
		rs = append(rs, page.Range{Start: at.Addr(), End: (at + page.Num(k)).Addr()})
		at += page.Num(k + r.IntN(2)) // sometimes without a gap
		n += k
	}
	return rs, n
}

// Several lanes in several rounds, over memory that is written to in between:
// what is at the destination at the end of a round is what was at the source when
// it was read, whatever the order in which the lanes got there.
func TestEncoderModel(t *testing.T) {
	r := newRand(t)
	const pages, base, lanes = 300, 1000, 3
	var all Stats
	for range 30 {
		sent := NewSent(SentConfig{Bytes: (10 + r.IntN(400)) * page.Size})
		twins := NewTwins(TwinsConfig{Bytes: (10 + r.IntN(400)) * twinSize})
		var enc [lanes]*Encoder
		var dec [lanes]*Decoder
		src, dst := make([]byte, pages*page.Size), newMemory(base, pages)
		for l := range lanes {
			c := &Chooser{Mode: Mode(r.IntN(3))}
			c.SetRate(1e6 * float64(r.IntN(1000)))
			enc[l] = NewEncoder(EncoderConfig{Chooser: c, Sent: sent, Twins: twins, Group: 1 + r.IntN(64), DeltaLimit: 1 + r.IntN(page.Size-1)})
			dec[l] = NewDecoder(dst)
		}
		dirty := make([]bool, pages)
		for i := range dirty {
			dirty[i] = true
			write(r, src, i)
		}
		for round := uint32(1); round < 8; round++ {
			number := round
			if r.IntN(8) == 0 {
				number = 0 // as for demand faults: nothing may stand on anything
			}
			var queue [lanes][]frame
			for i, d := range dirty {
				if n := page.Num(base + i); d {
					twins.Forget(0, page.PageOf(n.Addr()))
				}
			}
			for l := range lanes {
				enc[l].SetRound(Round{Number: number, Lane: uint8(l), Keep: r.IntN(3) > 0})
			}
			var p wire.Pages
			for i := 0; i < pages; {
				var ranges []page.Range
				var data []byte
				for ; i < pages && len(data) < 40*page.Size; i++ {
					if !dirty[i] {
						continue
					}
					if g := page.PageOf(page.Num(base + i).Addr()); len(ranges) > 0 && ranges[len(ranges)-1].End == g.Start {
						ranges[len(ranges)-1].End = g.End
					} else {
						ranges = append(ranges, g)
					}
					data = append(data, src[i<<page.Shift:(i+1)<<page.Shift]...)
				}
				if len(ranges) > 0 {
					l := r.IntN(lanes)
					queue[l] = append(queue[l], encode(enc[l], &p, ranges, data))
				}
			}
			for len(queue[0])+len(queue[1])+len(queue[2]) > 0 {
				l := r.IntN(lanes)
				if len(queue[l]) == 0 {
					continue
				}
				if err := dst.take(dec[l], queue[l][0]); err != nil {
					t.Fatalf("round %d, lane %d: %v", round, l, err)
				}
				queue[l] = queue[l][1:]
			}
			if !bytes.Equal(src, dst.bytes) {
				t.Fatalf("round %d: the memory is not what it was", round)
			}
			clear(dirty)
			for range r.IntN(200) {
				i := r.IntN(pages)
				dirty[i] = true
				write(r, src, i)
			}
		}
		for _, e := range enc {
			all.Add(e.Stats())
		}
	}
	t.Log(all)
	for _, c := range []Count{all.Raw, all.Zero, all.LZ4, all.Delta, all.Same} {
		if c.Pages == 0 {
			t.Fatalf("not every kind was there: %+v", all)
		}
	}
}

// write changes page i as a program might.
func write(r *rand.Rand, mem []byte, i int) {
	p := mem[i<<page.Shift : (i+1)<<page.Shift]
	switch r.IntN(8) {
	case 0:
		clear(p)
	case 1: // that of another page
		copy(p, mem[r.IntN(len(mem)>>page.Shift)<<page.Shift:])
	case 2, 3:
		kinds[r.IntN(len(kinds))].fill(r, p)
	default:
		for range 1 + r.IntN(30) {
			p[r.IntN(page.Size)]++
		}
	}
}

// apart returns n pages none of which takes the place of another in twins: two
// in 100 of plainly random ones do.
func apart(r *rand.Rand, twins *Twins, n int) []byte {
	var data []byte
	for taken := make(map[uint64]bool); len(taken) < n; {
		p := randomPage(r)
		k, _ := twins.Key(p, Sum(p))
		if s := twins.slot(k); !taken[s] {
			taken[s] = true
			data = append(data, p...)
		}
	}
	return data
}

// A stretch that equals another goes as one reference, of at most the pages that
// one may have, and never to a page of its own.
func TestEncoderSame(t *testing.T) {
	r := newRand(t)
	twins := NewTwins(TwinsConfig{})
	e := NewEncoder(EncoderConfig{Twins: twins})
	e.SetRound(Round{Number: 1})
	dst := newMemory(1000, 400)
	var p wire.Pages
	data := apart(r, twins, 100)
	once := page.Range{Start: page.Num(1000).Addr(), End: page.Num(1100).Addr()}
	again := page.Range{Start: page.Num(1200).Addr(), End: page.Num(1300).Addr()}
	alike := page.Range{Start: page.Num(1300).Addr(), End: page.Num(1400).Addr()}
	d := NewDecoder(dst)
	if err := dst.take(d, encode(e, &p, []page.Range{once}, bytes.Clone(data))); err != nil {
		t.Fatal(err)
	}
	if err := dst.take(d, encode(e, &p, []page.Range{again}, bytes.Clone(data))); err != nil {
		t.Fatal(err)
	}
	if want := []wire.Run{{Kind: wire.RunSame, First: 1200, Count: 64}, {Kind: wire.RunSame, First: 1264, Count: 36}}; !reflect.DeepEqual(p.Runs, want) {
		t.Fatalf("%+v", p.Runs)
	}
	// Neighbours in the frame that are none in memory, and none in what they equal.
	parts := []page.Range{pagesAt(1200, 3), pagesAt(1210, 3)}
	if err := dst.take(d, encode(e, &p, parts, bytes.Clone(data[:6*page.Size]))); err != nil {
		t.Fatal(err)
	}
	if want := []wire.Run{{Kind: wire.RunSame, First: 1200, Count: 3}, {Kind: wire.RunSame, First: 1210, Count: 3}}; !reflect.DeepEqual(p.Runs, want) {
		t.Fatalf("%+v", p.Runs)
	}
	if err := dst.take(d, encode(e, &p, []page.Range{alike}, bytes.Repeat(randomPage(r), 100))); err != nil {
		t.Fatal(err)
	}
	if p.Runs[0].Kind != wire.RunData || p.Runs[0].Count != 1 || p.Runs[1].Kind != wire.RunSame {
		t.Fatalf("%+v", p.Runs)
	}
	if s := e.Stats(); s.Same.Pages != 199+6 || s.Raw.Pages != 101 || s.Same.Saved() != (199+6)*page.Size-s.Same.Bytes {
		t.Fatal(s)
	}
}

// A page of a reference is there when the reference is taken up, not only while.
func TestEncoderSameOverlaps(t *testing.T) {
	e := NewEncoder(EncoderConfig{Twins: NewTwins(TwinsConfig{})})
	var p wire.Pages
	e.p, e.out = &p, make([]byte, page.Size)
	for i := range page.Num(15) {
		e.same(0, 20+i, 10+i)
	}
	if len(p.Runs) != 2 || p.Runs[0].Count != 10 || p.Runs[1].Count != 5 {
		t.Fatalf("%+v", p.Runs)
	}
}

// What a lane sends over a page ends what others may refer to, whether or not the
// page was forgotten beforehand.
func TestEncoderForgets(t *testing.T) {
	r := newRand(t)
	content, zero := randomPage(r), make([]byte, page.Size)
	for name, over := range map[string]func(e *Encoder, p *wire.Pages){
		"zeros": func(e *Encoder, p *wire.Pages) { encode(e, p, []page.Range{pagesAt(5, 1)}, bytes.Clone(zero)) },
		"outside of rounds": func(e *Encoder, p *wire.Pages) {
			e.SetRound(Round{})
			encode(e, p, []page.Range{pagesAt(5, 1)}, randomPage(r))
		},
		"not looked at": func(e *Encoder, p *wire.Pages) {
			e.cfg.Twins.sample.Store(31)
			encode(e, p, []page.Range{pagesAt(5, 1)}, randomPage(r))
			e.cfg.Twins.sample.Store(0)
		},
		"nothing": nil,
	} {
		e := NewEncoder(EncoderConfig{Sent: NewSent(SentConfig{}), Twins: NewTwins(TwinsConfig{})})
		var p wire.Pages
		e.SetRound(Round{Number: 1, Keep: true})
		encode(e, &p, []page.Range{pagesAt(5, 1)}, bytes.Clone(content))
		e.SetRound(Round{Number: 2, Keep: true})
		if over != nil {
			over(e, &p)
		}
		e.SetRound(Round{Number: 3, Keep: true})
		encode(e, &p, []page.Range{pagesAt(9, 1)}, bytes.Clone(content))
		if same := p.Runs[0].Kind == wire.RunSame; same != (over == nil) {
			t.Errorf("%s: %+v", name, p.Runs)
		}
	}
}

// A lane in full flow must not allocate, whatever it carries.
func TestEncoderAllocations(t *testing.T) {
	r := newRand(t)
	c := &Chooser{Mode: Always}
	e := NewEncoder(EncoderConfig{Chooser: c, Sent: NewSent(SentConfig{Bytes: 1 << 20}), Twins: NewTwins(TwinsConfig{Bytes: 1 << 16})})
	const pages = 64
	src := make([]byte, pages*page.Size)
	for i := range pages {
		if i%5 > 0 {
			kinds[i%len(kinds)].fill(r, src[i<<page.Shift:(i+1)<<page.Shift])
		}
	}
	copy(src[40<<page.Shift:42<<page.Shift], src[2<<page.Shift:])
	ranges := []page.Range{{Start: page.Num(1000).Addr(), End: page.Num(1000 + pages).Addr()}}
	dst := newMemory(1000, pages)
	d := NewDecoder(dst)
	data, meta := make([]byte, len(src)), make([]byte, 0, wire.MaxMeta)
	var p, q wire.Pages
	round := uint32(1)
	frame := func() {
		e.SetRound(Round{Number: round, Keep: true})
		round++
		src[7<<page.Shift]++
		n := e.Encode(&p, 0, ranges, data[:copy(data, src)])
		if err := wire.ParsePages(wire.AppendPages(meta, p), n, &q); err != nil {
			t.Fatal(err)
		}
		d.Begin(&q, data[:n])
		for _, r := range q.Runs {
			content, err := d.Next()
			if err != nil {
				t.Fatal(err)
			}
			dst.place(r, content)
		}
	}
	frame()
	e.cfg.Sent.Reset() // so that groups are compressed in each frame
	if n := testing.AllocsPerRun(50, frame); n != 0 {
		t.Fatalf("%v allocations per frame", n)
	}
	if s := e.Stats(); s.LZ4.Pages == 0 || s.Delta.Pages == 0 || s.Same.Pages == 0 {
		t.Fatal(s)
	}
}
