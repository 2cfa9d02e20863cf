package bench

import (
	"fmt"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/pageferry/pageferry/page"
)

// BenchmarkThroughput is how fast memory of random data moves: in post-copy from
// the freeze until the last page is there, in stop-and-copy from the freeze
// until it runs. See Limits for the ceiling, whose parts are measured in turns
// with the migrations.
func BenchmarkThroughput(b *testing.B) { runAll(b, throughputs) }

func throughputs(s scale) []benchmark {
	if !s.allModes {
		return []benchmark{
			{"postcopy-plain", func(m *meter) { throughput(m, "postcopy", true) }},
			{"stop-tls", func(m *meter) { throughput(m, "stop", false) }},
		}
	}
	return []benchmark{
		{"postcopy-plain", func(m *meter) { throughput(m, "postcopy", true) }},
		{"stop-plain", func(m *meter) { throughput(m, "stop", true) }},
		{"postcopy-tls", func(m *meter) { throughput(m, "postcopy", false) }},
		{"stop-tls", func(m *meter) { throughput(m, "stop", false) }},
	}
}

func throughput(m *meter, mode string, plain bool) {
	st := m.stage(plain)
	limits, err := st.NewLimits(m.touch(), m.limits)
	m.must(err)
	m.closing(limits.Close)
	g, err := st.Workload(m.ctx, m.scale.move)
	m.must(err)
	var rates, wires, source, dest []float64
	for m.loop() {
		m.must(limits.Turn(m.ctx))
		h := m.move(st, g, mode)
		took := h.Resident()
		if mode == "stop" {
			took = h.Downtime()
		}
		bytes := float64((h.Report.PagesTotal - h.Report.PagesZero) * page.Size)
		rates = append(rates, Rate(bytes, took))
		source = append(source, MS(h.SourceCPU)/(bytes/GiB))
		dest = append(dest, MS(h.DestCPU)/(bytes/GiB))
		wires = append(wires, float64(h.Report.BytesWire)/float64(max(1, h.Report.BytesMemory)))
	}
	rate, ceiling := Median(rates), limits.Ceiling(!plain)
	m.report(rate, "GiB/s")
	m.report(ceiling, "ceiling-GiB/s")
	m.report(limits.Wire(), "tcp-GiB/s")
	m.report(rate/ceiling, "rate/ceiling")
	m.report(Median(wires), "wire/memory")
	m.report(Median(source), "source-cpu-ms/GiB")
	m.report(Median(dest), "dest-cpu-ms/GiB")
	m.report((Median(source)+Median(dest))/limits.Sum(!plain), "cpu/stages")
	names, costs := limits.Costs()
	for i, name := range names {
		m.report(costs[i]*1000, name+"-ms/GiB")
	}
	noteCosts(mode, plain, names, costs, ceiling, rate, Median(source), Median(dest))
	if m.scale.move < GiB {
		return
	}
	kind := map[bool]string{true: "plain", false: "TLS"}[plain]
	what := fmt.Sprintf("%s, %s, %s", mode, kind, sizeName(m.scale.move))
	if plain {
		target := map[string]float64{"postcopy": 1.5, "stop": 1.6}[mode]
		m.judge(Row{What: what, Target: target, Got: rate, Unit: "GiB/s", AtLeast: true})
	}
	m.judge(Row{What: what + ", of the ceiling", Target: 0.85, Got: rate / ceiling, AtLeast: true,
		Of: fmt.Sprintf("%.2f / %.2f GiB/s", rate, ceiling)})
}

func noteCosts(mode string, plain bool, names []string, costs []float64, ceiling, rate, source, dest float64) {
	var text strings.Builder
	tw := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(tw, "\t%s, plain lanes: %v\tprocessor time per GiB\tGiB/s of one processor\t\n", mode, plain)
	for i, name := range names {
		times := 1.0
		switch {
		case name == "sum":
			times = 2
		case name == "seal" && plain:
			continue
		}
		fmt.Fprintf(tw, "\t%s\t%.0f ms\t%.2f\t\n", name, times*costs[i]*1000, 1/(times*costs[i]))
	}
	fmt.Fprintf(tw, "\tceiling of all\t\t%.2f (all processors)\t\n\tmeasured\t\t%.2f\t\n", ceiling, rate)
	fmt.Fprintf(tw, "\tused by daemons and pager\t%.0f + %.0f ms\t\t\n", source, dest)
	_ = tw.Flush()
	note("\n%s", text.String())
}
