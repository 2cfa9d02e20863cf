package fault

import (
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Latency sums up how long threads waited for pages of the source, as the trap
// sees it: from the reading of the fault to the wake.
type Latency struct {
	Count               int64
	Mean, P50, P99, Max time.Duration
}

const longest = time.Hour

type latency struct {
	mu sync.Mutex
	h  *hdrhistogram.Histogram // in nanoseconds
}

func (l *latency) init() { l.h = hdrhistogram.New(1000, int64(longest), 2) }

func (l *latency) add(d time.Duration) {
	l.mu.Lock()
	_ = l.h.RecordValue(int64(min(max(d, time.Microsecond), longest)))
	l.mu.Unlock()
}

func (l *latency) snapshot() Latency {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := func(p float64) time.Duration { return time.Duration(l.h.ValueAtQuantile(p)) }
	return Latency{l.h.TotalCount(), time.Duration(l.h.Mean()), q(50), q(99), time.Duration(l.h.Max())}
}
