package bench

import (
	"fmt"
	"testing"
	"time"
)

// BenchmarkTrack is what it costs to know which pages change, with nothing copied.
//
// redis: answers per second of a redis-server under load, tracked and looked at
// every 100 ms, over those of the same server untracked, in turns.
//
// scan: what a look takes for each GiB, where none, a hundredth and a tenth of the
// memory is written between two, scattered.
func BenchmarkTrack(b *testing.B) { runAll(b, tracks) }

func tracks(s scale) []benchmark {
	return []benchmark{
		{"redis", trackRedis},
		{"scan-idle", func(m *meter) { scan(m, 0) }},
		{"scan-1%", func(m *meter) { scan(m, 0.01) }},
		{"scan-10%", func(m *meter) { scan(m, 0.1) }},
	}
}

// lookEvery is the time between two looks.
const lookEvery = 100 * time.Millisecond

func trackRedis(m *meter) {
	st := m.stage(true)
	g, keys, err := st.Redis(m.ctx, m.track)
	m.must(err)
	load, err := st.NewLoad(keys)
	m.must(err)
	m.closing(load.Close)
	var untracked, tracked, ratio, stops []float64
	var c costs
	for m.loop() {
		before, err := load.Rate(func() error { time.Sleep(time.Duration(m.looks) * lookEvery); return nil })
		m.must(err)
		if before == 0 {
			m.Fatal("the load gets no answers")
		}
		t, err := g.Track()
		m.must(err)
		stops = append(stops, MS(t.First.Stop))
		c.armed(t.First)
		during, err := load.Rate(func() error {
			return t.each(m.looks, c.looked)
		})
		m.must(err)
		m.must(t.Close())
		untracked, tracked, ratio = append(untracked, before), append(tracked, during), append(ratio, during/before)
	}
	m.report(Median(untracked), "untracked-ops/s")
	m.report(Median(tracked), "tracked-ops/s")
	m.report(Median(ratio), "tracked/untracked")
	m.report(Median(stops), "stop-ms")
	m.reportScans("redis under load", &c)
	m.judge(Row{What: "redis under load, answers tracked to untracked", Target: 0.9, Got: Median(ratio), AtLeast: true,
		Of: fmt.Sprintf("%.0f / %.0f per second", Median(tracked), Median(untracked))})
}

// each looks n times, every lookEvery.
func (t *Tracked) each(n int, f func(Look)) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for range n {
		<-tick.C
		l, err := t.Look()
		if err != nil {
			return err
		}
		f(l)
	}
	return nil
}

// costs are the looks' times per GiB, in ms, and the part of the memory that was
// written before each.
type costs struct{ arms, armCPU, scans, scanCPU, dirty []float64 }

func (c *costs) armed(l Look) {
	c.arms, c.armCPU = append(c.arms, MS(l.PerGiB())), append(c.armCPU, MS(l.perGiB(l.CPU)))
}

func (c *costs) looked(l Look) {
	c.scans, c.scanCPU = append(c.scans, MS(l.PerGiB())), append(c.scanCPU, MS(l.perGiB(l.CPU)))
	c.dirty = append(c.dirty, 100*float64(l.Dirty)/float64(max(1, l.Content)))
}

func (m *meter) reportScans(what string, c *costs) {
	m.Helper()
	m.report(Median(c.arms), "arm-ms/GiB")
	m.report(Median(c.armCPU), "arm-cpu-ms/GiB")
	m.report(Median(c.scans), "scan-ms/GiB")
	m.report(Median(c.scanCPU), "scan-cpu-ms/GiB")
	m.report(Quantile(c.scans, 0.99), "scan-p99-ms/GiB")
	m.report(Median(c.dirty), "dirty-%")
	m.judge(Row{What: "arming, " + what, Target: 10, Got: Median(c.arms), Unit: "ms per GiB",
		Of: fmt.Sprintf("%.1f of a processor", Median(c.armCPU))})
	m.judge(Row{What: "a scan, " + what, Target: 10, Got: Median(c.scans), Unit: "ms per GiB",
		Of: fmt.Sprintf("%.1f of a processor; %.1f %% dirty", Median(c.scanCPU), Median(c.dirty))})
}

func scan(m *meter, part float64) {
	st := m.stage(true)
	args, what := []string{}, "idle"
	if part > 0 {
		args = append(args, "--pattern", "uniform", "--rate", fmt.Sprintf("%d", int(part*float64(m.track)/lookEvery.Seconds())))
		what = fmt.Sprintf("%.0f %% written", part*100)
	}
	g, err := st.Workload(m.ctx, m.track, args...)
	m.must(err)
	var c costs
	for m.loop() {
		t, err := g.Track()
		m.must(err)
		c.armed(t.First)
		m.must(t.each(m.looks, c.looked))
		m.must(t.Close())
	}
	m.reportScans(sizeName(m.track)+", "+what, &c)
}
