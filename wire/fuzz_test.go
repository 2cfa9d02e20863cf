package wire

import (
	"bytes"
	"errors"
	"testing"
)

// What a parser accepts must encode to the same bytes again: no two forms of
// one thing, and nothing of the input that went unread.

func FuzzHeader(f *testing.F) {
	f.Add(AppendHeader(nil, Header{Type: TypePages, PayloadLen: 4096, Seq: 1}, nil), []byte(nil))
	f.Add(AppendHeader(nil, Header{Type: TypeMessage}, []byte("abc")), []byte("abc"))
	f.Fuzz(func(t *testing.T, raw, meta []byte) {
		h, err := ParseHeader(raw)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if h.MetaLen > MaxMeta || h.PayloadLen > MaxPayload {
			t.Fatalf("limits passed: %+v", h)
		}
		if int(h.MetaLen) != len(meta) || CheckMeta(raw, meta) != nil {
			return
		}
		if again := AppendHeader(nil, h, meta); !bytes.Equal(again, raw[:HeaderSize]) {
			t.Fatalf("%x became %x", raw, again)
		}
	})
}

func FuzzWant(f *testing.F) {
	f.Add(AppendWant(nil, Want{ID: 1, Runs: []Run{run(0, 5, 3)}}))
	f.Add(AppendWant(nil, Want{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		var w Want
		if err := ParseWant(b, &w); err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		for _, r := range w.Runs {
			checkRun(t, r)
		}
		if again := AppendWant(nil, w); !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

func checkRun(t *testing.T, r Run) {
	if rg := r.Range(); rg.Empty() || rg.Pages() != int(r.Count) || !rg.Aligned() {
		t.Fatalf("run %+v covers %v", r, rg)
	}
}

func FuzzPages(f *testing.F) {
	f.Add(AppendPages(nil, Pages{ID: 1, Runs: []Run{run(RunData, 5, 1)}, Sums: []uint32{1}}), 4096)
	f.Add(AppendPages(nil, Pages{ID: 1, Runs: []Run{run(RunZero, 5, 99)}}), 0)
	p, payload := encodedPages()
	f.Add(AppendPages(nil, p), payload)
	f.Add(AppendPages(nil, Pages{ID: 1, Runs: []Run{run(RunDelta, 5, 1)}, Sums: []uint32{1}, Lengths: []uint32{0}}), 0)
	f.Fuzz(func(t *testing.T, b []byte, payload int) {
		var p Pages
		if err := ParsePages(b, payload, &p); err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		for _, r := range p.Runs {
			checkRun(t, r)
		}
		checkEncodings(t, &p, payload)
		if again := AppendPages(nil, p); !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}

func FuzzRefuse(f *testing.F) {
	f.Add(AppendRefuse(nil, Refuse{ID: 1, Code: RefuseRead, Text: "no"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRefuse(b)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if again := AppendRefuse(nil, r); !bytes.Equal(again, b) {
			t.Fatalf("%x became %x", b, again)
		}
	})
}
