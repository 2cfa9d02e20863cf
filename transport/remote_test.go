package transport

import (
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pageferry/pageferry/page"
)

func span(first, end int) page.Range {
	return page.Range{Start: page.Addr(first) << page.Shift, End: page.Addr(end) << page.Shift}
}

// TestSplit: every page asked for is in one part, with the key of its Remote.
func TestSplit(t *testing.T) {
	for range 2000 {
		keys := map[page.Space]*[64]uint32{0: {}, 3: {}}
		var offered []Remote
		for space, k := range keys {
			for at := rand.IntN(6); at < 60; at += rand.IntN(6) {
				n := 1 + rand.IntN(4)
				key := 1 + rand.Uint32N(1000)
				offered = append(offered, Remote{space, span(at, at+n), key})
				for i := range n {
					k[at+i] = key
				}
				at += n
			}
		}
		rand.Shuffle(len(offered), func(i, j int) { offered[i], offered[j] = offered[j], offered[i] })
		r, err := NewRemotes(offered)
		if err != nil {
			t.Fatal(err)
		}
		space := []page.Space{0, 3, 7}[rand.IntN(3)]
		var want []page.Range
		asked := [64]bool{}
		for at := rand.IntN(10); at < 60; at += 1 + rand.IntN(9) {
			n := 1 + rand.IntN(min(20, 64-at))
			want = append(want, span(at, at+n))
			for i := range n {
				asked[at+i] = true
			}
			at += n
		}
		read, rest := r.Split(space, want)
		var got [64]uint32
		seen := [64]bool{}
		mark := func(p page.Range, key uint32) {
			for i := int(p.Start >> page.Shift); i < int(p.End>>page.Shift); i++ {
				if seen[i] {
					t.Fatalf("page %d twice: %v %v", i, read, rest)
				}
				seen[i], got[i] = true, key
			}
		}
		for _, p := range read {
			if p.Space != space || p.Key == 0 || p.Range.Empty() {
				t.Fatalf("%+v", p)
			}
			mark(p.Range, p.Key)
		}
		for _, p := range rest {
			mark(p, 0)
		}
		for i := range seen {
			key := uint32(0)
			if k := keys[space]; k != nil && asked[i] {
				key = k[i]
			}
			if seen[i] != asked[i] || got[i] != key {
				t.Fatalf("page %d: key %d, want %d; asked %v, seen %v\n%v\n%v\n%v", i, got[i], key, asked[i], seen[i], offered, want, read)
			}
		}
	}
	for _, bad := range [][]Remote{
		{{0, span(1, 3), 1}, {0, span(2, 4), 1}}, {{0, span(2, 2), 1}}, {{0, page.Range{Start: 1, End: 4097}, 1}},
	} {
		if _, err := NewRemotes(bad); !errors.Is(err, ErrDamaged) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	var none *Remotes
	if read, rest := none.Split(0, []page.Range{span(1, 2)}); len(read) != 0 || len(rest) != 1 {
		t.Errorf("nil: %v, %v", read, rest)
	}
}
