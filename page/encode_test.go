package page

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestSetEncoding(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 200 {
		var s Set
		for range r.IntN(50) {
			p := Num(r.Uint64N(1 << 35))
			s.Add(Range{p.Addr(), (p + Num(1+r.IntN(1000))).Addr()})
		}
		got, rest, err := ParseSet(append(AppendSet(nil, &s), "tail"...))
		if err != nil || string(rest) != "tail" || !slices.Equal(got.Ranges(), s.Ranges()) {
			t.Fatalf("round trip of %v: %v %q %v", s, got, rest, err)
		}
		var again Set
		b, _ := s.MarshalBinary()
		if err := again.UnmarshalBinary(b); err != nil || !slices.Equal(again.Ranges(), s.Ranges()) {
			t.Fatalf("round trip of %v: %v %v", s, again, err)
		}
		if again.UnmarshalBinary(append(b, 0)) == nil {
			t.Fatal("a byte too many was not seen")
		}
	}
}

func FuzzParseSet(f *testing.F) {
	s := NewSet(Range{0x1000, 0x3000}, Range{0x7fff00000000, 0x7fff00100000})
	f.Add(AppendSet(nil, &s))
	f.Add([]byte{1, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, rest, err := ParseSet(b)
		if err != nil {
			return
		}
		at := Addr(0)
		for i, r := range s.Ranges() {
			if r.Empty() || !r.Aligned() || i > 0 && r.Start <= at {
				t.Fatalf("range %d of %v is not in order", i, s.Ranges())
			}
			at = r.End
		}
		again, _, err := ParseSet(AppendSet(nil, &s))
		if err != nil || !slices.Equal(again.Ranges(), s.Ranges()) {
			t.Fatalf("second round trip: %v", err)
		}
		_ = bytes.Clone(rest)
	})
}
