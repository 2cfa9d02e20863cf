package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
)

const file = page.FirstFileSpace + 3

// read reads, and checks what it got.
func (s *setup) readPages(ctx context.Context, space page.Space, first page.Num, pages int, prio page.Priority) error {
	buf := bytes.Repeat([]byte{0xa5}, pages<<page.Shift)
	if err := s.fetch.Source(space).ReadPages(ctx, first, buf, prio); err != nil {
		return err
	}
	want := make([]byte, page.Size)
	for i := range pages {
		content(space, first+page.Num(i), want)
		if !bytes.Equal(buf[i<<page.Shift:(i+1)<<page.Shift], want) {
			s.t.Errorf("page %d of space %d, priority %d, has wrong bytes", int(first)+i, space, prio)
		}
	}
	return nil
}

// gate holds up what is read of file at the source until it is opened.
func (s *setup) gate() (open func()) {
	gate := make(chan struct{})
	s.read.hook = func(sp page.Space, _ []page.Range) error {
		if sp == file {
			<-gate
		}
		return nil
	}
	open = sync.OnceFunc(func() { close(gate) })
	s.t.Cleanup(open)
	return open
}

// asked waits until n reads have something under way.
func (s *setup) asked(n int) {
	s.t.Helper()
	testutil.Eventually(s.t, 10*time.Second, func() error {
		s.fetch.mu.Lock()
		defer s.fetch.mu.Unlock()
		reads := map[*read]bool{}
		for _, l := range s.fetch.lanes {
			for _, r := range l.reqs {
				if r.read != nil {
					reads[r.read] = true
				}
			}
		}
		if len(reads) < n {
			return fmt.Errorf("%d reads are under way", len(reads))
		}
		return nil
	})
}

// within is what comes of a read that is to end by now.
func within(t *testing.T, c <-chan error) error {
	t.Helper()
	select {
	case err := <-c:
		return err
	case <-time.After(20 * time.Second):
		t.Fatal("the read does not end")
		return nil
	}
}

func start(f func() error) <-chan error {
	c := make(chan error, 1)
	go func() { c <- f() }()
	return c
}

// TestRead: many reads at once, beside the stream, before and after it, get what is
// there, and the store knows nothing of it.
func TestRead(t *testing.T) {
	for _, mode := range []codec.Mode{codec.Never, codec.Always} {
		for _, local := range []bool{false, true} {
			t.Run(fmt.Sprint(mode, ", from a file: ", local), func(t *testing.T) {
				seed := rand.Uint64()
				t.Logf("seed %d", seed)
				s := newSetup(t, []int{700}, func(*FetcherConfig) {})
				s.server.compress = newCompression(mode)
				for i, kind := range []transport.Kind{transport.Urgent, transport.Bulk, transport.Bulk} {
					if !local {
						s.connect(kind)
					} else if err := s.fetch.Attach(NewLocalLane(transport.LaneID{Kind: kind, Index: uint8(i)}, s.read, s.pool)); err != nil {
						t.Fatal(err)
					}
				}
				reads := func() {
					var wg sync.WaitGroup
					for i := range 40 {
						rnd := rand.New(rand.NewPCG(seed, uint64(i)))
						wg.Go(func() {
							pages := 1 + rnd.IntN(1<<rnd.IntN(9))
							err := s.readPages(t.Context(), []page.Space{0, file}[i%2], page.Num(rnd.IntN(5000)), pages, page.Priority(i%3))
							if err != nil {
								t.Error(err)
							}
						})
					}
					wg.Wait()
				}
				reads()
				if n := s.st.Missing(true); n != 700 {
					t.Fatalf("%d of 700 pages are missing after they were only read", n)
				}
				s.fetch.Start(true)
				reads()
				s.wait()
				s.once()
				reads()
			})
		}
	}
}

