package pace

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// let is so many bytes that were let go.
type let struct {
	at    time.Time
	bytes int
}

// book is what went when.
type book struct {
	mu   sync.Mutex
	lets []let
}

func (b *book) add(bytes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lets = append(b.lets, let{time.Now(), bytes})
}

func (b *book) total() (n int) {
	for _, x := range b.lets {
		n += x.bytes
	}
	return n
}

// worst is the most that went within any span of d.
func worst(lets []let, d time.Duration) (most int) {
	slices.SortFunc(lets, func(a, b let) int { return a.at.Compare(b.at) })
	sum, first := 0, 0
	for _, x := range lets {
		sum += x.bytes
		for x.at.Sub(lets[first].at) > d {
			sum -= lets[first].bytes
			first++
		}
		most = max(most, sum)
	}
	return most
}

// flow lets frames of size pass until ctx ends, with a pause before each.
func flow(ctx context.Context, b *book, wait func(context.Context, int) error, size func() int, pause func() time.Duration) {
	for {
		time.Sleep(pause())
		n := size()
		if wait(ctx, n) != nil {
			return
		}
		b.add(n)
	}
}

func none() time.Duration { return 0 }

func always(n int) func() int { return func() int { return n } }

func newLimiter(t *testing.T, cfg Config) *Limiter {
	t.Helper()
	l, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

var limits = []uint64{Min, 1 << 20, 125e6, 1250e6, 6 << 30}

// TestAnySecond: whatever lanes do, no second has more than a twentieth too
// much, and lanes that always have something get all of it.
func TestAnySecond(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, limit := range limits {
		for _, lanes := range []int{1, 4} {
			for _, greedy := range []bool{true, false} {
				t.Run(fmt.Sprint(limit, "/s, ", lanes, " lanes, greedy ", greedy), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						l := newLimiter(t, Config{BytesPerSecond: limit})
						const span = 4 * time.Second
						ctx, cancel := context.WithTimeout(t.Context(), span)
						defer cancel()
						var b book
						var wg sync.WaitGroup
						for lane := range lanes {
							rnd := rand.New(rand.NewPCG(seed, uint64(lane)))
							top := l.MaxPayload(256 << 10)
							size := func() int { return 1 + top/2 + rnd.IntN(top/2) }
							pause := none
							if !greedy {
								pause = func() time.Duration {
									if rnd.IntN(200) == 0 {
										return 300 * time.Millisecond
									}
									return time.Duration(rnd.IntN(1000)) * time.Microsecond
								}
							}
							wg.Go(func() { flow(ctx, &b, l.Wait, size, pause) })
						}
						wg.Wait()
						if most := float64(worst(b.lets, time.Second)) / float64(limit); most > 1.05 {
							t.Errorf("%.3f of the limit in one second", most)
						}
						if got := float64(b.total()) / span.Seconds() / float64(limit); greedy && got < 0.99 {
							t.Errorf("%.3f of the limit were used", got)
						}
					})
				})
			}
		}
	}
}

// TestFaultsGoFirst: faults within their share never wait, and the stream makes
// up for them.
func TestFaultsGoFirst(t *testing.T) {
	for _, limit := range limits {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLimiter(t, Config{BytesPerSecond: limit})
				const span = 4 * time.Second
				fault := int(max(4200, limit/10000))
				ctx, cancel := context.WithTimeout(t.Context(), span)
				defer cancel()
				var bulk, faults book
				var wg sync.WaitGroup
				for range 2 {
					wg.Go(func() { flow(ctx, &bulk, l.Wait, always(l.MaxPayload(256<<10)), none) })
				}
				// A fifth of the limit.
				every := time.Duration(5 * uint64(fault) * 1e9 / limit)
				wg.Go(func() {
					for next := time.Now(); ctx.Err() == nil; time.Sleep(time.Until(next)) {
						next = next.Add(every)
						asked := time.Now()
						if err := l.Urgent(ctx, fault); err == nil {
							faults.add(fault)
						}
						if d := time.Since(asked); d > 0 {
							t.Errorf("a fault waited %v", d)
							return
						}
					}
				})
				wg.Wait()
				all := append(bulk.lets, faults.lets...)
				if most := float64(worst(all, time.Second)) / float64(limit); most > 1.05 {
					t.Errorf("%.3f of the limit in one second", most)
				}
				if got := float64(bulk.total()+faults.total()) / span.Seconds() / float64(limit); got < 0.98 {
					t.Errorf("%.3f of the limit were used", got)
				}
			})
		})
	}
}

