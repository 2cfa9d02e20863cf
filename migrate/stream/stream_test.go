package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
	"github.com/pageferry/pageferry/wire"
)

func TestMain(m *testing.M) { testutil.Main(m) }

const base = page.Addr(0x10000000)

// content is what page n of space s holds at the source; every fifth is zero.
func content(s page.Space, n page.Num, b []byte) {
	clear(b)
	if n%5 == 0 {
		return
	}
	for i := 0; i < len(b); i += 64 {
		binary.LittleEndian.PutUint64(b[i:], uint64(n)*0x9e3779b97f4a7c15+uint64(s)+uint64(i))
	}
}

type reader struct {
	delay atomic.Int64
	fail  atomic.Pointer[error]
	pages atomic.Int64
	hook  func(page.Space, []page.Range) error // before anything is read; may be nil
}

func (r *reader) ReadPages(s page.Space, rs []page.Range, buf []byte) error {
	if err := r.fail.Load(); err != nil {
		return *err
	}
	if r.hook != nil {
		if err := r.hook(s, rs); err != nil {
			return err
		}
	}
	time.Sleep(time.Duration(r.delay.Load()))
	for _, x := range rs {
		for n := x.Start.Page(); n < x.End.Page(); n++ {
			content(s, n, buf[:page.Size])
			buf = buf[page.Size:]
		}
		r.pages.Add(int64(x.Pages()))
	}
	if len(buf) != 0 {
		return errors.New("buffer and ranges differ")
	}
	return nil
}

// placer settles pages in the store and remembers how often, and with what.
type placer struct {
	t  *testing.T
	st *pagestore.Store

	mu     sync.Mutex
	placed map[page.Space]map[page.Num]int
	failed int // refuses so many calls more
}

func (p *placer) put(s page.Space, r page.Range, check func(n page.Num) error) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failed > 0 {
		p.failed--
		return 0, errors.New("no memory")
	}
	src := p.st.Source(s)
	placed := 0
	for _, sp := range src.Spaces() {
		sp.RLock()
		for _, tg := range sp.Targets(r, nil) {
			for i := range tg.Dst.Pages() {
				n := src.Addr(tg.First + i).Page()
				if err := check(n); err != nil {
					p.t.Error(err)
				}
				if p.placed[s] == nil {
					p.placed[s] = map[page.Num]int{}
				}
				p.placed[s][n]++
			}
			placed += sp.Settle(tg.First, tg.First+tg.Dst.Pages())
		}
		sp.RUnlock()
	}
	return placed, nil
}

func (p *placer) Place(s page.Space, r page.Range, data []byte) (int, error) {
	return p.put(s, r, func(n page.Num) error {
		want := make([]byte, page.Size)
		content(s, n, want)
		off := int(n-r.Start.Page()) << page.Shift
		if !bytes.Equal(data[off:off+page.Size], want) {
			return fmt.Errorf("page %d of space %d has wrong bytes", n, s)
		}
		return nil
	})
}

func (p *placer) Zero(s page.Space, r page.Range) (int, error) {
	return p.put(s, r, func(n page.Num) error {
		if n%5 != 0 {
			return fmt.Errorf("page %d of space %d is not zero", n, s)
		}
		return nil
	})
}

func (p *placer) Absent(s page.Space, r page.Range) (int, error) {
	return p.put(s, r, func(n page.Num) error { return fmt.Errorf("page %d is not absent", n) })
}

// bench is a source and a destination connected in memory.
type setup struct {
	t      *testing.T
	st     *pagestore.Store
	read   *reader
	place  *placer
	server *Server
	fetch  *Fetcher
	pool   *transport.Pool
	lost   chan error
	done   chan struct{}
	wg     sync.WaitGroup

	mu    sync.Mutex
	lanes []transport.Lane // the source's ends
}

