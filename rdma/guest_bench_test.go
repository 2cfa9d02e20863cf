package rdma

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// BenchmarkGuestLane sends payloads of 64 KiB, to be held against ib_read_bw and
// ib_write_bw of perftest in the same guest.
func BenchmarkGuestLane(b *testing.B) {
	testutil.Require(b, twoDevices)
	for _, lanes := range []int{1, 2} {
		b.Run(fmt.Sprintf("lanes=%d", lanes), func(b *testing.B) {
			const size = 64 << 10
			src, dst := newPool(b, 64, size), newPool(b, 64, size)
			from, to := open(b, farAddr), open(b, nearAddr)
			var xs, ys []*Lane
			for i := range lanes {
				id := bulkID
				id.Index = uint8(i)
				x, y := connected(b, id, Config{Device: from, Pool: src}, Config{Device: to, Pool: dst})
				xs, ys = append(xs, x), append(ys, y)
			}
			meta := make([]byte, 100)
			exchange := func(n int) {
				var wg sync.WaitGroup
				errs := make(chan error, 2*lanes)
				for i := range lanes {
					wg.Go(func() {
						for range n / lanes {
							if err := xs[i].Send(transport.Frame{Type: wire.TypePages, Meta: meta, Payload: src.Get(size, xs[i].done)}); err != nil {
								errs <- err
								return
							}
						}
					})
					wg.Go(func() {
						for range n / lanes {
							f, err := ys[i].Recv()
							if err != nil {
								errs <- err
								return
							}
							f.Payload.Release()
						}
					})
				}
				wg.Wait()
				close(errs)
				if err := errors.Join(<-errs); err != nil {
					b.Fatal(err)
				}
			}
			exchange(2 * lanes) // pools are registered at the first use
			b.SetBytes(size)
			b.ResetTimer()
			exchange((b.N + lanes - 1) / lanes * lanes)
			b.StopTimer()
			for i := range lanes {
				xs[i].Close()
				ys[i].Close()
			}
		})
	}
}

func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2].Nanoseconds()) / 1e3
}

// BenchmarkGuestReadRemote is the one-sided read of one page, after ib_read_lat,
// and of 64 KiB with many under way, after ib_read_bw.
func BenchmarkGuestReadRemote(b *testing.B) {
	testutil.Require(b, twoDevices)
	for _, c := range []struct{ size, depth int }{{4 << 10, 1}, {64 << 10, 16}} {
		b.Run(fmt.Sprintf("bytes=%d/depth=%d", c.size, c.depth), func(b *testing.B) {
			x, y, pool := pair(b, transport.LaneID{Migration: bulkID.Migration, Epoch: 1, Kind: transport.Urgent})
			_, r := region(b, y.dev, 1<<20)
			var times []time.Duration // of one reader, for the median: where others share the machine a mean says little
			read := func(n int) {
				buf := pool.Get(c.size, nil)
				defer buf.Release()
				for i := range n {
					begin := time.Now()
					if err := x.ReadRemote(b.Context(), r.Key(), r.Address()+uint64(i%16*(64<<10)), buf); err != nil {
						b.Error(err)
						return
					}
					if c.depth == 1 {
						times = append(times, time.Since(begin))
					}
				}
			}
			read(1)
			times = times[:0]
			b.SetBytes(int64(c.size))
			b.ResetTimer()
			var wg sync.WaitGroup
			for range c.depth {
				wg.Go(func() { read((b.N + c.depth - 1) / c.depth) })
			}
			wg.Wait()
			b.StopTimer()
			if len(times) > 0 {
				b.ReportMetric(median(times), "p50-us")
			}
		})
	}
}

// BenchmarkGuestFault is a request and an answer of one page on the urgent lane:
// what a demand fault waits for without the one-sided read.
func BenchmarkGuestFault(b *testing.B) {
	testutil.Require(b, twoDevices)
	x, y, _ := pair(b, transport.LaneID{Migration: bulkID.Migration, Epoch: 1, Kind: transport.Urgent})
	answers := make(chan error, 1)
	go func() {
		for {
			f, err := y.Recv()
			if err != nil {
				answers <- nil
				return
			}
			if err := y.Send(transport.Frame{Type: wire.TypePages, Meta: f.Meta, Payload: y.cfg.Pool.Get(4096, nil)}); err != nil {
				answers <- err
				return
			}
		}
	}()
	meta := make([]byte, 32)
	var times []time.Duration
	for b.Loop() {
		begin := time.Now()
		if err := x.Send(transport.Frame{Type: wire.TypeWant, Meta: meta}); err != nil {
			b.Fatal(err)
		}
		f, err := x.Recv()
		if err != nil {
			b.Fatal(err)
		}
		f.Payload.Release()
		times = append(times, time.Since(begin))
	}
	b.ReportMetric(median(times), "p50-us")
	x.Close()
	if err := <-answers; err != nil {
		b.Error(err)
	}
}
