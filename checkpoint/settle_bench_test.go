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
				report(b, &all)
			})
		}
	}
}

// The same of one mapping of 64 MiB of which every page has been written and one in 64 is
// written all the time: in pieces, copied ahead, and with moves that are read from the
// userfaultfd, so that nothing has to be unregistered.
func BenchmarkSettleWhole(b *testing.B) {
	for _, how := range []string{"pieces", "ahead", "moves"} {
		for _, threads := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("%s/threads=%d", how, threads), func(b *testing.B) {
				testutil.Require(b, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
				var all SettleReport
				for b.Loop() {
					b.StopTimer()
					v := startGrowing(b, 16<<10, threads, 1, "no-grow")
					fd := v.trap(b, nil)
					time.Sleep(200 * time.Millisecond)
					cfg := v.early(v.config(), fd, how == "moves")
					if how == "pieces" {
						cfg.Early = nil
					}
					b.StartTimer()
					rep := settleAll(b, v.Pid(), cfg, v.shadows()...)
					b.StopTimer()
					all.Stops = append(all.Stops, rep.Stops...)
					all.Halts = append(all.Halts, rep.Halts...)
					all.Copied += rep.Copied
					v.finish(b)
					b.StartTimer()
				}
				report(b, &all)
				halts := SettleReport{Stops: all.Halts}
				b.ReportMetric(float64(len(all.Halts))/float64(b.N), "halts/op")
				b.ReportMetric(float64(halts.Quantile(1).Microseconds()), "us-halt-max")
			})
		}
	}
}

func report(b *testing.B, all *SettleReport) {
	us := func(q float64) float64 { return float64(all.Quantile(q).Microseconds()) }
	b.ReportMetric(us(0.5), "us-median")
	b.ReportMetric(us(0.99), "us-p99")
	b.ReportMetric(us(1), "us-max")
	b.ReportMetric(float64(len(all.Stops))/float64(b.N), "stops/op")
	b.ReportMetric(float64(all.Copied>>20)/float64(b.N), "MiB-copied/op")
}