// TestReadBounds: what no lane may be asked for is not asked for.
func TestReadBounds(t *testing.T) {
	s := newSetup(t, []int{1}, func(*FetcherConfig) {})
	s.connect(transport.Bulk)
	for _, c := range []struct {
		first page.Num
		bytes int
	}{{0, 0}, {0, 17}, {1 << 52, page.Size}, {1<<52 - 1, page.Size}, {^page.Num(0), 2 * page.Size}} {
		if err := s.fetch.Read(t.Context(), file, c.first, make([]byte, c.bytes), page.Reader); err == nil {
			t.Errorf("%d bytes from page %#x were read", c.bytes, uint64(c.first))
		}
	}
	if err := s.readPages(t.Context(), file, 1<<52-3, 2, page.Reader); err != nil {
		t.Errorf("the last pages: %v: %v", err, <-s.lost)
	}
	if n := s.fetch.Lanes(); n != 1 {
		t.Errorf("%d lanes are left", n)
	}
}

// TestReaderBeforeBackground: before a read there is no more of the background than
// was asked for by then.
func TestReaderBeforeBackground(t *testing.T) {
	s := newSetup(t, []int{4000}, func(*FetcherConfig) {})
	var background, before atomic.Int64
	s.read.hook = func(sp page.Space, rs []page.Range) error {
		if sp == file {
			before.CompareAndSwap(-1, background.Load())
		}
		for _, r := range rs {
			background.Add(int64(r.Pages()))
		}
		time.Sleep(200 * time.Microsecond)
		return nil
	}
	s.connect(transport.Bulk)
	s.fetch.Start(true)
	for i := range 5 {
		before.Store(-1)
		was := background.Load()
		if err := s.readPages(t.Context(), file, page.Num(i), 1, page.Reader); err != nil {
			t.Fatal(err)
		}
		window := int64(s.fetch.cfg.Window+s.fetch.cfg.Chunk) >> page.Shift
		if n := before.Load() - was; n > window+8 {
			t.Errorf("%d pages of the background went before read %d, the window has %d", n, i, window)
		}
	}
	if s.st.Missing(true) == 0 {
		t.Error("the background had ended before: nothing was tested")
	}
	s.wait()
}

// TestFaultBeforeReader: neither a fault nor a demand waits for what people read.
func TestFaultBeforeReader(t *testing.T) {
	s := newSetup(t, []int{900}, func(*FetcherConfig) {})
	open := s.gate()
	s.connect(transport.Urgent)
	s.connect(transport.Bulk)
	var reads []<-chan error
	for i := range 20 {
		reads = append(reads, start(func() error { return s.readPages(t.Context(), file, page.Num(i*100), 60, page.Reader) }))
	}
	s.asked(1)
	src := s.st.Source(0)
	s.fetch.Urgent(0, []page.Num{src.Addr(1).Page()})
	testutil.Eventually(t, 10*time.Second, func() error {
		if src.Wanted(1) {
			return errors.New("the fault waits")
		}
		return nil
	})
	if err := within(t, start(func() error { return s.readPages(t.Context(), 0, 7, 30, page.Demand) })); err != nil {
		t.Error(err)
	}
	open()
	for _, c := range reads {
		if err := within(t, c); err != nil {
			t.Error(err)
		}
	}
}

