package wire

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/page"
)

func TestHeaderRoundTrip(t *testing.T) {
	for _, meta := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte{7}, MaxMeta)} {
		h := Header{Type: TypePages, Flags: FlagLast, PayloadLen: MaxPayload, Seq: 1 << 40}
		raw := AppendHeader([]byte("before"), h, meta)[len("before"):]
		if len(raw) != HeaderSize {
			t.Fatalf("header of %d bytes", len(raw))
		}
		got, err := ParseHeader(raw)
		h.MetaLen = uint32(len(meta))
		if err != nil || got != h {
			t.Fatalf("got %+v, %v; want %+v", got, err, h)
		}
		if err := CheckMeta(raw, meta); err != nil {
			t.Fatal(err)
		}
	}
}

// Every single bit of header and meta is covered by a check.
func TestHeaderEveryBitCounts(t *testing.T) {
	meta := []byte("meta of a frame")
	frame := append(AppendHeader(nil, Header{Type: TypeWant, Seq: 3}, meta), meta...)
	for i := range len(frame) * 8 {
		f := bytes.Clone(frame)
		f[i/8] ^= 1 << (i % 8)
		h, err := ParseHeader(f)
		if err == nil {
			m := f[HeaderSize:]
			if int(h.MetaLen) < len(m) {
				m = m[:h.MetaLen]
			}
			err = CheckMeta(f, m)
		}
		if !errors.Is(err, ErrMalformed) {
			t.Fatalf("bit %d flipped: %v", i, err)
		}
	}
}

func TestHeaderLimits(t *testing.T) {
	raw := AppendHeader(nil, Header{PayloadLen: MaxPayload + 1}, nil)
	if _, err := ParseHeader(raw); !errors.Is(err, ErrMalformed) {
		t.Fatalf("payload above the limit: %v", err)
	}
	raw = AppendHeader(nil, Header{}, make([]byte, MaxMeta+1))
	if _, err := ParseHeader(raw); !errors.Is(err, ErrMalformed) {
		t.Fatalf("meta above the limit: %v", err)
	}
	if _, err := ParseHeader(raw[:HeaderSize-1]); !errors.Is(err, ErrMalformed) {
		t.Fatalf("short header: %v", err)
	}
}

func run(k RunKind, first page.Num, n uint32) Run {
	return Run{Space: 2, Kind: k, First: first, Count: n}
}

