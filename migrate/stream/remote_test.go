package stream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
)

// remoteLane is a lane whose peer has offered memory; so many reads are
// refused, and each ends its lane, as it does a queue pair.
type remoteLane struct {
	transport.Lane
	offered *transport.Remotes
	keys    map[page.Space]uint32
	reads   *atomic.Int64 // pages
	fails   *atomic.Int64
	broken  atomic.Bool
}

func (l *remoteLane) Offered() *transport.Remotes { return l.offered }

func (l *remoteLane) ReadRemote(_ context.Context, key uint32, at uint64, into *transport.Buffer) error {
	time.Sleep(time.Duration(rand.IntN(100)) * time.Microsecond)
	if l.broken.Load() || l.fails.Add(-1) >= 0 {
		l.broken.Store(true)
		l.Close()
		return fmt.Errorf("%w: no such memory", transport.ErrPeer)
	}
	for s, k := range l.keys {
		if k != key {
			continue
		}
		b := into.Bytes()
		for n := page.Addr(at).Page(); len(b) > 0; n++ {
			content(s, n, b[:page.Size])
			b = b[page.Size:]
			l.reads.Add(1)
		}
		return nil
	}
	return errors.New("an unknown key")
}

// TestRemote: what was offered is read, all else is asked for, and what a lane
// owed that ended is had by another way.
func TestRemote(t *testing.T) {
	for _, fails := range []int64{0, 1, 3} {
		t.Run(fmt.Sprint(fails, " fail"), func(t *testing.T) {
			pool, err := transport.NewPool(6, 16<<10)
			if err != nil {
				t.Fatal(err)
			}
			s := newSetup(t, []int{2000, 300}, func(c *FetcherConfig) { c.Remote = pool })
			t.Cleanup(func() { // before that of the setup
				s.fetch.Close()
				if err := pool.Close(); err != nil {
					t.Error(err)
				}
			})
			keys := map[page.Space]uint32{0: 7, 1: 8}
			var offer []transport.Remote
			var pages int64
			for _, src := range s.st.Sources() {
				for i := 0; i < src.Len(); i++ { // runs of every third sort of page number
					r := page.PageOf(src.Addr(i))
					if n := r.Start.Page(); n/7%3 != 0 {
						if k := len(offer) - 1; k >= 0 && offer[k].Space == src.ID() && offer[k].Range.End == r.Start {
							offer[k].Range.End = r.End // more than a buffer holds
						} else {
							offer = append(offer, transport.Remote{Space: src.ID(), Range: r, Key: keys[src.ID()]})
						}
						pages++
					}
				}
			}
			offered, err := transport.NewRemotes(offer)
			if err != nil {
				t.Fatal(err)
			}
			var reads, left atomic.Int64
			left.Store(fails)
			connect := func(kind transport.Kind) {
				a, b := transporttest.NewPair(transport.LaneID{Kind: kind}, s.pool, nil)
				s.mu.Lock()
				s.lanes = append(s.lanes, b)
				s.mu.Unlock()
				s.wg.Go(func() { _ = s.server.Serve(context.Background(), b) })
				if err := s.fetch.Attach(&remoteLane{Lane: a, offered: offered, keys: keys, reads: &reads, fails: &left}); err != nil {
					t.Error(err)
				}
			}
			connect(transport.Urgent)
			connect(transport.Bulk)
			connect(transport.Bulk)
			s.fetch.Start(true)
			for i := range 50 {
				src := s.st.Sources()[0]
				s.fetch.Urgent(src.ID(), []page.Num{src.Addr((i * 37) % src.Len()).Page()})
			}
			lost := 0 // reads of one lane may fail together
			for resident := false; !resident; {
				select {
				case err := <-s.lost:
					if !errors.Is(err, transport.ErrPeer) && !errors.Is(err, transport.ErrClosed) {
						t.Errorf("a lane ended with %v", err)
					}
					lost++
					connect(transport.Bulk)
				case <-s.done:
					resident = true
				case <-time.After(20 * time.Second):
					t.Fatalf("%d pages missing, %d lanes", s.st.Missing(true), s.fetch.Lanes())
				}
			}
			if (lost > 0) != (fails > 0) || lost > int(fails) {
				t.Errorf("%d lanes were lost, %d reads failed", lost, fails)
			}
			for _, src := range s.st.Sources() {
				for i := range src.Len() {
					if s.place.placed[src.ID()][src.Addr(i).Page()] == 0 {
						t.Fatalf("page %d of space %d was not placed", i, src.ID())
					}
				}
			}
			if n := reads.Load(); fails == 0 && n < pages {
				t.Errorf("%d pages were read of %d that were offered", n, pages)
			}
			if n, m := s.st.Count(pagestore.OneSided), uint64(reads.Load()); n > m || fails == 0 && n != m {
				t.Errorf("%d pages count as read one-sided, %d were", n, m)
			}
			if n := s.read.pages.Load(); fails == 0 && n > 2300-pages+60 {
				t.Errorf("%d pages were asked for, %d were not offered", n, 2300-pages)
			}
		})
	}
}
