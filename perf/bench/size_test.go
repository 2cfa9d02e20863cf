package bench

import (
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// workingSet is what a process of any size keeps writing, all of it ten times a
// second.
const workingSet = 64 * mib

// sizes are the benchmarks of BenchmarkSwitch that say whether a downtime grows with
// memory that nobody writes.
func sizes(s scale) (list []benchmark) {
	for _, mode := range []string{"hybrid", "precopy"} {
		for _, size := range s.sizes {
			list = append(list, benchmark{fmt.Sprintf("size-%s-%s", mode, sizeName(size)), func(m *meter) { switchSize(m, mode, size) }})
		}
	}
	return list
}

func switchSize(m *meter, mode string, size uint64) {
	if !fitsTwice(size) {
		note("\n%s of %s: left out, the memory of this machine does not hold that twice\n", mode, sizeName(size))
		for m.loop() { // a benchmark that ends without a turn is called again
		}
		m.report(0, "moves")
		return
	}
	st := m.stage(true)
	hot := min(workingSet, size/4)
	g, err := st.Workload(m.ctx, size, "--working-set", strconv.FormatUint(hot, 10), "--rate", strconv.FormatUint(10*hot, 10),
		"--pattern", "sequential")
	m.must(err)
	var own, daemon []time.Duration
	_, at, err := g.OwnGap(m.ctx, 0)
	m.must(err)
	for m.loop() {
		req := appliance.MigrateRequest{Mode: mode}
		if mode == "hybrid" {
			req.MaxDowntimeMS = hybridDowntime
		}
		h := m.moveAs(st, g, req)
		var gap time.Duration
		gap, at, err = g.OwnGap(m.ctx, at)
		m.must(err)
		own, daemon = append(own, gap), append(daemon, h.Downtime())
	}
	m.report(MS(Median(own)), "own-ms")
	m.report(MS(Quantile(own, 1)), "own-max-ms")
	m.report(MS(Median(daemon)), "daemon-ms")
	key := mode + " size "
	m.keep(key, size, MS(Median(own)))
	small, large := m.sizes[0], m.sizes[len(m.sizes)-1]
	one := m.recall(growthKey(key, small))
	if size != large || size == small || one == 0 {
		return
	}
	m.report(MS(Median(own))/one, fmt.Sprintf("own-%s/%s", sizeName(large), sizeName(small)))
	m.judge(Row{What: fmt.Sprintf("%s, 64 MiB written, %s to %s, the program's longest gap", mode, sizeName(large), sizeName(small)),
		Target: 1.2, Got: MS(Median(own)) / one, Of: fmt.Sprintf("%.1f / %.1f ms", MS(Median(own)), one)})
}

// fitsTwice reports whether a process of that size and another like it, which is
// about to take over, leave 2 GiB for everything else.
func fitsTwice(size uint64) bool {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return false
	}
	free, ok := kib(text, "MemAvailable")
	return ok && free >= 2*size+2*GiB
}
