package fleet

import (
	"fmt"
	"math/rand/v2"
	"syscall"
	"testing"
)

// anywhere is a fleet in which each process may go to each host.
func anywhere(hosts, processes int, shared bool, l Limits) Fleet {
	r := rand.New(rand.NewPCG(1, 4))
	f := rack(hosts, 1, processes, r, l)
	var all []string
	for _, h := range f.Hosts {
		all = append(all, h.Name)
	}
	for i := range f.Processes {
		p := &f.Processes[i]
		p.Host = f.Hosts[r.IntN(hosts)].Name
		if p.To = all; !shared { // no two are alike
			at := i % hosts
			p.To = append(append([]string(nil), all[at:]...), all[:at]...)
		}
	}
	return f
}

// end leads a schedule to its end. One migration ends at a time, and is followed by a Next.
func end(b *testing.B, f Fleet, to map[string]string) {
	s, err := NewSchedule(f, to)
	if err != nil {
		b.Fatal(err)
	}
	var running []string
	over := 0
	for s.Left() > 0 || len(running) > 0 {
		for _, id := range s.Next() {
			s.Begin(id)
			running = append(running, id)
		}
		if len(running) == 0 {
			b.Fatal("nothing runs")
		}
		s.End(running[0], true)
		running = running[1:]
		over++
	}
	if over != len(f.Processes) {
		b.Fatalf("%d of %d are over", over, len(f.Processes))
	}
}

// processors reports the time of processors, which others on the machine do not
// change, from now on until what it returns is called.
func processors(b *testing.B) func() {
	used := func() float64 {
		var r syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
			b.Fatal(err)
		}
		return float64(r.Utime.Nano()+r.Stime.Nano()) / 1e6
	}
	before := used()
	return func() { b.ReportMetric((used()-before)/float64(b.N), "cpu-ms/op") }
}

var benchLimits = []Limits{{}, {PerHost: 2}, {AtOnce: 50}, {AtOnce: 200, PerHost: 4, PerLink: 1}}

// 1000 hosts and 10 000 processes, planned and led to the end.
func BenchmarkPlaceAndSchedule(b *testing.B) {
	for _, shared := range []bool{true, false} {
		for _, l := range benchLimits {
			b.Run(fmt.Sprintf("shared=%v/atonce=%d/host=%d/link=%d", shared, l.AtOnce, l.PerHost, l.PerLink), func(b *testing.B) {
				f := anywhere(1000, 10_000, shared, l)
				defer processors(b)()
				for b.Loop() {
					p := Place(f)
					if len(p.Refused) > 0 {
						b.Fatal(len(p.Refused), "refused")
					}
					end(b, f, p.To)
				}
			})
		}
	}
}

func BenchmarkPlace(b *testing.B) {
	f := anywhere(1000, 10_000, true, Limits{})
	b.Run("fits", func(b *testing.B) {
		for b.Loop() {
			Place(f)
		}
	})
	for i := range f.Hosts {
		f.Hosts[i].Memory = 16 * gb
	}
	b.Run("tight", func(b *testing.B) {
		for b.Loop() {
			b.ReportMetric(float64(len(Place(f).Refused)), "refused")
		}
	})
}

func BenchmarkOneHostToAll(b *testing.B) {
	f := rack(1000, 1, 10_000, rand.New(rand.NewPCG(1, 4)), Limits{AtOnce: 8})
	p := Place(f)
	defer processors(b)()
	for b.Loop() {
		end(b, f, p.To)
	}
}

func BenchmarkShare(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 4))
	rs := make([]Running, 1000)
	for i := range rs {
		rs[i] = Running{DirtyRate: float64(r.IntN(100)) * mb, Rate: float64(r.IntN(100)) * mb, Left: r.Uint64N(1 << 34)}
	}
	for b.Loop() {
		Share(1e9, rs)
	}
}

// The evacuation of 100 of 1000 hosts, simulated.
func BenchmarkSimulate(b *testing.B) {
	f := rack(1000, 100, 1000, rand.New(rand.NewPCG(1, 3)), Limits{PerHost: 2})
	defer processors(b)()
	for b.Loop() {
		if _, err := (Simulation{Fleet: f}).Run(); err != nil {
			b.Fatal(err)
		}
	}
}
