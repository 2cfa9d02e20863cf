package checkpoint

import (
	"fmt"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// How long a program of 64 MiB stands still at once while its memory is settled. Threads
// that are quiet sleep most of the time; busy ones compute, on as many processors as
// there are.
func BenchmarkSettle(b *testing.B) {
	for _, kind := range []string{"quiet", "busy"} {
		for _, threads := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("%s/threads=%d", kind, threads), func(b *testing.B) {
				testutil.Require(b, testutil.Root, testutil.AMD64)
				var all SettleReport
				for b.Loop() {
					b.StopTimer()
					v := startVeiled(b, max(8, threads), 16<<10/max(8, threads), threads, "no-fork", kind)
					time.Sleep(100 * time.Millisecond)
					b.StartTimer()
					rep := settleAll(b, v.Pid(), v.config(), v.shadows()...)
					b.StopTimer()
					all.Stops = append(all.Stops, rep.Stops...)
					all.Copied += rep.Copied
					v.finish(b)
					b.StartTimer()
				}
				us := func(q float64) float64 { return float64(all.Quantile(q).Microseconds()) }
				b.ReportMetric(us(0.5), "us-median")
				b.ReportMetric(us(0.99), "us-p99")
				b.ReportMetric(us(1), "us-max")
				b.ReportMetric(float64(len(all.Stops))/float64(b.N), "stops/op")
				b.ReportMetric(float64(all.Copied>>20)/float64(b.N), "MiB-copied/op")
			})
		}
	}
}