// TestLittleBeforeMuch: who reads a page does not wait for another's megabytes.
func TestLittleBeforeMuch(t *testing.T) {
	for _, prio := range []page.Priority{page.Reader, page.Demand} {
		s := newSetup(t, []int{1}, func(*FetcherConfig) {})
		s.read.delay.Store(int64(2 * time.Millisecond)) // 128 times for the one, once for the other
		s.connect(transport.Urgent)
		s.connect(transport.Bulk)
		much := start(func() error { return s.readPages(t.Context(), file, 5, 1024, prio) })
		s.asked(1)
		if err := s.readPages(t.Context(), file, 77777, 1, prio); err != nil {
			t.Error(err)
		}
		select {
		case <-much:
			t.Errorf("priority %d: one page was here after 4 MiB that were asked for before it", prio)
		default:
			if err := within(t, much); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestReadsHoldUpNothing: people who read all the time do not keep the stream from
// its end, nor from being begun anew where its order left something out.
func TestReadsHoldUpNothing(t *testing.T) {
	half := true
	s := newSetup(t, []int{2000}, func(c *FetcherConfig) {
		c.Order = func(st *pagestore.Store) Next {
			n := 2000
			if half {
				half, n = false, 1000
			}
			return parts(st, func(*pagestore.Source) []pagestore.Span { return []pagestore.Span{{First: 0, End: n}} })
		}
	})
	s.read.delay.Store(int64(100 * time.Microsecond))
	s.connect(transport.Bulk)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			buf := make([]byte, 64<<page.Shift)
			for n := page.Num(0); ctx.Err() == nil; n += 64 {
				if err := s.fetch.Read(ctx, file, n, buf, page.Reader); err != nil && ctx.Err() == nil {
					t.Error(err)
				}
			}
		})
	}
	s.asked(1)
	s.fetch.Start(true)
	s.wait()
	cancel()
	wg.Wait()
	s.once()
}

// TestReadCancelled: who gives up gets their buffer back at once, and for good.
func TestReadCancelled(t *testing.T) {
	for _, prio := range []page.Priority{page.Reader, page.Demand} {
		s := newSetup(t, []int{1}, func(*FetcherConfig) {})
		open := s.gate()
		s.connect(transport.Urgent)
		s.connect(transport.Bulk)
		ctx, cancel := context.WithCancelCause(t.Context())
		buf := make([]byte, 40<<page.Shift)
		c := start(func() error { return s.fetch.Read(ctx, file, 1, buf, prio) })
		s.asked(1)
		enough := errors.New("enough")
		cancel(enough)
		if err := within(t, c); !errors.Is(err, enough) {
			t.Errorf("a read that was cancelled: %v", err)
		}
		mine := bytes.Repeat([]byte{0x5a}, len(buf))
		copy(buf, mine)
		open()
		if err := s.readPages(t.Context(), file, 2, 3, prio); err != nil { // behind it on the same lane
			t.Error(err)
		}
		if !bytes.Equal(buf, mine) {
			t.Error("the buffer was written to after the read was given up")
		}
		s.fetch.mu.Lock()
		if n := len(s.fetch.reads.bulk) + len(s.fetch.reads.urgent); n != 0 {
			t.Errorf("%d reads are queued", n)
		}
		s.fetch.mu.Unlock()
	}
}

// TestReadLosesLane: a demand outlives its lanes, and what people read does not.
func TestReadLosesLane(t *testing.T) {
	s := newSetup(t, []int{1}, func(*FetcherConfig) {})
	if err := within(t, start(func() error { return s.readPages(t.Context(), file, 1, 1, page.Reader) })); !errors.Is(err, ErrNoLanes) {
		t.Errorf("a read without lanes: %v", err)
	}
	demand := start(func() error { return s.readPages(t.Context(), file, 1, 50, page.Demand) })
	other := start(func() error { return s.readPages(t.Context(), file, 9, 1, page.Demand) })
	open := s.gate()
	s.connect(transport.Urgent)
	s.connect(transport.Bulk)
	var readers []<-chan error
	for i := range 10 { // more than fit into the window
		readers = append(readers, start(func() error { return s.readPages(t.Context(), file, page.Num(i), 10, page.Reader) }))
	}
	s.asked(2) // one on each lane
	open()     // the server may be in the middle of it
	s.fetch.DropLanes()
	lost := 0
	for _, c := range readers {
		if err := within(t, c); errors.Is(err, ErrNoLanes) {
			lost++
		} else if err != nil {
			t.Errorf("a read that lost its lane: %v", err)
		}
	}
	if lost == 0 {
		t.Error("no read lost its lane")
	}
	s.connect(transport.Urgent)
	s.cut(2)
	s.connect(transport.Bulk)
	s.connect(transport.Urgent)
	for _, c := range []<-chan error{demand, other} {
		if err := within(t, c); err != nil {
			t.Errorf("a demand that lost its lanes: %v", err)
		}
	}
}