// newSetup makes spaces of the given pages, each in runs with holes between.
func newSetup(t *testing.T, pages []int, change func(*FetcherConfig)) *setup {
	testutil.NoLeaks(t)
	st, err := pagestore.Create("test-store")
	if err != nil {
		t.Fatal(err)
	}
	s := &setup{t: t, st: st, read: new(reader), lost: make(chan error, 1000), done: make(chan struct{}, 100)}
	s.place = &placer{t: t, st: st, placed: map[page.Space]map[page.Num]int{}}
	for id, n := range pages {
		var lazy page.Set
		at := base
		for k := 0; n > 0; k++ {
			run := min(n, 1+k*7%40)
			lazy.Add(page.Range{Start: at, End: at + page.Addr(run)*page.Size})
			at += page.Addr(run+1+k%3) * page.Size
			n -= run
		}
		src, err := st.AddSource(page.Space(id), lazy, page.Set{}, page.Set{})
		if err != nil {
			t.Fatal(err)
		}
		seg := pagestore.Segment{Dst: page.Range{Start: base, End: at}, Src: base}
		if _, err := st.AddSpace(src, 1, -1, -1, []pagestore.Segment{seg}); err != nil {
			t.Fatal(err)
		}
	}
	if s.server, err = NewServer(ServerConfig{Reader: s.read, BufferSize: 64 << 10}); err != nil {
		t.Fatal(err)
	}
	if s.pool, err = transport.NewPool(8, 64<<10); err != nil {
		t.Fatal(err)
	}
	cfg := FetcherConfig{
		Store: st, Placer: s.place, Chunk: 32 << 10, Window: 64 << 10,
		OnLost:     func(_ transport.LaneID, err error) { s.lost <- err },
		OnResident: func() { s.done <- struct{}{} },
	}
	change(&cfg)
	s.fetch = NewFetcher(cfg)
	t.Cleanup(func() {
		s.fetch.Close()
		s.cut(-1)
		s.wg.Wait()
		for _, err := range []error{s.server.Close(), s.pool.Close(), st.Close()} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	return s
}

func (s *setup) connect(kind transport.Kind) {
	a, b := transporttest.NewPair(transport.LaneID{Kind: kind}, s.pool, nil)
	s.mu.Lock()
	s.lanes = append(s.lanes, b)
	s.mu.Unlock()
	s.wg.Go(func() { _ = s.server.Serve(context.Background(), b) })
	if err := s.fetch.Attach(a); err != nil {
		s.t.Error(err)
	}
}

// cut ends lane number i, or all with -1.
func (s *setup) cut(i int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, l := range s.lanes {
		if i < 0 || k == i {
			l.Close()
		}
	}
}

func (s *setup) wait() {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(30 * time.Second):
		s.t.Fatalf("not resident: %d pages missing, %d lanes", s.st.Missing(true), s.fetch.Lanes())
	}
	if n := s.st.Missing(true); n != 0 {
		s.t.Fatalf("told to be resident with %d pages missing", n)
	}
}

// once checks that every page was placed exactly once.
func (s *setup) once() {
	s.t.Helper()
	for _, src := range s.st.Sources() {
		placed := s.place.placed[src.ID()]
		for i := range src.Len() {
			if n := placed[src.Addr(i).Page()]; n != 1 {
				s.t.Fatalf("page %d of space %d was placed %d times", i, src.ID(), n)
			}
		}
	}
}

func TestAllPagesOnce(t *testing.T) {
	for _, lanes := range []int{1, 3} {
		t.Run(fmt.Sprint(lanes, " lanes"), func(t *testing.T) {
			s := newSetup(t, []int{3000, 1, 517}, func(*FetcherConfig) {})
			for range lanes {
				s.connect(transport.Bulk)
			}
			s.fetch.Start(true)
			s.wait()
			s.once()
			if n := s.st.Count(pagestore.Doubles); n != 0 {
				t.Errorf("%d doubles without a fault", n)
			}
			if n := s.read.pages.Load(); n != 3518 {
				t.Errorf("%d pages were read for 3518", n)
			}
		})
	}
}

// TestRandom throws faults, dead lanes and failing placements at a stream.
func TestRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	for range 5 {
		sizes := []int{500 + rnd.IntN(1500), 1 + rnd.IntN(300)}
		waiting := map[page.Num]bool{}
		var mu sync.Mutex
		s := newSetup(t, sizes, func(c *FetcherConfig) {
			c.Chunk = page.Size << rnd.IntN(5)
			c.Window = c.Chunk * (1 + rnd.IntN(3))
			c.Waiting = func(f func(page.Space, page.Num)) {
				mu.Lock()
				var ns []page.Num
				for n := range waiting {
					ns = append(ns, n)
				}
				mu.Unlock()
				for _, n := range ns {
					f(0, n)
				}
			}
		})
		s.read.delay.Store(int64(rnd.IntN(500)) * 1000)
		s.connect(transport.Urgent)
		s.connect(transport.Bulk)
		s.connect(transport.Bulk)
		s.fetch.Start(true)
		src := s.st.Source(0)
		began := time.Now()
		for k := 0; s.st.Missing(true) > 0; k++ {
			switch rnd.IntN(12) {
			default:
				n := src.Addr(rnd.IntN(src.Len())).Page()
				if i, _ := src.Find(n.Addr()); !src.Wanted(i) {
					break
				}
				mu.Lock()
				waiting[n] = true
				mu.Unlock()
				s.fetch.Urgent(0, []page.Num{n})
			case 0:
				s.mu.Lock()
				i := rnd.IntN(len(s.lanes))
				s.mu.Unlock()
				s.cut(i)
			case 1:
				s.connect(transport.Bulk)
			case 2:
				s.connect(transport.Urgent)
			case 3:
				s.place.mu.Lock()
				s.place.failed = rnd.IntN(4)
				s.place.mu.Unlock()
			case 4: // the program gives up some pages
				sp := src.Spaces()[0]
				s.place.mu.Lock() // the order of locks is the placer's
				sp.Lock()
				at := src.Addr(rnd.IntN(src.Len()))
				c := sp.Begin()
				r := page.Range{Start: at, End: at + page.Addr(1+rnd.IntN(8))*page.Size}
				src.Each(r, func(p page.Range, i int) {
					for j := range p.Pages() {
						if sp.IsMissing(i + j) {
							m := s.place.placed
							if m[0] == nil {
								m[0] = map[page.Num]int{}
							}
							m[0][src.Addr(i+j).Page()]++
						}
					}
				})
				c.Drop(r, false)
				if err := c.Commit(0); err != nil {
					t.Error(err)
				}
				sp.Unlock()
				s.place.mu.Unlock()
			case 5:
				s.fetch.DropLanes()
				s.connect(transport.Urgent)
				s.connect(transport.Bulk)
			}
			if k%4 == 0 {
				time.Sleep(time.Millisecond)
			}
			if time.Since(began) > time.Minute {
				t.Fatalf("no end: %d pages missing", s.st.Missing(true))
			}
		}
		s.wait()
		s.once()
	}
}