func TestWant(t *testing.T) {
	in := Want{ID: 77, Runs: []Run{run(RunWanted, 5, 1), run(RunWanted, maxNum-MaxRunPages, MaxRunPages)}}
	b := AppendWant(nil, in)
	var out Want
	if err := ParseWant(b, &out); err != nil || !reflect.DeepEqual(in, out) {
		t.Fatalf("got %+v, %v", out, err)
	}
	if r := out.Runs[1].Range(); r.Pages() != MaxRunPages {
		t.Fatalf("range %v", r)
	}
	for name, bad := range map[string][]byte{
		"empty":    nil,
		"short":    b[:len(b)-1],
		"long":     append(bytes.Clone(b), 0),
		"no runs":  AppendWant(nil, Want{ID: 1}),
		"no pages": AppendWant(nil, Want{Runs: []Run{run(0, 5, 0)}}),
		"beyond":   AppendWant(nil, Want{Runs: []Run{run(0, maxNum-1, 2)}}),
		"wraps":    AppendWant(nil, Want{Runs: []Run{run(0, ^page.Num(0), 2)}}),
		"kind":     AppendPages(nil, Pages{Runs: []Run{run(RunZero, 1, 1)}}),
		"reserved": func() []byte { c := bytes.Clone(b); c[13] = 1; return c }(),
	} {
		if err := ParseWant(bad, &out); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	full := AppendWant(nil, Want{Runs: slicesRepeat(run(0, 1, 1), MaxRuns)})
	if err := ParseWant(full, &out); err != nil || len(out.Runs) != MaxRuns || len(full) > MaxMeta {
		t.Fatalf("%d runs in %d bytes: %v", len(out.Runs), len(full), err)
	}
}

func slicesRepeat(r Run, n int) (out []Run) {
	for range n {
		out = append(out, r)
	}
	return out
}

func TestPages(t *testing.T) {
	in := Pages{ID: 9, Runs: []Run{run(RunData, 5, 2), run(RunZero, 7, 1000), run(RunAbsent, 2000, 1), run(RunData, 3000, 1)}, Sums: []uint32{1, 2, 3}}
	b := AppendPages(nil, in)
	if len(b) != PagesSize(4, 3) {
		t.Fatalf("%d bytes, PagesSize says %d", len(b), PagesSize(4, 3))
	}
	var out Pages
	if err := ParsePages(b, 3*page.Size, &out); err != nil || !reflect.DeepEqual(in, out) || out.DataPages() != 3 {
		t.Fatalf("got %+v, %v", out, err)
	}
	in.Runs[0].Count = 3
	tooMany := AppendPages(nil, in)
	for name, c := range map[string]struct {
		b       []byte
		payload int
	}{
		"empty":            {nil, 0},
		"short":            {b[:len(b)-1], 3 * page.Size},
		"long":             {append(bytes.Clone(b), 0), 3 * page.Size},
		"payload short":    {b, 3*page.Size - 1},
		"payload long":     {b, 4 * page.Size},
		"payload negative": {b, -1},
		"more data":        {tooMany, 3 * page.Size},
		"wanted":           {AppendPages(nil, Pages{Runs: []Run{run(RunWanted, 1, 1)}}), 0},
		"unknown kind":     {AppendPages(nil, Pages{Runs: []Run{run(9, 1, 1)}}), 0},
		"no runs":          {AppendPages(nil, Pages{}), 0},
	} {
		if err := ParsePages(c.b, c.payload, &out); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefuse(t *testing.T) {
	in := Refuse{ID: 4, Code: RefuseGone, Text: "pid 12 ended"}
	if out, err := ParseRefuse(AppendRefuse(nil, in)); err != nil || out != in {
		t.Fatalf("got %+v, %v", out, err)
	}
	in.Text = strings.Repeat("é", MaxRefuseText)
	out, err := ParseRefuse(AppendRefuse(nil, in))
	if err != nil || out.Text != strings.Repeat("é", MaxRefuseText/2) {
		t.Fatalf("got %d bytes, %v", len(out.Text), err)
	}
	in.Text = strings.Repeat("é", 400) + "x" + strings.Repeat("é", 400) // cut inside a character
	if out, err := ParseRefuse(AppendRefuse(nil, in)); err != nil || len(out.Text) != MaxRefuseText-1 {
		t.Fatalf("got %d bytes, %v", len(out.Text), err)
	}
	b := AppendRefuse(nil, Refuse{Text: "ab"})
	for name, bad := range map[string][]byte{
		"empty": nil, "short": b[:len(b)-1], "long": append(bytes.Clone(b), 'c'),
		"not text": append(bytes.Clone(b[:refuseHead]), 0xff, 0xff),
	} {
		if _, err := ParseRefuse(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A lane in full flow must not allocate.
func TestNoAllocation(t *testing.T) {
	p := Pages{ID: 1, Runs: slicesRepeat(run(RunData, 1, 1), 64), Sums: make([]uint32, 64)}
	w := Want{ID: 1, Runs: slicesRepeat(run(0, 1, 1), 64)}
	enc, payload := encodedPages()
	buf := make([]byte, 0, 8192)
	var p2 Pages
	var w2 Want
	cycle := func() {
		b := AppendPages(buf[:0], p)
		h := AppendHeader(b, Header{Type: TypePages, PayloadLen: 64 * page.Size}, b)[len(b):]
		if _, err := ParseHeader(h); err != nil {
			t.Fatal(err)
		}
		if err := CheckMeta(h, b); err != nil {
			t.Fatal(err)
		}
		if err := ParsePages(b, 64*page.Size, &p2); err != nil {
			t.Fatal(err)
		}
		if err := ParsePages(AppendPages(buf[:0], enc), payload, &p2); err != nil {
			t.Fatal(err)
		}
		if err := ParseWant(AppendWant(buf[:0], w), &w2); err != nil {
			t.Fatal(err)
		}
	}
	cycle()
	if n := testing.AllocsPerRun(100, cycle); n != 0 {
		t.Fatalf("%v allocations per frame", n)
	}
}

func BenchmarkPages64(b *testing.B) {
	p := Pages{ID: 1, Runs: []Run{run(RunData, 1, 64)}, Sums: make([]uint32, 64)}
	for i := range p.Sums {
		p.Sums[i] = rand.Uint32()
	}
	buf := make([]byte, 0, 8192)
	var out Pages
	for b.Loop() {
		m := AppendPages(buf[:0], p)
		h := AppendHeader(m, Header{Type: TypePages, PayloadLen: 64 * page.Size}, m)[len(m):]
		if CheckMeta(h, m) != nil || ParsePages(m, 64*page.Size, &out) != nil {
			b.Fatal("damaged")
		}
	}
}