// TestReadAtClose: no read outlives the fetcher.
func TestReadAtClose(t *testing.T) {
	s := newSetup(t, []int{1}, func(*FetcherConfig) {})
	open := s.gate()
	s.connect(transport.Bulk)
	c := []<-chan error{
		start(func() error { return s.readPages(t.Context(), file, 1, 5, page.Demand) }),
		start(func() error { return s.readPages(t.Context(), file, 1, 5, page.Reader) }),
	}
	s.asked(1)
	s.fetch.Close()
	for _, c := range append(c, start(func() error { return s.readPages(t.Context(), file, 1, 5, page.Demand) })) {
		if err := within(t, c); !errors.Is(err, transport.ErrClosed) {
			t.Errorf("a read when the fetcher was closed: %v", err)
		}
	}
	open()
}

// TestReadRefused: what the source refuses to a reader is that reader's matter.
func TestReadRefused(t *testing.T) {
	s := newSetup(t, []int{900}, func(*FetcherConfig) {})
	s.read.hook = func(sp page.Space, _ []page.Range) error {
		switch sp {
		case file:
			return errors.New("input/output error")
		case file + 1:
			return fmt.Errorf("it was killed: %w", ErrGone)
		}
		return nil
	}
	s.connect(transport.Urgent)
	s.connect(transport.Bulk)
	for _, prio := range []page.Priority{page.Reader, page.Demand} {
		if err := within(t, start(func() error { return s.readPages(t.Context(), file, 1, 100, prio) })); !errors.Is(err, ErrRefused) || errors.Is(err, ErrGone) {
			t.Errorf("refused with %v", err)
		}
		if err := within(t, start(func() error { return s.readPages(t.Context(), file+1, 1, 100, prio) })); !errors.Is(err, ErrRefused) || !errors.Is(err, ErrGone) {
			t.Errorf("refused with %v", err)
		}
		if err := within(t, start(func() error { return s.readPages(t.Context(), file+2, 1, 100, prio) })); err != nil {
			t.Error(err)
		}
	}
	if n := s.fetch.Lanes(); n != 2 {
		t.Errorf("%d lanes are left", n)
	}
	s.fetch.Start(true)
	s.wait()
	s.once()
	for _, l := range s.fetch.lanes {
		if l.owed.Load() != 0 || l.reading.Load() != 0 {
			t.Errorf("a lane owes %d bytes, %d of them to readers, after all has come", l.owed.Load(), l.reading.Load())
		}
	}
}

// TestReadDamaged: wrong bytes reach no reader. A demand gets the right ones from
// the next lane.
func TestReadDamaged(t *testing.T) {
	for _, kind := range []transport.Kind{transport.Urgent, transport.Bulk} {
		s := newSetup(t, []int{1}, func(*FetcherConfig) {})
		a, b := transporttest.NewPair(transport.LaneID{Kind: kind}, s.pool, nil)
		s.lanes = append(s.lanes, b)
		s.wg.Go(func() { _ = s.server.Serve(context.Background(), b) })
		l := &liar{Lane: a, change: func(f *transport.Frame) bool {
			f.Payload.Bytes()[5*page.Size] ^= 1
			return true
		}}
		l.lies.Store(1)
		if err := s.fetch.Attach(l); err != nil {
			t.Fatal(err)
		}
		prio := page.Reader
		if kind == transport.Urgent {
			prio = page.Demand
		}
		c := start(func() error { return s.readPages(t.Context(), file, 1, 100, prio) })
		if err := <-s.lost; !errors.Is(err, transport.ErrDamaged) {
			t.Errorf("the lane was lost with %v", err)
		}
		s.connect(kind)
		if err := within(t, c); kind == transport.Urgent && err != nil || kind == transport.Bulk && !errors.Is(err, ErrNoLanes) {
			t.Errorf("damage on the %v lane: %v", kind, err)
		}
	}
}