// liar is a lane whose Pages frames are changed on the way.
type liar struct {
	transport.Lane
	change func(*transport.Frame) bool // false: pass it on
	lies   atomic.Int64
}

func (l *liar) Recv() (transport.Frame, error) {
	f, err := l.Lane.Recv()
	if err == nil && f.Type == wire.TypePages && l.lies.Load() > 0 && l.change(&f) {
		l.lies.Add(-1)
	}
	return f, err
}

// TestLies: whatever a lane brings that is not right, the lane is closed, and
// the pages come on another.
func TestLies(t *testing.T) {
	for name, change := range map[string]func(*transport.Frame) bool{
		"bit": func(f *transport.Frame) bool {
			if f.Payload == nil {
				return false
			}
			f.Payload.Bytes()[77] ^= 1
			return true
		},
		"id": func(f *transport.Frame) bool {
			f.Meta[0] ^= 0x80
			return true
		},
		"space": func(f *transport.Frame) bool { f.Meta[16] = 9; return true },
		"page":  func(f *transport.Frame) bool { f.Meta[24] ^= 1; return true },
		"short": func(f *transport.Frame) bool { f.Meta = f.Meta[:len(f.Meta)-1]; return true },
		"type":  func(f *transport.Frame) bool { f.Type = wire.TypeWant; return true },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSetup(t, []int{900}, func(*FetcherConfig) {})
			a, b := transporttest.NewPair(transport.LaneID{Kind: transport.Bulk}, s.pool, nil)
			s.lanes = append(s.lanes, b)
			s.wg.Go(func() { _ = s.server.Serve(context.Background(), b) })
			l := &liar{Lane: a, change: change}
			l.lies.Store(1)
			if err := s.fetch.Attach(l); err != nil {
				t.Fatal(err)
			}
			s.fetch.Start(true)
			select {
			case err := <-s.lost:
				if !errors.Is(err, transport.ErrDamaged) {
					t.Errorf("lane lost with %v", err)
				}
			case <-time.After(20 * time.Second):
				t.Fatal("nobody noticed")
			}
			s.connect(transport.Bulk)
			s.wait()
			s.once()
			if bad := s.st.Count(pagestore.Bad); name == "bit" && bad != 1 {
				t.Errorf("%d bad pages", bad)
			}
		})
	}
}

