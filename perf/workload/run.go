package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Run allocates the memory, dirties and verifies it until ctx ends or
// cfg.Duration is over, verifies all of it once more and returns. Its error has
// a *Damage in its chain if a page did not hold what it must. It writes its
// first line when the memory is filled: "ready", and one each cfg.Interval.
func Run(ctx context.Context, cfg Config, w io.Writer) error {
	cfg.EnsureDefaults()
	if err := cfg.Validate(); err != nil {
		return err
	}
	if cfg.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, cfg.Duration)
		defer cancel()
	}
	r, err := newRunner(&cfg, w)
	if err != nil {
		return err
	}
	defer r.free()
	err = r.run(ctx)
	r.finish(err)
	return err
}

// runner is one run.
type runner struct {
	cfg     *Config
	out     *output
	beat    *beater
	mem     []byte
	seqs    []byte
	regions []*region

	writes, verified atomic.Uint64 // pages
	gap, stall       atomic.Int64  // nanoseconds
	recent           atomic.Int64  // the longest gap since the last line
}

func newRunner(cfg *Config, w io.Writer) (*runner, error) {
	pages, hot := int(cfg.Size/page.Size), int(cfg.WorkingSet/page.Size)
	mem, err := allocate(pages * page.Size)
	if err != nil {
		return nil, err
	}
	seqs, err := allocate(int(page.Addr(4 * pages).Ceil()))
	if err != nil {
		_ = unix.Munmap(mem)
		return nil, err
	}
	r := &runner{cfg: cfg, out: newOutput(w, cfg.JSON), beat: newBeater(cfg), mem: mem, seqs: seqs}
	for i := range cfg.Threads {
		from, to := pages*i/cfg.Threads, pages*(i+1)/cfg.Threads
		r.regions = append(r.regions, &region{
			mem: mem[from*page.Size : to*page.Size], seqs: seqs[4*from : 4*to], first: uint64(from), cfg: cfg,
			hot: min(to-from, hot*(i+1)/cfg.Threads-hot*i/cfg.Threads),
		})
	}
	return r, nil
}

func allocate(bytes int) ([]byte, error) {
	b, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("workload: %d bytes of memory: %w", bytes, err)
	}
	return b, nil
}

func (r *runner) free() {
	_ = unix.Munmap(r.mem)
	_ = unix.Munmap(r.seqs)
}

// run is the life of the threads, from filling to the last verification.
func (r *runner) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var filled, done sync.WaitGroup
	filled.Add(len(r.regions))
	for i, reg := range r.regions {
		done.Add(1)
		go func() {
			defer done.Done()
			// One OS thread each: threads are what is moved.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			reg.fill(func() bool { return ctx.Err() != nil })
			filled.Done()
			filled.Wait()
			if err := r.work(ctx, reg, uint64(i)); err != nil {
				cancel(err)
			}
		}()
	}
	filled.Wait()
	if ctx.Err() == nil {
		r.out.ready(r.cfg, os.Getpid(), r.regions[0].addr())
		r.side(ctx, &done, r.pulse)
		r.side(ctx, &done, r.lines)
		if r.beat.network != "" {
			r.side(ctx, &done, r.beats)
		}
	}
	<-ctx.Done()
	done.Wait()
	var d *Damage
	if err := context.Cause(ctx); errors.As(err, &d) {
		return err
	}
	for _, reg := range r.regions {
		if reg.pages() == 0 || r.out.unready {
			continue
		}
		for i := range reg.pages() {
			if err := reg.verify(i); err != nil {
				return fmt.Errorf("at the end: %w", err)
			}
		}
	}
	return nil
}

func (r *runner) side(ctx context.Context, done *sync.WaitGroup, f func(context.Context)) {
	done.Add(1)
	go func() {
		defer done.Done()
		f(ctx)
	}()
}