// TestStorm: faults without end go at the limit and their share, no more, and
// the stream goes on soon after.
func TestStorm(t *testing.T) {
	for _, share := range []float64{0, 0.1, -1} {
		t.Run(fmt.Sprint(share), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const limit, storm = 125e6, 3 * time.Second
				l := newLimiter(t, Config{BytesPerSecond: limit, UrgentShare: share})
				top := 1 + max(0, share)
				if share == 0 {
					top = 1.25
				}
				var bulk, faults book
				var wg sync.WaitGroup
				begin := time.Now()
				short, cancel := context.WithTimeout(t.Context(), storm)
				defer cancel()
				long, cancel := context.WithTimeout(t.Context(), 2*storm)
				defer cancel()
				wg.Go(func() { flow(short, &faults, l.Urgent, always(4200), none) })
				wg.Go(func() { flow(long, &bulk, l.Wait, always(256<<10), none) })
				wg.Wait()
				all := append(slices.Clone(bulk.lets), faults.lets...)
				if most := float64(worst(all, time.Second)) / limit; most > top*1.05 {
					t.Errorf("%.3f of the limit in one second", most)
				}
				if got := float64(faults.total()) / storm.Seconds() / limit; got < 0.98*top-0.02 {
					t.Errorf("faults got %.3f of the limit", got)
				}
				after := slices.IndexFunc(bulk.lets, func(x let) bool { return x.at.Sub(begin) > storm })
				if d := bulk.lets[after].at.Sub(begin) - storm; d > 300*time.Millisecond {
					t.Errorf("the stream goes on %v after the last fault", d)
				}
			})
		})
	}
}

// TestFair: lanes that share a limiter get the same, also where one asks more
// often than it can be served.
func TestFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(t, Config{BytesPerSecond: 10 << 20})
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		if err := l.Wait(ctx, 1<<20); err != nil { // or the first to come has the burst
			t.Fatal(err)
		}
		var lanes [5]book
		var wg sync.WaitGroup
		for i := range lanes {
			wg.Go(func() { flow(ctx, &lanes[i], l.Wait, always(40<<10), none) })
		}
		wg.Wait()
		for i := range lanes {
			if d := len(lanes[i].lets) - len(lanes[0].lets); d < -1 || d > 1 {
				t.Errorf("lane %d sent %d frames, lane 0 %d", i, len(lanes[i].lets), len(lanes[0].lets))
			}
		}
	})
}

// TestLate: lanes that nobody let run for a while do not make up for it.
func TestLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 1 << 20
		l := newLimiter(t, Config{BytesPerSecond: limit})
		if err := l.Wait(t.Context(), limit); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		begin := time.Now()
		for n := 0; n < limit; n += 4096 {
			if err := l.Wait(t.Context(), 4096); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(begin); d < 970*time.Millisecond {
			t.Errorf("a second's worth went in %v", d)
		}
	})
}

// TestEnds: who waits, for the limit or for a turn, ends with its context, and
// the others go on.
func TestEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter(t, Config{BytesPerSecond: 1 << 20})
		why := errors.New("the lane ended")
		ctx, cancel := context.WithCancelCause(t.Context())
		var wg sync.WaitGroup
		for _, wait := range []func(context.Context, int) error{l.Wait, l.Wait, l.Urgent, l.Urgent} {
			wg.Go(func() {
				if err := wait(ctx, 100<<20); !errors.Is(err, why) {
					t.Error(err)
				}
			})
		}
		time.Sleep(time.Second)
		end := time.Now()
		cancel(why)
		wg.Wait()
		if d := time.Since(end); d != 0 {
			t.Errorf("the last one ended %v after its context", d)
		}
		if err := l.Wait(t.Context(), 4096); err != nil {
			t.Error(err)
		}
	})
}

func TestConfig(t *testing.T) {
	for _, n := range []uint64{0, Min - 1, Max + 1} {
		if _, err := New(Config{BytesPerSecond: n}); err == nil {
			t.Errorf("a limit of %d", n)
		}
	}
	var no *Limiter
	if err := errors.Join(no.Wait(nil, 1<<40), no.Urgent(nil, 1<<40)); err != nil || no.MaxPayload(77) != 77 || no.BytesPerSecond() != 0 {
		t.Error("no limiter limits")
	}
	for limit, want := range map[uint64]int{Min: 4096, 1 << 20: 4096, 10 << 20: 48 << 10, 125e6: 256 << 10, Max: 256 << 10} {
		if got := newLimiter(t, Config{BytesPerSecond: limit}).MaxPayload(256 << 10); got != want {
			t.Errorf("at %d bytes per second frames of %d, want %d", limit, got, want)
		}
	}
}
