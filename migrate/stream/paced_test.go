package stream

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/pace"
	"github.com/pageferry/pageferry/transport/transporttest"
	"github.com/pageferry/pageferry/wire"
)

// meter is what the source's lanes sent, and when.
type meter struct {
	mu    sync.Mutex
	at    []time.Time
	bytes []int
}

// most is the most bytes within any second.
func (m *meter) most() (most int) {
	first, sum := 0, 0
	for i, n := range m.bytes {
		for sum += n; m.at[i].Sub(m.at[first]) > time.Second; first++ {
			sum -= m.bytes[first]
		}
		most = max(most, sum)
	}
	return most
}

// metered is a lane of the source on a network that makes twice of every byte.
type metered struct {
	transport.Lane
	m *meter
}

func (l metered) OnWire(n int) int { return 2 * n }

func (l metered) Send(fs ...transport.Frame) error {
	l.m.mu.Lock()
	for _, f := range fs {
		n := wire.HeaderSize + len(f.Meta)
		if f.Payload != nil {
			n += f.Payload.Len()
		}
		l.m.at, l.m.bytes = append(l.m.at, time.Now()), append(l.m.bytes, 2*n)
	}
	l.m.mu.Unlock()
	return l.Lane.Send(fs...)
}

func (s *setup) connectMetered(kind transport.Kind, m *meter) {
	a, b := transporttest.NewPair(transport.LaneID{Kind: kind}, s.pool, nil)
	s.lanes = append(s.lanes, b)
	s.wg.Go(func() { _ = s.server.Serve(context.Background(), metered{b, m}) })
	if err := s.fetch.Attach(a); err != nil {
		s.t.Error(err)
	}
}

// TestLimit: all bulk lanes together keep to the limit in every second, and use
// it.
func TestLimit(t *testing.T) {
	for _, limit := range []uint64{1 << 20, 16 << 20, 400 << 20} {
		for _, lanes := range []int{1, 3} {
			t.Run(fmt.Sprint(limit>>20, " MiB/s, ", lanes, " lanes"), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					pages := int(min(6*limit>>page.Shift, 40000))
					s := newSetup(t, []int{pages}, func(*FetcherConfig) {})
					l, err := pace.New(pace.Config{BytesPerSecond: limit})
					if err != nil {
						t.Fatal(err)
					}
					s.server.cfg.Limiter = l
					var m meter
					for range lanes {
						s.connectMetered(transport.Bulk, &m)
					}
					begin := time.Now()
					s.fetch.Start(true)
					s.wait()
					s.once()
					took := time.Since(begin)
					sum := 0
					for _, n := range m.bytes {
						sum += n
					}
					if most := float64(m.most()) / float64(limit); most > 1.05 {
						t.Errorf("%.3f of the limit in one second", most)
					}
					// The burst of the beginning is on top.
					if got := float64(sum) / took.Seconds() / float64(limit); got < 0.99 || got > 1.03+0.02/took.Seconds() {
						t.Errorf("%.3f of the limit in %v", got, took)
					}
				})
			})
		}
	}
}

// TestLimitAndFaults: a fault waits for no bulk frame.
func TestLimitAndFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 1 << 20
		s := newSetup(t, []int{1000}, func(*FetcherConfig) {})
		l, err := pace.New(pace.Config{BytesPerSecond: limit})
		if err != nil {
			t.Fatal(err)
		}
		s.server.cfg.Limiter = l
		var m meter
		s.connectMetered(transport.Bulk, &m)
		s.connectMetered(transport.Bulk, &m)
		s.connectMetered(transport.Urgent, &m)
		s.fetch.Start(true)
		src := s.st.Source(0)
		for i := 996; src.Wanted(i); i -= 5 {
			time.Sleep(60 * time.Millisecond) // an eighth of the limit
			asked := time.Now()
			s.fetch.Urgent(0, []page.Num{src.Addr(i).Page()})
			for src.Wanted(i) && time.Since(asked) < time.Second {
				time.Sleep(10 * time.Microsecond)
			}
			if d := time.Since(asked); d > 100*time.Microsecond {
				t.Fatalf("page %d came after %v", i, d)
			}
		}
		s.wait()
		if most := float64(m.most()) / limit; most > 1.05 {
			t.Errorf("%.3f of the limit in one second", most)
		}
	})
}

// TestLimitEnds: a lane that waits for its turn ends with its migration, and
// keeps no buffer.
func TestLimitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSetup(t, []int{2000}, func(*FetcherConfig) {})
		l, err := pace.New(pace.Config{BytesPerSecond: pace.Min})
		if err != nil {
			t.Fatal(err)
		}
		s.server.cfg.Limiter = l
		a, b := transporttest.NewPair(transport.LaneID{Kind: transport.Bulk}, s.pool, nil)
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.server.Serve(ctx, b) }()
		if err := s.fetch.Attach(a); err != nil {
			t.Fatal(err)
		}
		s.fetch.Start(true)
		time.Sleep(time.Second)
		begin := time.Now()
		cancel()
		if err := <-ended; err != nil || time.Since(begin) != 0 {
			t.Errorf("%v after the end: %v", time.Since(begin), err)
		}
		if n := s.server.pool.Outstanding(); n != 0 {
			t.Errorf("%d buffers are out", n)
		}
	})
}
