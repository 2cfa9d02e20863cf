package codec

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/wire"
)

func TestRoundHas(t *testing.T) {
	for _, c := range []struct {
		r, o Round
		want bool
	}{
		{Round{Number: 2}, Round{Number: 1, Lane: 1}, true},
		{Round{Number: 2}, Round{Number: 2}, true},
		{Round{Number: 2}, Round{Number: 2, Lane: 1}, false},
		{Round{Number: 2}, Round{Number: 3}, false},
		{Round{}, Round{}, false},
	} {
		if got := c.r.has(c.o); got != c.want {
			t.Errorf("%+v has %+v: %v", c.r, c.o, got)
		}
	}
}

// Each lane finds what it has sent itself, though another was first.
func TestTwinsLanes(t *testing.T) {
	p := randomPage(newRand(t))
	tw := NewTwins(TwinsConfig{Bytes: 1 << 16})
	k, _ := tw.Key(p, Sum(p))
	tw.Put(0, 5, k, Round{Number: 1, Lane: 1})
	tw.Put(0, 6, k, Round{Number: 1, Lane: 2})
	if n, ok := tw.Lookup(0, k, Round{Number: 1, Lane: 2}); !ok || n != 6 {
		t.Fatalf("page %d, %v", n, ok)
	}
	tw.Put(0, 7, k, Round{Number: 2, Lane: 3})
	if n, ok := tw.Lookup(0, k, Round{Number: 2, Lane: 4}); !ok || n != 6 {
		t.Fatalf("page %d, %v, though an earlier round has sent it", n, ok)
	}
}

func pagesAt(first, n page.Num) page.Range {
	return page.Range{Start: first.Addr(), End: (first + n).Addr()}
}

