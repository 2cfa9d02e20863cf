package checkpoint

import (
	"context"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// BenchmarkCapture reports the parts of what a program stands still for, besides
// the pages: the stop, the capture, and the way into the frozen cgroup.
func BenchmarkCapture(b *testing.B) {
	testutil.Require(b, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	b.Run("redis", func(b *testing.B) {
		benchmarkCapture(b, testutil.Redis(b).Pid())
	})
	b.Run("threads=200", func(b *testing.B) {
		p := testutil.StartEverything(b, testutil.ProgramConfig{Threads: 200, Args: []string{"--only", "regs"}})
		benchmarkCapture(b, p.Pid())
	})
}

func benchmarkCapture(b *testing.B, pid int) {
	ctx := context.Background()
	s, err := Open(pid, Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	defer s.Thaw(ctx)
	var stop, capture, hold time.Duration
	for b.Loop() {
		if err := s.Isolate(ctx); err != nil {
			b.Fatal(err)
		}
		t0 := time.Now()
		if err := s.Freeze(ctx); err != nil {
			b.Fatal(err)
		}
		t1 := time.Now()
		if _, _, err := s.Capture(ctx); err != nil {
			b.Fatal(err)
		}
		t2 := time.Now()
		if err := s.Hold(ctx); err != nil {
			b.Fatal(err)
		}
		t3 := time.Now()
		stop, capture, hold = stop+t1.Sub(t0), capture+t2.Sub(t1), hold+t3.Sub(t2)
		if err := s.Thaw(ctx); err != nil {
			b.Fatal(err)
		}
	}
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(b.N) }
	b.ReportMetric(ms(stop), "freeze-ms")
	b.ReportMetric(ms(capture), "capture-ms")
	b.ReportMetric(ms(hold), "hold-ms")
}
