package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/pageferry/pageferry/perf/workload"
)

// Workload starts perf/workload with size bytes of random data, which it neither
// writes nor verifies unless args say so: it only watches the clock.
func (s *Stage) Workload(ctx context.Context, size uint64, args ...string) (*Guest, error) {
	argv := append([]string{s.cfg.Binary, "workload", "--json", "--interval", gapInterval.String(), "--data", "random",
		"--rate", "idle", "--verify=false", "--size", strconv.FormatUint(size, 10)}, args...)
	g, p, err := s.Start(argv...)
	if err == nil {
		err = g.said(ctx, p, `"ready":true`, 2*time.Minute)
	}
	if err != nil {
		return nil, fmt.Errorf("workload: %w", err)
	}
	return g, nil
}

// gapInterval is how often a Workload says how long it stood still.
const gapInterval = 100 * time.Millisecond

// OwnGap is the longest time that g, a Workload, found itself not running since
// offset in its output; it waits until two more lines have come. next is the
// offset for the next call.
func (g *Guest) OwnGap(ctx context.Context, offset int) (gap time.Duration, next int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	now, err := g.output()
	if err != nil {
		return 0, offset, err
	}
	want := bytes.Count(now, []byte("\n")) + 2
	tick := time.NewTicker(gapInterval / 10)
	defer tick.Stop()
	for bytes.Count(now, []byte("\n")) < want {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, offset, fmt.Errorf("workload: it prints nothing: %w", ctx.Err())
		}
		if now, err = g.output(); err != nil {
			return 0, offset, err
		}
	}
	end := bytes.LastIndexByte(now, '\n') + 1
	for line := range bytes.Lines(now[offset:end]) {
		var l workload.Line
		if json.Unmarshal(line, &l) == nil {
			gap = max(gap, time.Duration(l.RecentGapUS)*time.Microsecond)
		}
	}
	return gap, end, nil
}

// latest is the last whole line that g, a Workload, has printed of its work.
func (g *Guest) latest() (l workload.Line, err error) {
	b, err := g.output()
	if err != nil {
		return l, err
	}
	b = b[:bytes.LastIndexByte(b, '\n')+1]
	b = bytes.TrimSuffix(b, []byte("\n"))
	return l, json.Unmarshal(b[bytes.LastIndexByte(b, '\n')+1:], &l)
}

func (g *Guest) output() ([]byte, error) { return os.ReadFile(g.Out) }

// Beats listens for the heartbeats of a program of test/programs, from both
// hosts.
type Beats struct {
	// Address is what the program is given.
	Address string
	conn    *net.UnixConn
	wg      sync.WaitGroup

	mu    sync.Mutex
	last  time.Time
	gap   time.Duration
	count int
}

// NewBeats listens on a unix socket at path, which both hosts must see. Close
// ends it.
func NewBeats(path string) (*Beats, error) {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	b := &Beats{Address: "unix:" + path, conn: c}
	b.wg.Go(b.run)
	return b, nil
}

func (b *Beats) run() {
	buf := make([]byte, 1024)
	for {
		if _, err := b.conn.Read(buf); err != nil {
			return
		}
		now := time.Now()
		b.mu.Lock()
		if !b.last.IsZero() {
			b.gap = max(b.gap, now.Sub(b.last))
		}
		b.last = now
		b.count++
		b.mu.Unlock()
	}
}

// Take returns the longest time between two heartbeats since the last call.
func (b *Beats) Take() (gap time.Duration, count int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	gap, count = b.gap, b.count
	if !b.last.IsZero() {
		gap = max(gap, time.Since(b.last))
	}
	b.gap, b.count = 0, 0
	return gap, count
}

// Wait waits until n more heartbeats have come.
func (b *Beats) Wait(ctx context.Context, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	seen := func() int {
		b.mu.Lock()
		defer b.mu.Unlock()
		return b.count
	}
	want := seen() + n
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for seen() < want {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("no heartbeats: %w", ctx.Err())
		}
	}
	return nil
}

// Close ends listening.
func (b *Beats) Close() error {
	err := b.conn.Close()
	b.wg.Wait()
	return err
}
