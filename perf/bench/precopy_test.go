package bench

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/page"
)

// BenchmarkPrecopy is what copying while the program runs reaches.
//
// qemu-fresh, qemu-touched, iperf3: the peers, where they are on the machine.
//
// idle: a process that writes nothing. The rate is that of the whole migration,
// from the request until it runs with all its pages; beside it the ceiling of the
// stages (see Limits) and QEMU.
//
// dirty: a quarter of the memory is written at a rate, any page as likely. Sent is
// every page that was sent, whatever it took on the wire, over the memory.
//
// order: pages sent twice of a zipf writer, by last write and by address.
func BenchmarkPrecopy(b *testing.B) { runAll(b, precopies) }

func precopies(s scale) []benchmark {
	list := append(peers(s), []benchmark{
		{"idle-hybrid-plain", func(m *meter) { idle(m, "hybrid", true) }},
		{"idle-precopy-plain", func(m *meter) { idle(m, "precopy", true) }},
		{"idle-hybrid-tls", func(m *meter) { idle(m, "hybrid", false) }},
		{"idle-precopy-tls", func(m *meter) { idle(m, "precopy", false) }},
	}...)
	for _, rate := range s.rates {
		list = append(list,
			benchmark{fmt.Sprintf("dirty-%d-hybrid", rate), func(m *meter) { dirtied(m, "hybrid", rate, 0) }},
			benchmark{fmt.Sprintf("dirty-%d-precopy", rate), func(m *meter) { dirtied(m, "precopy", rate, 0) }})
	}
	last := s.rates[len(s.rates)-1]
	return append(list,
		benchmark{fmt.Sprintf("dirty-%d-precopy-throttle", last), func(m *meter) { dirtied(m, "precopy", last, 0.8) }},
		benchmark{"order-precopy", func(m *meter) { order(m, "precopy") }},
		benchmark{"order-hybrid", func(m *meter) { order(m, "hybrid") }},
	)
}

func idle(m *meter, mode string, plain bool) {
	st := m.stage(plain)
	limits, err := st.NewLimits(m.touch(), m.limits)
	m.must(err)
	m.closing(limits.Close)
	g, err := st.Workload(m.ctx, m.scale.move)
	m.must(err)
	bytes := float64(m.scale.move)
	var rates, wires, source, dest []float64
	for m.loop() {
		m.must(limits.Turn(m.ctx))
		h := m.move(st, g, mode)
		rates = append(rates, Rate(bytes, h.Whole()))
		wires = append(wires, float64(h.Report.BytesWire)/bytes)
		source, dest = append(source, MS(h.SourceCPU)/(bytes/GiB)), append(dest, MS(h.DestCPU)/(bytes/GiB))
	}
	rate, ceiling := Median(rates), limits.Ceiling(!plain)
	m.report(rate, "GiB/s")
	m.report(ceiling, "ceiling-GiB/s")
	m.report(rate/ceiling, "rate/ceiling")
	m.report(limits.Wire(), "tcp-GiB/s")
	m.report(Median(wires), "wire/memory")
	m.report(Median(source), "source-cpu-ms/GiB")
	m.report(Median(dest), "dest-cpu-ms/GiB")
	names, costs := limits.Costs()
	noteCosts(mode, plain, names, costs, ceiling, rate, Median(source), Median(dest))
	kind := map[bool]string{true: "plain", false: "TLS"}[plain]
	what := fmt.Sprintf("%s of an idle process, %s, %s", mode, kind, sizeName(m.scale.move))
	m.judge(Row{What: what + ", of the ceiling", Target: 0.85, Got: rate / ceiling, AtLeast: true,
		Of: fmt.Sprintf("%.2f / %.2f GiB/s", rate, ceiling)})
	if !plain {
		return
	}
	for _, p := range []struct {
		name   string
		target float64
	}{{"fresh", 1.3}, {"touched", 1}} {
		qemu := m.recall("qemu " + p.name)
		if qemu == 0 {
			continue // not here, or not asked for
		}
		m.report(rate/qemu, "rate/qemu-"+p.name)
		m.judge(Row{What: fmt.Sprintf("%s, to QEMU multifd-4 into %s memory", what, p.name), Target: p.target, Got: rate / qemu, AtLeast: true,
			Of: fmt.Sprintf("%.2f / %.2f GiB/s", rate, qemu)})
	}
}

// hybridDowntime is what hybrid is asked to keep, in milliseconds; pre-copy has its
// default, 300.
const hybridDowntime = 50

