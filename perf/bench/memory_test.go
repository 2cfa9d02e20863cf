package bench

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// BenchmarkMemory is what a migration needs besides the process: all that runs
// on the destination (process, pager, keeper, daemon; PSS) at its peak, over the
// process's own size before it left, and the source's daemon at its peak (RSS).
func BenchmarkMemory(b *testing.B) { runAll(b, memories) }

func memories(s scale) (list []benchmark) {
	for _, size := range s.memory {
		for _, mode := range []string{"postcopy", "stop", "hybrid", "precopy"} {
			list = append(list, benchmark{mode + "-" + sizeName(size), func(m *meter) { memory(m, mode, size) }})
		}
	}
	return list
}

// share is the part of the process that rounds may take besides, in MiB.
func (m *meter) share(mode string, size uint64) float64 {
	if mode == "hybrid" || mode == "precopy" {
		return 0.05 * float64(size) / mib
	}
	return 0
}

func memory(m *meter, mode string, size uint64) {
	st := m.stage(false)
	g, err := st.Workload(m.ctx, size)
	m.must(err)
	a, b := st.Hosts()
	var over, source []float64
	var top Peak
	for m.loop() {
		from, to := a, b
		if g.Host == b {
			from, to = b, a
		}
		daemon, err := st.DaemonPID(m.ctx, from)
		m.must(err)
		own, err := PSS(from, g.PID)
		m.must(err)
		if own < size {
			m.Fatalf("the process takes %d bytes, less than the %d that it holds", own, size)
		}
		m.must(ResetHWM(from, daemon))
		stop := WatchPSS(to, 20*time.Millisecond)
		_, merr := st.Move(m.ctx, g, mode)
		peak, err := stop()
		m.must(merr)
		m.must(err)
		hwm, err := HWM(from, daemon)
		m.must(err)
		over = append(over, (float64(peak.Sum)-float64(own))/mib)
		source = append(source, float64(hwm)/mib)
		if peak.Sum > top.Sum {
			top = peak
		}
	}
	m.report(max(0, Median(over)), "dest-over-MiB")
	m.report(max(0, Quantile(over, 1)), "dest-over-max-MiB")
	m.report(Median(source), "source-daemon-MiB")
	var parts []string
	for name, n := range top.By {
		parts = append(parts, fmt.Sprintf("%s %.1f MiB", name, float64(n)/mib))
	}
	slices.Sort(parts)
	note("\npeak at the destination, %s of %s: %s\n", mode, sizeName(size), strings.Join(parts, ", "))
	m.judge(Row{What: fmt.Sprintf("destination's peak over the process, %s of %s", mode, sizeName(size)), Target: 128 + m.share(mode, size), Got: Median(over), Unit: "MiB"})
	m.judge(Row{What: fmt.Sprintf("source daemon's peak, %s of %s", mode, sizeName(size)), Target: 96, Got: Median(source), Unit: "MiB"})
}
