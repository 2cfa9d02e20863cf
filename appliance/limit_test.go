package appliance

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance/journal"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/pace"
	"github.com/pageferry/pageferry/transport/tcp"
)

// TestLimitAsked: a migration's lanes have the limit and the number that were
// asked for, or else the configuration's, and its report says so.
func TestLimitAsked(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	c := hostConfig(t, "a")
	c.BulkLanes, c.Defaults.MaxBandwidth = 3, "1Gbit"
	a, b := startDaemon(t, c, newFakeEngine()), startDaemon(t, hostConfig(t, "b"), newFakeEngine())
	for i, x := range []struct {
		bandwidth string
		lanes     int
		want      Bandwidth
		wantLanes int
	}{{"", 0, 125e6, 3}, {"none", 0, 0, 3}, {"100MiB", 7, 100 << 20, 7}} {
		r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen, MaxBandwidth: x.bandwidth, Lanes: x.lanes})
		if err != nil {
			t.Fatal(err)
		}
		if got := finish(t, a, r.ID); got.Outcome != OutcomeDone || got.MaxBandwidth != x.want || got.Lanes != x.wantLanes {
			t.Errorf("%+v: %+v", x, got)
		}
		if o := a.engine.lanes[i]; o.Limiter.BytesPerSecond() != uint64(x.want) || o.BulkLanes != x.wantLanes {
			t.Errorf("%+v: the lanes were to be %+v", x, o)
		}
	}
	for _, r := range []MigrateRequest{{MaxBandwidth: "10G"}, {MaxBandwidth: "1bit"}, {Lanes: 17}, {Lanes: -1}} {
		r.PID, r.To = 4242, b.Config().Listen
		var api *APIError
		if _, err := a.client.Migrate(t.Context(), r); !errors.As(err, &api) || api.Kind != KindUsage {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

// TestLimitOfTheJournal: the next daemon goes on with what was asked of the one
// before, whatever its configuration says by now.
func TestLimitOfTheJournal(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	c := hostConfig(t, "a")
	c.BulkLanes, c.Defaults.MaxBandwidth = 3, "1Gbit"
	store, err := journal.Open(filepath.Join(c.StateDir, "journal"), journal.Options{})
	if err != nil {
		t.Fatal(err)
	}
	j, err := store.Create(migrate.Record{Migration: [16]byte{1}, State: "committed", Started: time.Now(), Role: migrate.RoleSource,
		Mode: migrate.ModePostCopy, SourcePID: 4242, PeerAddress: testutil.FreePort(t), PeerIncarnation: migrate.Incarnation{9},
		Hint: []byte("start 7" + hintLanes(SourceOptions{BulkLanes: 5, MaxBandwidth: 1 << 20}))})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(j.Close(), store.Close()); err != nil {
		t.Fatal(err)
	}
	e := newFakeEngine()
	d := startDaemon(t, c, e)
	testutil.Eventually(t, 10*time.Second, func() error {
		e.mu.Lock()
		defer e.mu.Unlock()
		if len(e.lanes) != 1 || e.lanes[0].BulkLanes != 5 || e.lanes[0].Limiter.BytesPerSecond() != 1<<20 {
			return fmt.Errorf("the lanes are to be %+v", e.lanes)
		}
		return nil
	})
	if _, r, err := d.registry.find("01"); err != nil || r.Lanes != 5 || r.MaxBandwidth != 1<<20 {
		t.Errorf("%+v, %v", r, err)
	}
}

// memory is a process that is only its pages, all of them alike and not zero.
type memory struct {
	othersProcess
	page []byte
}

func (m *memory) ReadPages(_ page.Space, _ []page.Range, buf []byte) error {
	for len(buf) > 0 {
		buf = buf[copy(buf, m.page):]
	}
	return nil
}

// settled takes every page and keeps none.
type settled struct{ st *pagestore.Store }

func (p settled) Place(s page.Space, r page.Range, _ []byte) (n int, err error) {
	src := p.st.Source(s)
	for _, sp := range src.Spaces() {
		sp.RLock()
		for _, tg := range sp.Targets(r, nil) {
			n += sp.Settle(tg.First, tg.First+tg.Dst.Pages())
		}
		sp.RUnlock()
	}
	return n, nil
}

func (p settled) Zero(s page.Space, r page.Range) (int, error)   { return p.Place(s, r, nil) }
func (p settled) Absent(s page.Space, r page.Range) (int, error) { return p.Place(s, r, nil) }

// limitRig is the source's lanes as the daemon makes them, and a fetcher, over
// loopback TCP.
type limitRig struct {
	lanes *lanes
	fetch *stream.Fetcher
	done  chan struct{}
	close func() error
}

func newLimitRig(tb testing.TB, bulk int, limit uint64, bytes uint64) *limitRig {
	tb.Helper()
	var closers []func() error
	r := &limitRig{done: make(chan struct{}, 8)}
	r.close = func() (err error) {
		for _, c := range closers {
			err = errors.Join(err, c())
		}
		closers = nil
		return err
	}
	tb.Cleanup(func() {
		if err := r.close(); err != nil {
			tb.Error(err)
		}
	})
	must := func(err error) {
		tb.Helper()
		if err != nil {
			tb.Fatal(err)
		}
	}
	st, err := pagestore.Create("limit")
	must(err)
	closers = append(closers, st.Close)
	const base = page.Addr(0x10000000)
	all := page.Range{Start: base, End: base + page.Addr(bytes)}
	src, err := st.AddSource(0, page.NewSet(all), page.Set{}, page.Set{})
	must(err)
	_, err = st.AddSpace(src, 1, -1, -1, []pagestore.Segment{{Dst: all, Src: base}})
	must(err)
	pool, err := transport.NewPool(2*(bulk+2), 256<<10)
	must(err)
	closers = append([]func() error{pool.Close}, closers...)
	r.fetch = stream.NewFetcher(stream.FetcherConfig{Store: st, Placer: settled{st}, OnResident: func() { r.done <- struct{}{} }})
	closers = append([]func() error{r.fetch.Close}, closers...)

	plain := tcp.Config{Insecure: true}
	ln, err := tcp.Listen("127.0.0.1:0", plain)
	must(err)
	closers = append([]func() error{ln.Close}, closers...)
	lo := LaneOptions{Address: ln.Addr().String(), BulkLanes: bulk, IdleSleep: true}
	if limit != 0 {
		lo.Limiter, err = pace.New(pace.Config{BytesPerSecond: limit})
		must(err)
	}
	l, err := native{}.NewLanes(lo)
	must(err)
	closers = append([]func() error{l.Close}, closers...)
	r.lanes = l.(*lanes)
	key := tcp.NewKey()
	accepted := make(chan error, 1)
	go func() {
		var err error
		for range bulk + 1 {
			in, e := ln.Accept(tb.Context())
			if e != nil {
				err = e
				break
			}
			plain.Pool = pool
			lane, e := tcp.AcceptLane(tb.Context(), in.Conn, in.ID, key, plain)
			if e == nil {
				e = r.fetch.Attach(lane)
			}
			err = errors.Join(err, e)
		}
		accepted <- err
	}()
	m := &memory{page: make([]byte, page.Size)}
	rand.Read(m.page)
	must(l.Open(context.Background(), 1, key, m))
	must(<-accepted)
	return r
}

// TestLimitHolds: over TCP, all lanes together stay below the limit in every
// span of up to a second, however busy the machine is: what was counted
// before a span and sent within it is at most a frame of each lane.
func TestLimitHolds(t *testing.T) {
	testutil.NoLeaks(t)
	const limit, bulk = 32 << 20, 4
	r := newLimitRig(t, bulk, limit, 64<<20)
	type sample struct {
		before, after time.Time
		bytes         uint64
	}
	var samples []sample
	r.fetch.Start(true)
	tick := time.NewTicker(4 * time.Millisecond)
	defer tick.Stop()
	for resident, last := false, false; !last; {
		last = resident
		s := sample{before: time.Now()}
		s.bytes = r.lanes.BytesSent()
		s.after = time.Now()
		samples = append(samples, s)
		select {
		case <-tick.C:
		case <-r.done:
			resident = true
		case <-time.After(time.Minute):
			t.Fatal("it does not end")
		}
	}
	if n := samples[len(samples)-1].bytes; n < 64<<20 {
		t.Fatalf("%d bytes were seen", n)
	}
	for i, from := range samples {
		for _, to := range samples[i+1:] {
			span := to.after.Sub(from.before)
			if span > time.Second {
				break
			}
			if n := float64(to.bytes - from.bytes); n > limit*(span.Seconds()+0.05) {
				t.Fatalf("%.0f bytes in %v at a limit of %d per second", n, span, limit)
			}
		}
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// BenchmarkLimit is which part of a limit is used, over loopback TCP with plain
// lanes.
func BenchmarkLimit(b *testing.B) {
	for _, c := range []struct {
		name  string
		limit uint64
		bytes uint64
	}{{"1MiB", 1 << 20, 3 << 20}, {"1Gbit", 125e6, 256 << 20}, {"10Gbit", 1250e6, 2 << 30}, {"none", 0, 2 << 30}} {
		for _, bulk := range []int{1, 2, 4} {
			b.Run(fmt.Sprintf("%s/lanes=%d", c.name, bulk), func(b *testing.B) {
				var took time.Duration
				var sent uint64
				for b.Loop() {
					r := newLimitRig(b, bulk, c.limit, c.bytes)
					before, begin := r.lanes.BytesSent(), time.Now()
					r.fetch.Start(true)
					<-r.done
					took += time.Since(begin)
					sent += r.lanes.BytesSent() - before
					if err := r.close(); err != nil {
						b.Fatal(err)
					}
				}
				rate := float64(sent) / took.Seconds()
				b.ReportMetric(0, "ns/op")
				b.ReportMetric(rate/(1<<30), "GiB/s")
				if c.limit != 0 {
					b.ReportMetric(rate/float64(c.limit), "of-limit")
				}
			})
		}
	}
}
