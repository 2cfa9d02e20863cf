package bench

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkFault is how long a thread waits for a page that is missing, as it
// sees it itself.
//
// alone: one after the other with nothing else going on, beside what a fault is
// made of at least, in turns: a local userfaultfd round trip and a page asked
// for over TCP.
//
// load: eight threads in a closed loop over scattered pages of a process that
// has just moved, with the background stream on. Touches of pages that were
// there already, under 2 us, are left out.
func BenchmarkFault(b *testing.B) { runAll(b, faults) }

func faults(scale) []benchmark {
	return []benchmark{
		{"alone", faultAlone},
		{"load", func(m *meter) { faultLoad(m, true) }},
		{"load-tls", func(m *meter) { faultLoad(m, false) }},
	}
}

// rigPages is how many pages a rig has before another takes its place.
const rigPages = 16384

func faultAlone(m *meter) {
	touch := m.touch()
	var rig *Rig
	m.closing(func() error {
		if rig == nil {
			return nil
		}
		return rig.Close()
	})
	left := 0
	var p50, p99, mean, uffd, ping, ratio []float64
	var waits, cpu [2][]float64 // of pager and source, per fault
	for m.loop() {
		if left < m.touches {
			if rig != nil {
				m.must(rig.Close())
			}
			var err error
			rig, err = NewRig(m.ctx, touch, pageferry(m), rigPages)
			m.must(err)
			_, err = rig.Touch(100) // warm
			m.must(err)
			left = rigPages - 100
		}
		raw, err := MeasureRawFault(m.ctx, touch, m.touches)
		m.must(err)
		before := m.usage(rig)
		times, err := rig.Touch(m.touches)
		m.must(err)
		for i, u := range m.usage(rig) {
			u = u.Minus(before[i])
			waits[i] = append(waits[i], float64(u.Switches)/float64(m.touches))
			cpu[i] = append(cpu[i], US(u.CPU)/float64(m.touches))
		}
		left -= m.touches
		u, p, f := US(Median(raw.Uffd)), US(Median(raw.PingPong)), US(Median(times))
		uffd, ping, p50, ratio = append(uffd, u), append(ping, p), append(p50, f), append(ratio, f/(u+p))
		p99, mean = append(p99, US(Quantile(times, 0.99))), append(mean, Mean(times)/1000)
	}
	m.report(Median(p50), "p50-us")
	m.report(Median(mean), "mean-us")
	m.report(Median(p99), "p99-us")
	m.report(Median(uffd), "uffd-us")
	m.report(Median(ping), "pingpong-us")
	m.report(Median(ratio), "p50/raw")
	for i, who := range []string{"pager", "source"} {
		m.report(Median(waits[i]), who+"-waits/fault")
		m.report(Median(cpu[i]), who+"-cpu-us/fault")
	}
	m.judge(Row{What: "demand fault, p50 to userfaultfd + TCP", Target: 1.5, Got: Median(ratio),
		Of: fmt.Sprintf("%.1f us / (%.1f + %.1f us)", Median(p50), Median(uffd), Median(ping))})
}

func (m *meter) usage(r *Rig) [2]Usage {
	m.Helper()
	p, s, err := r.Usage()
	m.must(err)
	return [2]Usage{p, s}
}

const loadThreads = 8

func faultLoad(m *meter, plain bool) {
	st := m.stage(plain)
	g, err := st.Toucher(m.ctx, m.touch(), m.load, loadThreads)
	m.must(err)
	var p50, p99, mean, count []float64
	var all []time.Duration
	for hop := 1; m.loop(); hop++ {
		m.move(st, g, "postcopy")
		t, err := g.Touched(m.ctx, hop)
		m.must(err)
		if got := t.Hits + len(t.Faults); got != int(m.load/4096) {
			m.Fatalf("%d of %d pages were touched", got, m.load/4096)
		}
		if len(t.Faults) == 0 {
			continue // all was there before the first touch
		}
		p50, p99 = append(p50, US(Quantile(t.Faults, 0.5))), append(p99, US(Quantile(t.Faults, 0.99)))
		mean, count = append(mean, Mean(t.Faults)/1000), append(count, float64(len(t.Faults)))
		all = append(all, t.Faults...)
	}
	m.report(Median(mean), "mean-us")
	m.report(Median(p50), "p50-us")
	m.report(Median(p99), "p99-us")
	m.report(US(Quantile(all, 1)), "max-us")
	m.report(Median(count), "faults")
	if !plain || m.load < 256*mib {
		return
	}
	r := Row{What: "demand fault under load, mean", Target: 0.5, Got: Median(mean) / 1000, Unit: "ms",
		Of: fmt.Sprintf("p50 %.0f us, p99 %.0f us, %.0f faults", Median(p50), Median(p99), Median(count))}
	if Median(count) < 1000 {
		r.Remark = "fewer than 1000 faults per move"
	}
	m.judge(r)
}
