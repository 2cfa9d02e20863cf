package bench

import (
	"os/exec"
	"sync"
	"time"
)

// peers are the sub-benchmarks of other programs. What is not installed is left
// out, with a word of how to get it: none of our figures needs them.
func peers(scale) (list []benchmark) {
	have := func(program, pkg string) bool {
		_, err := exec.LookPath(program)
		if err != nil {
			missing.note(program, pkg)
		}
		return err == nil
	}
	if have(qemuBinary, "qemu-system-x86") {
		list = append(list, benchmark{"qemu-fresh", func(m *meter) { qemu(m, false) }},
			benchmark{"qemu-touched", func(m *meter) { qemu(m, true) }})
	}
	if have(iperfBinary, "iperf3") {
		list = append(list, benchmark{"iperf3", iperf})
	}
	return list
}

var missing peersMissing

type peersMissing struct {
	mu    sync.Mutex
	noted map[string]bool
}

func (p *peersMissing) note(program, pkg string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.noted == nil {
		p.noted = map[string]bool{}
	}
	if !p.noted[program] {
		note("\nnot compared with %s, which is not here: apt-get install --no-install-recommends %s\n", program, pkg)
	}
	p.noted[program] = true
}

// qemu is QEMU's multifd with four channels, pre-copy, from the command until it
// runs at the destination.
func qemu(m *meter, touched bool) {
	st := m.stage(true)
	q, err := st.NewQEMU(m.ctx, max(m.scale.move, 64*mib), touched)
	m.must(err)
	m.closing(q.Close)
	var rates, downs []float64
	for m.loop() {
		backing, err := back(int(q.bytes) + backAhead)
		m.must(err)
		total, down, err := q.Move(m.ctx)
		m.must(err)
		m.must(backing.Release())
		rates, downs = append(rates, Rate(float64(q.Bytes()), total)), append(downs, MS(down))
	}
	m.report(Median(rates), "GiB/s")
	m.report(Median(downs), "downtime-ms")
	name := "qemu fresh"
	if touched {
		name = "qemu touched"
	}
	m.remember(name, Median(rates))
}

func iperf(m *meter) {
	st := m.stage(true)
	var rates []float64
	for m.loop() {
		r, err := st.Iperf(m.ctx, time.Second)
		m.must(err)
		rates = append(rates, r)
	}
	m.report(Median(rates), "GiB/s")
}
