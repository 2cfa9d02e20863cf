package bench

import (
	"fmt"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// BenchmarkLink is how much of a slow link a migration uses, by hybrid.
//
// 1gbit, 10gbit: random memory. The wire is what one TCP stream of plain writes
// carries over the same link in turns with the migrations; beside it, of what the
// link carries in all, headers included, how much it did.
//
// redis-1gbit: records as programs keep them, whose pages go compressed.
//
// auto-1gbit, auto-unshaped: random memory with --compress auto and none in turns.
func BenchmarkLink(b *testing.B) { runAll(b, links) }

const gbit = 1e9

func links(s scale) []benchmark {
	list := []benchmark{
		{"1gbit", func(m *meter) { link(m, gbit, m.link) }},
		{"redis-1gbit", linkRedis},
		{"auto-1gbit", func(m *meter) { compressions(m, gbit) }},
	}
	if !s.allModes {
		return list
	}
	return append(list, benchmark{"10gbit", func(m *meter) { link(m, 10*gbit, m.scale.move) }},
		benchmark{"auto-unshaped", func(m *meter) { compressions(m, 0) }})
}

// shaped is a stage with a link of that rate and what one stream carries over it.
func (m *meter) shaped(rate uint64) (*Stage, func() float64) {
	m.Helper()
	st := m.stage(true)
	k, err := st.newSink()
	m.must(err)
	m.closing(k.close)
	if rate > 0 {
		m.must(st.Shape(m.ctx, rate))
	}
	bytes := int(max(mib, min(m.link/2, rate/8/2))) // for half a second
	return st, func() float64 {
		_, wall, err := k.send(m.ctx, bytes)
		m.must(err)
		r := Rate(float64(bytes), wall)
		if most := 1.1 * float64(rate) / 8 / GiB; rate > 0 && r > most {
			m.Fatalf("a stream of %.3f GiB/s over a link of %s: it is not shaped", r, rateName(rate))
		}
		return r
	}
}

func rateName(rate uint64) string { return fmt.Sprintf("%d Gbit/s", rate/gbit) }

func link(m *meter, rate, size uint64) {
	st, wire := m.shaped(rate)
	g, err := st.Workload(m.ctx, size)
	m.must(err)
	var rates, wires, shares []float64
	for m.loop() {
		wires = append(wires, wire())
		before, err := st.Crossed(m.ctx)
		m.must(err)
		h := m.move(st, g, "hybrid")
		after, err := st.Crossed(m.ctx)
		m.must(err)
		rates = append(rates, Rate(float64(size), h.Whole()))
		shares = append(shares, float64(after-before)*8/float64(rate)/h.Whole().Seconds())
	}
	m.reportLink(rates, wires)
	m.report(Median(shares), "link-used")
	m.judgeLink("random memory", rate, 0.95, rates, wires)
}

func (m *meter) reportLink(rates, wires []float64) {
	m.report(Median(rates), "GiB/s")
	m.report(Median(wires), "tcp-GiB/s")
	m.report(Median(rates)/Median(wires), "rate/tcp")
}

func (m *meter) judgeLink(what string, rate uint64, target float64, rates, wires []float64) {
	m.judge(Row{What: fmt.Sprintf("%s over %s, to one TCP stream", what, rateName(rate)), Target: target,
		Got: Median(rates) / Median(wires), AtLeast: true, Of: fmt.Sprintf("%.3f / %.3f GiB/s", Median(rates), Median(wires))})
}

func linkRedis(m *meter) {
	st, wire := m.shaped(gbit)
	g, err := st.Records(m.ctx, m.link)
	m.must(err)
	var rates, wires, less []float64
	for m.loop() {
		wires = append(wires, wire())
		h := m.move(st, g, "hybrid")
		rates = append(rates, Rate(float64(h.Report.BytesMemory), h.Whole()))
		less = append(less, float64(h.Report.BytesWire)/float64(h.Report.BytesMemory))
	}
	m.reportLink(rates, wires)
	m.report(Median(less), "wire/memory")
	m.judgeLink("redis of records", gbit, 1.5, rates, wires)
}

func compressions(m *meter, rate uint64) {
	st, _ := m.shaped(rate)
	g, err := st.Workload(m.ctx, m.link)
	m.must(err)
	var took [2][]time.Duration
	for m.loop() {
		for i, how := range []string{"auto", "none"} {
			h := m.moveAs(st, g, appliance.MigrateRequest{Mode: "hybrid", Compress: how})
			took[i] = append(took[i], h.Whole())
		}
	}
	auto, none := Median(took[0]).Seconds(), Median(took[1]).Seconds()
	m.report(auto, "auto-s")
	m.report(none, "none-s")
	m.report(auto/none, "auto/none")
	over := "no limit"
	if rate > 0 {
		over = rateName(rate)
	}
	m.judge(Row{What: "random memory over " + over + ", compress auto to none", Target: 1.03, Got: auto / none,
		Of: fmt.Sprintf("%.2f / %.2f s", auto, none)})
}