func TestSent(t *testing.T) {
	r := newRand(t)
	s := NewSent(SentConfig{Bytes: 64 * page.Size})
	old := randomPage(r)
	next := bytes.Clone(old)
	next[77]++
	// put sends p as page 5 in space 1, and says whether a delta came of it.
	put := func(p []byte, rd Round) bool {
		d, ok := s.Exchange([]byte("x"), 1, 5, p, 100, rd)
		if d[0] != 'x' || !ok && len(d) > 1 {
			t.Fatalf("%q, %v", d, ok)
		}
		return ok
	}
	one, two := Round{Number: 1, Keep: true}, Round{Number: 2, Keep: true}
	for name, c := range map[string]struct {
		before func()
		r      Round
		want   bool
	}{
		"in the next round":     {func() { put(old, one) }, two, true},
		"on the same lane":      {func() { put(old, two) }, two, true},
		"on another lane":       {func() { put(old, Round{Number: 2, Lane: 1, Keep: true}) }, two, false},
		"out of all rounds":     {func() { put(old, one) }, Round{Keep: true}, false},
		"sent without a round":  {func() { put(old, one); put(old, Round{}) }, two, false},
		"not kept":              {func() { put(old, Round{Number: 1}) }, two, false},
		"updated without keep":  {func() { put(randomPage(r), one); put(old, Round{Number: 1}) }, two, true},
		"forgotten":             {func() { put(old, one); s.Forget(1, pagesAt(5, 1)) }, two, false},
		"forgotten at large":    {func() { put(old, one); s.Forget(1, pagesAt(0, 1<<30)) }, two, false},
		"others are forgotten":  {func() { put(old, one); s.Forget(1, pagesAt(6, 9)); s.Forget(1, pagesAt(6, 1<<30)) }, two, true},
		"another space is":      {func() { put(old, one); s.Forget(0, pagesAt(5, 1)); s.Forget(0, pagesAt(0, 1<<30)) }, two, true},
		"reset":                 {func() { put(old, one); s.Reset() }, two, false},
		"all of it has changed": {func() { put(randomPage(r), one) }, two, false},
	} {
		s.Reset()
		if s.live.Load() != 0 {
			t.Fatal("something is left")
		}
		c.before()
		if got := put(next, c.r); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// A working set that is larger than the cache, and comes by in each round, keeps
// what fits, in whatever order it comes; what is no longer sent makes room.
func TestSentCycle(t *testing.T) {
	r := newRand(t)
	const slots = 256
	s := NewSent(SentConfig{Bytes: slots * page.Size})
	p := randomPage(r)
	cycle := func(round uint32, first, n page.Num) (hits int) {
		for _, i := range r.Perm(int(n)) {
			if _, ok := s.Exchange(nil, 0, first+page.Num(i), p, 100, Round{Number: round, Keep: true}); ok {
				hits++
			}
		}
		if l := s.live.Load(); l > slots || l < 0 {
			t.Fatalf("%d pages in %d slots", l, slots)
		}
		return hits
	}
	cycle(1, 0, 4*slots)
	for round := uint32(2); round < 6; round++ {
		if n := cycle(round, 0, 4*slots); n < slots*9/10 {
			t.Fatalf("round %d: %d hits of %d slots", round, n, slots)
		}
	}
	for round := uint32(6); round < 9; round++ {
		cycle(round, 10000, slots/2)
	}
	if n := cycle(9, 10000, slots/2); n < slots/2*8/10 {
		t.Fatalf("%d hits of a set that would fit", n)
	}
}

// Pages that change all over are not looked at for ever.
func TestSentGivesUp(t *testing.T) {
	r := newRand(t)
	s := NewSent(SentConfig{Bytes: 4096 * page.Size})
	a, b := randomPage(r), randomPage(r)
	for round := uint32(1); round < 200; round++ {
		for i := range page.Num(2048) {
			if _, ok := s.Exchange(nil, 0, i, a, 100, Round{Number: round, Keep: true}); ok {
				t.Fatal("a delta of everything")
			}
		}
		a, b = b, a
	}
	if n := s.live.Load(); n == 0 || n > 2048/8 {
		t.Fatalf("%d of 2048 pages are kept", n)
	}
}

func TestTwins(t *testing.T) {
	r := newRand(t)
	content, other := randomPage(r), randomPage(r)
	for name, c := range map[string]struct {
		then func(tw *Twins, other Key)
		r    Round
		want bool
	}{
		"in the next round":     {nil, Round{Number: 4}, true},
		"on the same lane":      {nil, Round{Number: 3, Lane: 2}, true},
		"on another lane":       {nil, Round{Number: 3, Lane: 1}, false},
		"out of all rounds":     {nil, Round{}, false},
		"forgotten":             {func(tw *Twins, _ Key) { tw.Forget(1, pagesAt(5, 1)) }, Round{Number: 4}, false},
		"forgotten at large":    {func(tw *Twins, _ Key) { tw.Forget(1, pagesAt(0, 1<<30)) }, Round{Number: 4}, false},
		"others are forgotten":  {func(tw *Twins, _ Key) { tw.Forget(1, pagesAt(6, 9)); tw.Forget(1, pagesAt(6, 1<<30)) }, Round{Number: 4}, true},
		"another space is":      {func(tw *Twins, _ Key) { tw.Forget(0, pagesAt(5, 1)); tw.Forget(0, pagesAt(0, 1<<30)) }, Round{Number: 4}, true},
		"reset":                 {func(tw *Twins, _ Key) { tw.Reset() }, Round{Number: 4}, false},
		"sent with new content": {func(tw *Twins, k Key) { tw.Put(1, 5, k, Round{Number: 3}) }, Round{Number: 4}, false},
		"sent without a round":  {func(tw *Twins, k Key) { tw.Put(1, 5, k, Round{}) }, Round{Number: 4}, false},
	} {
		tw := NewTwins(TwinsConfig{Bytes: 1 << 16})
		k, ok := tw.Key(content, Sum(content))
		k2, ok2 := tw.Key(other, Sum(other))
		if !ok || !ok2 || k == k2 {
			t.Fatal("not looked at")
		}
		tw.Put(1, 5, k, Round{Number: 3, Lane: 2})
		if c.then != nil {
			c.then(tw, k2)
		}
		n, ok := tw.Lookup(1, k, c.r)
		if ok != c.want || ok && n != 5 {
			t.Errorf("%s: page %d, %v", name, n, ok)
		}
		if _, ok := tw.Lookup(0, k, c.r); ok {
			t.Errorf("%s: in another space", name)
		}
	}
}

// Where nothing repeats few pages are looked at, and all when something does. It
// is the content that decides which, so twins are never seen by one half.
func TestTwinsGiveUp(t *testing.T) {
	r := newRand(t)
	tw := NewTwins(TwinsConfig{})
	p := randomPage(r)
	look := func(again bool) (looked, found int) {
		for i := range 20000 {
			if !again || i%2 == 0 {
				p[i%page.Size]++
			}
			k, ok := tw.Key(p, Sum(p))
			if !ok {
				continue
			}
			looked++
			if _, ok := tw.Lookup(0, k, Round{Number: 1}); ok {
				found++
			}
			tw.Put(0, page.Num(i), k, Round{Number: 1})
		}
		return looked, found
	}
	if looked, found := look(false); found > 0 || looked > 20000/3 {
		t.Fatalf("nothing repeats: looked at %d, found %d", looked, found)
	}
	if looked, found := look(true); looked < 20000/4 || found < looked*4/10 {
		t.Fatalf("every other page repeats: looked at %d, found %d", looked, found)
	}
	if looked, _ := look(true); looked < 20000*9/10 {
		t.Fatalf("every other page repeats: looked at %d", looked)
	}
}

// Lanes share both caches, while rounds begin and pages are dropped: this is for
// the race detector, and for what is counted.
func TestSharedByLanes(t *testing.T) {
	seed := newRand(t).Uint64()
	sent, twins := NewSent(SentConfig{Bytes: 64 * page.Size}), NewTwins(TwinsConfig{Bytes: 1 << 12})
	var wg sync.WaitGroup
	for lane := range 4 {
		e := NewEncoder(EncoderConfig{Sent: sent, Twins: twins})
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(lane)))
			var p wire.Pages
			mem := pagesOf(r, 0, 16)
			for round := range uint32(100) {
				e.SetRound(Round{Number: round, Lane: uint8(lane), Keep: true})
				write(r, mem, r.IntN(16))
				encode(e, &p, []page.Range{pagesAt(page.Num(r.IntN(100)), 16)}, bytes.Clone(mem))
			}
		})
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(lane)+10))
			for i := range 1000 {
				g := pagesAt(page.Num(r.IntN(100)), page.Num(r.IntN(400)))
				sent.Forget(0, g)
				twins.Forget(0, g)
				if i%300 == 0 {
					sent.Reset()
					twins.Reset()
				}
				e.Stats()
			}
		})
	}
	wg.Wait()
	all := pagesAt(0, 1<<30)
	sent.Forget(0, all)
	twins.Forget(0, all)
	if s, n := sent.live.Load(), twins.live.Load(); s != 0 || n != 0 {
		t.Fatalf("%d and %d are counted where nothing is left", s, n)
	}
}