func dirtied(m *meter, mode string, rate int, throttle float64) {
	st := m.stage(true)
	size := m.scale.move
	g, err := st.Workload(m.ctx, size, "--rate", fmt.Sprintf("%dMiB", rate), "--pattern", "uniform",
		"--working-set", strconv.FormatUint(size/4, 10))
	m.must(err)
	req, allowed := appliance.MigrateRequest{Mode: mode, Throttle: throttle}, 300.0
	if mode == "hybrid" {
		req.MaxDowntimeMS, allowed = hybridDowntime, hybridDowntime
	}
	var sent, wire, own, daemon, whole, written []float64
	turns, moves, kept, gaveUp, reason := 0, 0, 0, 0, ""
	_, at, err := g.OwnGap(m.ctx, 0)
	m.must(err)
	for m.loop() {
		turns++
		before, err := g.latest()
		m.must(err)
		written = append(written, float64(before.Writes*page.Size)/mib)
		h, moved := m.tryMove(st, g, req)
		gap, next, err := g.OwnGap(m.ctx, at)
		m.must(err)
		at = next
		if !moved {
			if gaveUp++; !strings.Contains(h.Report.Reason, "converge") {
				m.Fatalf("it failed, and not because it does not converge: %s", h.Report.Reason)
			}
			reason = h.Report.Reason
			continue
		}
		moves++
		sent = append(sent, float64(h.SentPages()*page.Size)/float64(size))
		wire = append(wire, float64(h.Report.BytesWire)/float64(size))
		own, daemon = append(own, MS(gap)), append(daemon, MS(h.Downtime()))
		whole = append(whole, h.Whole().Seconds())
		if MS(gap) <= allowed {
			kept++
		}
	}
	m.report(Median(written), "dirtied-MiB/s")
	m.report(float64(gaveUp)/float64(turns), "gave-up/run")
	what := fmt.Sprintf("%s, %d MiB/s dirtied", mode, rate)
	if throttle > 0 {
		what += fmt.Sprintf(", throttle up to %.1f", throttle)
	}
	if reason != "" {
		note("\n%s: it gave up: %s\n", what, reason)
	}
	if moves > 0 {
		m.report(Median(sent), "sent/memory")
		m.report(Median(wire), "wire/memory")
		m.report(Median(own), "own-ms")
		m.report(Quantile(own, 1), "own-max-ms")
		m.report(Median(daemon), "daemon-ms")
		m.report(Median(whole), "whole-s")
		m.report(float64(kept)/float64(moves), "kept/run")
	}
	if size < GiB {
		return
	}
	of := fmt.Sprintf("%d kept it, %d gave up, of %d; %.0f ms by the program, %.0f by the daemon", kept, gaveUp, turns, Median(own), Median(daemon))
	if converges := mode == "hybrid" || rate < 1000; converges {
		if moves > 0 {
			most := map[string]float64{"hybrid": 1.3, "precopy": 1.17}[mode]
			m.judge(Row{What: what + ", sent to memory", Target: most, Got: Median(sent)})
		}
		m.judge(Row{What: fmt.Sprintf("%s, runs that keep %.0f ms", what, allowed), Target: 0.9, Got: float64(kept) / float64(turns), AtLeast: true, Of: of})
		return
	}
	m.judge(Row{What: fmt.Sprintf("%s, runs that give up or keep %.0f ms", what, allowed), Target: 0.9,
		Got: float64(kept+gaveUp) / float64(turns), AtLeast: true, Of: of})
}

// order moves a zipf writer by both orders in turns. Rounds skip in both what is
// written before its turn.
func order(m *meter, mode string) {
	st := m.stage(true)
	size := m.scale.move
	g, err := st.Workload(m.ctx, size, "--rate", fmt.Sprintf("%dMiB", m.rates[0]), "--pattern", "zipf",
		"--working-set", strconv.FormatUint(size/4, 10))
	m.must(err)
	var twice [2][]float64 // pages: by last write, by address
	var left [2][]float64
	for m.loop() {
		for i, byAddress := range []bool{false, true} {
			h, moved := m.tryMove(st, g, appliance.MigrateRequest{Mode: mode, AddressOrder: byAddress})
			if !moved {
				continue
			}
			twice[i] = append(twice[i], max(0, float64(h.SentPages())-float64(size/page.Size)))
			left[i] = append(left[i], float64(h.Report.Rounds[len(h.Report.Rounds)-1].Pages))
		}
	}
	lru, address := Median(twice[0]), Median(twice[1])
	m.report(lru, "twice-lru-pages")
	m.report(address, "twice-address-pages")
	m.report(Median(left[0]), "left-lru-pages")
	m.report(Median(left[1]), "left-address-pages")
	m.report(float64(len(twice[0])), "lru-moves")
	m.report(float64(len(twice[1])), "address-moves")
	if lru == 0 || address == 0 {
		return // one of the two never came to an end, or sent nothing twice
	}
	m.report(lru/address, "twice-lru/address")
	m.judge(Row{What: mode + " of a zipf writer, pages sent twice, by last write to by address", Target: 0.75, Got: lru / address,
		Of: fmt.Sprintf("%.0f / %.0f", lru, address)})
}