// TestReadInRound: nothing that is read in a round becomes part of it, and the
// memory of a process that runs cannot be read.
func TestReadInRound(t *testing.T) {
	s := newSetup(t, nil, func(*FetcherConfig) {})
	s.server.compress = newCompression(codec.Always)
	all := page.NewSet(page.Range{Start: base, End: base + 2000*page.Size})
	s.server.Round(1, true, &all, new(page.Set))
	s.connect(transport.Bulk)
	s.read.delay.Store(int64(time.Millisecond))
	r := s.round(2000)
	round := start(func() error { return s.fetch.Round(t.Context(), r) })
	testutil.Eventually(t, 10*time.Second, func() error {
		if r.Store.Missing(true) == 2000 {
			return errors.New("it has not begun")
		}
		return nil
	})
	for range 3 { // the same pages: as deltas, or as equal to those before, nobody could decode them
		if err := s.readPages(t.Context(), file, 1, 20, page.Reader); err != nil {
			t.Error(err)
		}
	}
	if err := s.readPages(t.Context(), 0, base.Page(), 1, page.Reader); !errors.Is(err, errRound) {
		t.Errorf("memory was read in a round: %v", err)
	}
	if r.Store.Missing(true) == 0 {
		t.Error("the round had ended before: nothing was tested")
	}
	if err := within(t, round); err != nil {
		t.Error(err)
	}
}

// TestReadRandom throws reads at lanes that come and go, damaged ones among them.
func TestReadRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	s := newSetup(t, []int{3000}, func(*FetcherConfig) {})
	s.read.delay.Store(int64(100 * time.Microsecond))
	s.fetch.Start(true)
	end := time.Now().Add(1500 * time.Millisecond)
	var wg sync.WaitGroup
	var good [3]atomic.Int64
	for i := range 12 {
		rnd := rand.New(rand.NewPCG(seed, uint64(i)))
		wg.Go(func() {
			for time.Now().Before(end) {
				prio := page.Priority(i % 3)
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rnd.IntN(40))*time.Millisecond)
				err := s.readPages(ctx, file, page.Num(rnd.IntN(10000)), 1+rnd.IntN(40), prio)
				cancel()
				switch {
				case err == nil:
					good[prio].Add(1)
				case errors.Is(err, context.DeadlineExceeded):
				case prio != page.Demand && errors.Is(err, ErrNoLanes):
					time.Sleep(time.Millisecond)
				default:
					t.Error(err)
				}
			}
		})
	}
	rnd := rand.New(rand.NewPCG(seed, 1<<32))
	for time.Now().Before(end) {
		switch rnd.IntN(8) {
		case 0:
			s.fetch.DropLanes()
		case 1:
			s.mu.Lock()
			n := len(s.lanes)
			s.mu.Unlock()
			if n > 0 {
				s.cut(rnd.IntN(n))
			}
		case 2:
			a, b := transporttest.NewPair(transport.LaneID{Kind: transport.Bulk}, s.pool, nil)
			s.mu.Lock()
			s.lanes = append(s.lanes, b)
			s.mu.Unlock()
			s.wg.Go(func() { _ = s.server.Serve(context.Background(), b) })
			l := &liar{Lane: a, change: func(f *transport.Frame) bool {
				if rnd := rand.IntN(3); rnd == 0 && f.Payload != nil {
					f.Payload.Bytes()[0] ^= 1
					return true
				}
				return false
			}}
			l.lies.Store(1)
			if err := s.fetch.Attach(l); err != nil {
				t.Error(err)
			}
		default:
			if s.fetch.Lanes() < 4 {
				s.connect([]transport.Kind{transport.Urgent, transport.Bulk}[rnd.IntN(2)])
			}
		}
		time.Sleep(time.Duration(rnd.IntN(10)) * time.Millisecond)
	}
	wg.Wait()
	for prio := range good {
		if good[prio].Load() == 0 {
			t.Errorf("nothing was read at priority %d", prio)
		}
	}
	s.connect(transport.Bulk)
	s.wait()
	s.once()
}
