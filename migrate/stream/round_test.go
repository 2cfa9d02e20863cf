package stream

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
)

// round is one of so many pages. Its store is closed after the fetcher.
func (s *setup) round(pages int) Round {
	s.t.Helper()
	st, err := pagestore.Create("test-round")
	if err != nil {
		s.t.Fatal(err)
	}
	all := page.Range{Start: base, End: base + page.Addr(pages)*page.Size}
	src, err := st.AddSource(0, page.NewSet(all), page.Set{}, page.Set{})
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := st.AddSpace(src, 1, -1, -1, []pagestore.Segment{{Dst: all, Src: base}}); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		s.fetch.Close() // no lane looks at it any more
		if err := st.Close(); err != nil {
			s.t.Error(err)
		}
	})
	return Round{Store: st, Placer: &placer{t: s.t, st: st, placed: map[page.Space]map[page.Num]int{}}}
}

// TestLaneLostInRound: what a lost lane owed is not fetched again on another and
// taken for the round, and the next round is not the worse for a lane lost before it.
func TestLaneLostInRound(t *testing.T) {
	s := newSetup(t, nil, func(*FetcherConfig) {})
	round := func() (*pagestore.Store, chan error) {
		r := s.round(2000)
		done := make(chan error, 1)
		go func() { done <- s.fetch.Round(t.Context(), r) }()
		return r.Store, done
	}
	end := func(done chan error) error {
		t.Helper()
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			t.Fatal("the round does not end")
			return nil
		}
	}
	for range 3 {
		s.connect(transport.Bulk)
	}
	s.cut(0)
	testutil.Eventually(t, 10*time.Second, func() error {
		if s.fetch.Lanes() != 2 {
			return errors.New("the lane is still there")
		}
		return nil
	})
	_, done := round()
	if err := end(done); err != nil {
		t.Fatal(err)
	}
	s.read.delay.Store(int64(2 * time.Millisecond))
	st, done := round()
	testutil.Eventually(t, 10*time.Second, func() error {
		if st.Missing(true) > 1900 {
			return errors.New("it has not begun")
		}
		return nil
	})
	s.cut(1)
	if err := end(done); !errors.Is(err, transport.ErrPeer) {
		t.Errorf("a round that lost a lane: %v", err)
	}
}

// TestRoundOfSmallWindow: a window that has no room for a chunk asks for less at once.
func TestRoundOfSmallWindow(t *testing.T) {
	s := newSetup(t, nil, func(*FetcherConfig) {})
	r := s.round(100)
	r.Window, r.Chunk = 4*page.Size, 8*page.Size
	s.connect(transport.Bulk)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := s.fetch.Round(ctx, r); err != nil {
		t.Fatal(err)
	}
}
