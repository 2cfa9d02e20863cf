package survive_test

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

// BenchmarkTransports moves a program of 64 MiB that goes on writing by post-copy, over
// TCP and over RDMA in turns, in a guest ("make bench-rdma"). It reports what the
// source's daemon needs of a processor from the commit to the last page, what a demand
// fault takes, and when the last page was there.
func BenchmarkTransports(b *testing.B) {
	if !vmtest.Inside() {
		b.Fatal("runs in a guest: make bench-rdma")
	}
	x, y := vmtest.Pair(b)
	r := newRigIn(b, lab.Config{Addrs: []netip.Addr{x.Addr, y.Addr}}, "page_lanes: plain\n")
	report := b.TempDir() + "/report"
	g := r.launch(b, r.a, exec.Command(pageferry(b), "workload", "--size", "64MiB", "--rate", "1MiB/s", "--pattern", "uniform", "--report", report))
	testutil.Eventually(b, 10*time.Minute, func() error {
		if kib := statusKiB(b, g.outer(), "RssAnon"); kib < 64<<10 {
			return fmt.Errorf("%d KiB so far", kib)
		}
		return nil
	})
	figures := map[string][]float64{}
	for b.Loop() {
		for _, over := range []string{appliance.TransportTCP, appliance.TransportRDMA} {
			req := g.request("postcopy")
			req.Transport, req.Compress = over, "none"
			from := g.at
			var before time.Duration
			from.points.at(moment{source, "source/journal/committed/after", 1, 0}, func() { before = cpuTime(b, from.daemon.Load().PID()) })
			rep := g.hopAs(req)
			if rep.Transport != over {
				b.Fatalf("it went over %s: %q", rep.Transport, rep.Remarks)
			}
			cpu := cpuTime(b, from.daemon.Load().PID()) - before
			from.points.do(nil)
			for name, v := range map[string]float64{"source-cpu-ms": ms(cpu), "fault-p50-us": rep.Faults.P50us, "resident-ms": rep.ResidentMS, "downtime-ms": rep.DowntimeMS} {
				figures[over+"-"+name] = append(figures[over+"-"+name], v)
			}
			b.Logf("%s: %.0f ms of the source's daemon, %d faults of %.0f us, resident after %.0f ms; %q", over, ms(cpu), rep.Faults.Count, rep.Faults.P50us, rep.ResidentMS, rep.Remarks)
		}
	}
	for name, vs := range figures {
		slices.Sort(vs)
		b.ReportMetric(vs[len(vs)/2], name)
	}
	tcp, rdma := figures["tcp-source-cpu-ms"], figures["rdma-source-cpu-ms"]
	b.ReportMetric(rdma[len(rdma)/2]/tcp[len(tcp)/2], "source-cpu-ratio")
	g.end()
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// cpuTime is what a process has had of processors, in clock ticks of 10 ms
// (proc_pid_stat(5)).
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

// statusKiB is a field of /proc/PID/status in KiB.
func statusKiB(t testing.TB, pid int, field string) (kib int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), field+":")
	_, _ = fmt.Sscan(rest, &kib)
	return kib
}
