package bench

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// BenchmarkTrap compares the traps.
func BenchmarkTrap(b *testing.B) { runAll(b, traps) }

func traps(scale) []benchmark { return []benchmark{{"postcopy", faultTraps}} }

// faultTraps compares the traps: eight threads touch scattered pages of a process that
// has just moved by post-copy, its memory behind a userfaultfd and behind a file, in
// turns. Whole is until its memory is its own again: with the file, settling is in it.
// The peak is that of all that runs on the destination, over the process's own size, in
// moves of their own: to look takes time.
func faultTraps(m *meter) {
	traps := []string{appliance.TrapUFFD, appliance.TrapFUSE}
	st := m.stage(true)
	g, err := st.Toucher(m.ctx, m.touch(), m.scale.stages, loadThreads)
	m.must(err)
	var mean, downtime, whole, peak [2][]float64
	a, b := st.Hosts()
	hop := 0
	for m.loop() {
		for i, trap := range traps {
			hop++
			began := time.Now()
			h := m.moveAs(st, g, appliance.MigrateRequest{Mode: "postcopy", Trap: trap})
			whole[i] = append(whole[i], MS(time.Since(began)))
			downtime[i] = append(downtime[i], MS(h.Downtime()))
			t, err := g.Touched(m.ctx, hop)
			m.must(err)
			if len(t.Faults) > 0 {
				mean[i] = append(mean[i], Mean(t.Faults)/1000)
			}
		}
		for i, trap := range traps {
			hop++
			own, err := PSS(g.Host, g.PID)
			m.must(err)
			to := a
			if g.Host == a {
				to = b
			}
			stop := WatchPSS(to, 20*time.Millisecond)
			m.moveAs(st, g, appliance.MigrateRequest{Mode: "postcopy", Trap: trap})
			p, err := stop()
			m.must(err)
			peak[i] = append(peak[i], float64(p.Sum)/float64(own))
			_, err = g.Touched(m.ctx, hop)
			m.must(err)
		}
	}
	for i, trap := range traps {
		m.report(Median(mean[i]), trap+"-mean-us")
		m.report(Median(downtime[i]), trap+"-downtime-ms")
		m.report(Median(whole[i]), trap+"-whole-ms")
		m.report(Median(peak[i]), trap+"-peak/process")
	}
	if slices.ContainsFunc(mean[:], func(v []float64) bool { return len(v) == 0 }) || m.scale.stages < 256*mib {
		return
	}
	m.judge(Row{What: "post-copy, scattered access, mean wait for a page, trap fuse to uffd", Target: 2, Got: Median(mean[1]) / Median(mean[0]),
		Of: fmt.Sprintf("%.0f / %.0f us", Median(mean[1]), Median(mean[0]))})
	m.judge(Row{What: "post-copy with trap fuse, peak of the destination to the process", Target: 1.3, Got: Median(peak[1]),
		Of: fmt.Sprintf("uffd %.2f", Median(peak[0]))})
}