// TestStall: a lane that says nothing is given up, and meanwhile holds up no
// fault.
func TestStall(t *testing.T) {
	s := newSetup(t, []int{2000}, func(c *FetcherConfig) { c.StallTimeout = 300 * time.Millisecond })
	a, b := transporttest.NewPair(transport.LaneID{Kind: transport.Bulk}, s.pool, nil)
	s.lanes = append(s.lanes, b) // nobody serves it
	if err := s.fetch.Attach(a); err != nil {
		t.Fatal(err)
	}
	s.fetch.Start(true)
	s.connect(transport.Urgent)
	src := s.st.Source(0)
	began := time.Now()
	s.fetch.Urgent(0, []page.Num{src.Addr(1).Page()}) // asked for on the stalled lane
	testutil.Eventually(t, 10*time.Second, func() error {
		if src.Wanted(1) {
			return errors.New("the fault waits")
		}
		return nil
	})
	if d := time.Since(began); d > 250*time.Millisecond {
		t.Errorf("the fault took %v", d)
	}
	select {
	case err := <-s.lost:
		if !errors.Is(err, ErrStalled) {
			t.Errorf("lost with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the stalled lane was not given up")
	}
	s.connect(transport.Bulk)
	s.wait()
	s.once()
}

// TestRefused: the source's reason reaches whoever is told of the lane.
func TestRefused(t *testing.T) {
	s := newSetup(t, []int{100}, func(*FetcherConfig) {})
	err := fmt.Errorf("the process was killed: %w", ErrGone)
	s.read.fail.Store(&err)
	s.connect(transport.Bulk)
	s.fetch.Start(true)
	select {
	case err := <-s.lost:
		if !errors.Is(err, ErrGone) || !errors.Is(err, ErrRefused) {
			t.Errorf("lost with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told")
	}
	s.read.fail.Store(nil)
	s.connect(transport.Bulk)
	s.wait()
	s.once()
}

// TestLocalLane serves pages without a wire.
func TestLocalLane(t *testing.T) {
	s := newSetup(t, []int{1000}, func(*FetcherConfig) {})
	if err := s.fetch.Attach(NewLocalLane(transport.LaneID{Kind: transport.Bulk}, s.read, s.pool)); err != nil {
		t.Fatal(err)
	}
	s.fetch.Start(true)
	s.wait()
	s.once()
}

// TestBigWant: one request larger than a buffer is answered in several frames.
func TestBigWant(t *testing.T) {
	s := newSetup(t, []int{1}, func(*FetcherConfig) {})
	a, b := transporttest.NewPair(transport.LaneID{Kind: transport.Bulk}, s.pool, nil)
	s.lanes = append(s.lanes, b)
	s.wg.Go(func() { _ = s.server.Serve(context.Background(), b) })
	defer a.Close()
	want := wire.Want{ID: 7, Runs: []wire.Run{{Count: 50, First: 1}, {Count: 3, First: 100}, {Space: 1, Count: 2, First: 1}}}
	if err := a.Send(transport.Frame{Type: wire.TypeWant, Meta: wire.AppendWant(nil, want)}); err != nil {
		t.Fatal(err)
	}
	pages, last := 0, false
	for !last {
		f, err := a.Recv()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		if f.Payload != nil {
			n = f.Payload.Len()
		}
		var p wire.Pages
		if err := wire.ParsePages(f.Meta, n, &p); err != nil {
			t.Fatal(err)
		}
		for _, r := range p.Runs {
			pages += int(r.Count)
		}
		f.Payload.Release()
		last = f.Flags&wire.FlagLast != 0
	}
	if pages != 55 {
		t.Errorf("%d pages in the answer, want 55", pages)
	}
}