// work writes and verifies one region at their rates.
func (r *runner) work(ctx context.Context, reg *region, id uint64) error {
	o := newOrder(r.cfg.Pattern, reg.hot, r.cfg.Seed^mix(id+1))
	n := int64(len(r.regions))
	writes := newBudget(share(r.cfg.Rate, n))
	reads := newBudget(share(r.cfg.VerifyRate, n))
	if r.cfg.NoVerify {
		reads = newBudget(Idle)
	}
	// Many threads wake less often each, so that waking is not all they do.
	nap := max(1, time.Duration(n)/8) * time.Millisecond
	next := 0
	last := time.Now()
	for ctx.Err() == nil {
		began := time.Now()
		elapsed := began.Sub(last)
		last = began
		w, v := writes.take(elapsed), reads.take(elapsed)
		for range w {
			reg.write(o.next())
		}
		for range v {
			if err := reg.verify(next); err != nil {
				return err
			}
			if next++; next == reg.pages() {
				next = 0
			}
		}
		r.writes.Add(uint64(w))
		r.verified.Add(uint64(v))
		atMost(&r.stall, int64(time.Since(began)))
		if !writes.unlimited && !reads.unlimited {
			time.Sleep(nap)
		}
	}
	return nil
}

// share divides a rate among n threads.
func share(rate, n int64) int64 {
	if rate < 0 {
		return rate
	}
	return max(1, rate/n)
}

// budget is a rate turned into pages to do now. What was missed in a long gap
// is not made up for: a program that stood still does not run faster after it.
type budget struct {
	perSecond float64 // pages
	left      float64
	unlimited bool
}

func newBudget(rate int64) *budget {
	return &budget{perSecond: float64(max(rate, 0)) / page.Size, unlimited: rate == Unlimited}
}

// batch is the most that is done without a look at the clock.
const batch = 4096

func (b *budget) take(elapsed time.Duration) int {
	if b.unlimited {
		return 64
	}
	b.left += b.perSecond * min(elapsed, 50*time.Millisecond).Seconds()
	n := min(int(b.left), batch)
	b.left = min(b.left-float64(n), batch)
	return n
}

// atMost raises a maximum.
func atMost(a *atomic.Int64, v int64) {
	for old := a.Load(); v > old; old = a.Load() {
		if a.CompareAndSwap(old, v) {
			return
		}
	}
}

// pulse measures the gap: it only sleeps and looks at the clock.
func (r *runner) pulse(ctx context.Context) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	last := time.Now()
	for ctx.Err() == nil {
		time.Sleep(500 * time.Microsecond)
		now := time.Now()
		atMost(&r.gap, int64(now.Sub(last)))
		atMost(&r.recent, int64(now.Sub(last)))
		last = now
	}
}

func (r *runner) beats(ctx context.Context) {
	tick := time.NewTicker(r.cfg.HeartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.beat.send(fmt.Sprintf("gap %d", r.gap.Load()))
		}
	}
}

func (r *runner) lines(ctx context.Context) {
	tick := time.NewTicker(r.cfg.Interval)
	defer tick.Stop()
	began := time.Now()
	last, writes, verified := began, uint64(0), uint64(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now, w, v := time.Now(), r.writes.Load(), r.verified.Load()
		s := now.Sub(last).Seconds()
		r.out.line(Line{
			MS:           now.Sub(began).Milliseconds(),
			Writes:       uint64(float64(w-writes) / s),
			VerifiedRate: uint64(float64((v-verified)*page.Size) / s),
			GapUS:        r.gap.Load() / 1000,
			StallUS:      r.stall.Load() / 1000,
			RecentGapUS:  r.recent.Swap(0) / 1000,
		})
		last, writes, verified = now, w, v
	}
}

// finish tells the outcome to everybody who was to be told.
func (r *runner) finish(err error) {
	text := "ok"
	if err != nil {
		text = "bad " + err.Error()
	}
	r.out.outcome(Outcome{
		Outcome: text, Writes: r.writes.Load(), VerifiedBytes: r.verified.Load() * page.Size,
		GapUS: r.gap.Load() / 1000, StallUS: r.stall.Load() / 1000,
	})
	r.beat.send(text)
	if r.cfg.Report == "" {
		return
	}
	f, e := os.OpenFile(r.cfg.Report, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if e != nil {
		return
	}
	_, _ = fmt.Fprintln(f, text)
	_ = f.Close()
}
