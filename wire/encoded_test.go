package wire

import (
	"bytes"
	"encoding/hex"
	"errors"
	"reflect"
	"testing"

	"github.com/pageferry/pageferry/page"
)

// encodedPages is a frame with every kind of run, and the length of its payload.
func encodedPages() (Pages, int) {
	return Pages{
		ID: 9,
		Runs: []Run{
			run(RunData, 5, 2), run(RunLZ4, 7, 64), run(RunZero, 71, 1000), run(RunDelta, 2000, 1),
			run(RunAbsent, 2001, 1), run(RunDelta, 2002, 1), run(RunSame, 3000, 64), run(RunData, 4000, 1),
		},
		Sums:    make([]uint32, 2+64+1+1+64+1),
		Lengths: []uint32{64*page.Size - 1, 100, 0, SameSize},
	}, 3*page.Size + 64*page.Size - 1 + 100 + SameSize
}

func TestPagesEncoded(t *testing.T) {
	in, payload := encodedPages()
	for i := range in.Sums {
		in.Sums[i] = uint32(i) * 77
	}
	b := AppendPages(nil, in)
	if n := PagesSize(len(in.Runs), len(in.Sums)) + 4*len(in.Lengths); len(b) != n {
		t.Fatalf("%d bytes, should be %d", len(b), n)
	}
	var out Pages
	if err := ParsePages(b, payload, &out); err != nil || !reflect.DeepEqual(in, out) || out.DataPages() != 3 {
		t.Fatalf("got %+v, %v", out, err)
	}
	// What follows must not see lengths of an earlier frame.
	plain := Pages{ID: 1, Runs: []Run{run(RunData, 5, 1)}, Sums: []uint32{1}}
	if err := ParsePages(AppendPages(nil, plain), page.Size, &out); err != nil || len(out.Lengths) != 0 {
		t.Fatalf("got %+v, %v", out, err)
	}
}

func TestPagesEncodedHostile(t *testing.T) {
	for name, change := range map[string]func(p *Pages, payload *int){
		"payload short":      func(_ *Pages, n *int) { *n-- },
		"payload long":       func(_ *Pages, n *int) { *n++ },
		"length missing":     func(p *Pages, n *int) { p.Lengths, *n = p.Lengths[:3], *n-SameSize },
		"length too many":    func(p *Pages, _ *int) { p.Lengths = append(p.Lengths, 0) },
		"length larger":      func(p *Pages, _ *int) { p.Lengths[1]++ },
		"lz4 empty":          func(p *Pages, n *int) { *n -= int(p.Lengths[0]); p.Lengths[0] = 0 },
		"lz4 does not pay":   func(p *Pages, n *int) { p.Lengths[0]++; *n++ },
		"delta does not pay": func(p *Pages, n *int) { *n += page.Size - 100; p.Lengths[1] = page.Size },
		"same short":         func(p *Pages, n *int) { p.Lengths[3]--; *n-- },
		"same long":          func(p *Pages, n *int) { p.Lengths[3]++; *n++ },
		"lengths wrap":       func(p *Pages, n *int) { p.Lengths[1], p.Lengths[2] = ^uint32(0), 101 },
		"lz4 of too many":    func(p *Pages, _ *int) { p.Runs[1].Count++; p.Sums = append(p.Sums, 1) },
		"same of too many":   func(p *Pages, _ *int) { p.Runs[6].Count++; p.Sums = append(p.Sums, 1) },
		"delta of two":       func(p *Pages, _ *int) { p.Runs[3].Count++; p.Sums = append(p.Sums, 1) },
		"sum missing":        func(p *Pages, _ *int) { p.Sums = p.Sums[1:] },
		"sum too many":       func(p *Pages, _ *int) { p.Sums = append(p.Sums, 1) },
		"a sum for a length": func(p *Pages, _ *int) { p.Sums, p.Lengths = append(p.Sums, 1), p.Lengths[:3] },
		"unknown kind":       func(p *Pages, _ *int) { p.Runs[6].Kind = 7 },
		"too much content": func(p *Pages, n *int) {
			// 256 pages are allowed, and no more, whatever little they weigh.
			p.Runs, p.Lengths, *n = slicesRepeat(run(RunSame, 1, 64), 4), []uint32{8, 8, 8, 8, 0}, 4*SameSize
			p.Runs = append(p.Runs, run(RunDelta, 1, 1))
			p.Sums = make([]uint32, MaxDataPages+1)
		},
	} {
		p, payload := encodedPages()
		change(&p, &payload)
		var out Pages
		if err := ParsePages(AppendPages(nil, p), payload, &out); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What has no encoded run has the form it had before there were any.
func TestPagesPlainForm(t *testing.T) {
	b := AppendPages(nil, Pages{ID: 0x0102, Runs: []Run{run(RunData, 5, 2), run(RunZero, 7, 3), run(RunAbsent, 10, 1)}, Sums: []uint32{0xa1a2a3a4, 0xb1b2b3b4}})
	want, _ := hex.DecodeString("0201000000000000" + "03000000" + "02000000" +
		"02000000" + "02000001" + "0500000000000000" +
		"02000000" + "03000002" + "0700000000000000" +
		"02000000" + "01000003" + "0a00000000000000" +
		"a4a3a2a1" + "b4b3b2b1")
	if !bytes.Equal(b, want) {
		t.Fatalf("%x, should be %x", b, want)
	}
}

// checkEncodings holds what a decoder relies on.
func checkEncodings(t *testing.T, p *Pages, payload int) {
	n, content, at := 0, 0, 0
	for _, r := range p.Runs {
		switch {
		case r.Kind == RunData:
			at += int(r.Count) * page.Size
		case r.Kind.Encoded():
			if r.Count > MaxBlockPages || r.Kind == RunDelta && r.Count != 1 {
				t.Fatalf("encoded run %+v", r)
			}
			l := int(p.Lengths[n])
			if l >= int(r.Count)*page.Size || r.Kind == RunSame && l != SameSize || r.Kind == RunLZ4 && l == 0 {
				t.Fatalf("%d bytes for %+v", l, r)
			}
			at += l
			n++
		}
		if r.Kind.Content() {
			content += int(r.Count)
		}
	}
	if n != len(p.Lengths) || content != len(p.Sums) || content > MaxDataPages || at != payload || payload > MaxPayload {
		t.Fatalf("%d lengths, %d pages with content, %d bytes of %d: %+v", n, content, at, payload, p)
	}
}
