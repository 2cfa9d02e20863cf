package fleet

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

const gb = 1 << 30

// rack is a fleet of equal hosts with 10 Gbit/s, of which the first evacuate.
func rack(hosts, evacuated, processes int, r *rand.Rand, l Limits) Fleet {
	f := Fleet{Limits: l}
	var to []string
	for i := range hosts {
		h := Host{Name: fmt.Sprintf("host%04d", i), Memory: 256 * gb, Processes: 60, Rate: 1.25e9}
		f.Hosts = append(f.Hosts, h)
		if i >= evacuated {
			to = append(to, h.Name)
		}
	}
	for i := range processes {
		// Sizes of programs are spread over orders of magnitude: 0.1 to 16 GiB.
		p := Process{ID: fmt.Sprintf("p%05d", i), Host: f.Hosts[i%evacuated].Name, To: to,
			Memory: uint64(0.1 * gb * math.Pow(160, r.Float64()))}
		if r.IntN(2) == 0 {
			p.DirtyRate = 1e6 * math.Pow(100, r.Float64()) // 1 to 100 MB/s
		}
		f.Processes = append(f.Processes, p)
	}
	return f
}

// Evacuating 100 of 1000 hosts takes at most 1.2 times what their links need.
func TestEvacuationIsNearTheBound(t *testing.T) {
	for seed := range uint64(5) {
		for _, l := range []Limits{{PerHost: 1}, {PerHost: 2}, {PerHost: 4, PerLink: 1}, {AtOnce: 150, PerHost: 2}} {
			m := Simulation{Fleet: rack(1000, 100, 1000, rand.New(rand.NewPCG(seed, 3)), l), Seed: seed}
			res, err := m.Run()
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("seed %d, limits %+v:\n%s", seed, l, Report{res})
			if res.Done != 1000 || res.Failed != 0 {
				t.Errorf("%d arrived, %d failed", res.Done, res.Failed)
			}
			if res.Ratio() > 1.2 || res.Ratio() < 1 {
				t.Errorf("it takes %.3f times the bound", res.Ratio())
			}
		}
	}
}

// One migration alone is what a link's rate and the dirty rate make of it.
func TestSimulateOne(t *testing.T) {
	f := Fleet{Hosts: []Host{{Name: "a", Rate: 1e9}, {Name: "b", Rate: 5e8}},
		Processes: []Process{{ID: "p", Host: "a", Memory: 1e9, To: []string{"b"}}}}
	for _, c := range []struct {
		name              string
		dirty             float64
		precopy           bool
		total, down, sent float64
		done, postcopy    int
	}{
		{"idle", 0, false, 2.1, 0, 1e9, 1, 0},
		// 2 s, 0.4 s (200 MB), 80 ms (40 MB), and 16 ms (8 MB) of downtime with the state.
		{"converges", 1e8, true, 2.1 + .4 + .08, .016, 1.248e9, 1, 0},
		// Two rounds would make it more than 1.25 times the memory: 600 MB follow.
		{"follows", 3e8, false, 2.1 + 1.2, 0, 1.6e9, 1, 1},
		{"gives up", 6e8, true, 0, 0, 0, 0, 0},
	} {
		f.Processes[0].DirtyRate = c.dirty
		m := Simulation{Fleet: f, PreCopy: c.precopy, State: time.Millisecond}
		if c.precopy {
			m.MaxDowntime = 50 * time.Millisecond
		}
		r, err := m.Run()
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s\n%s", c.name, Report{r})
		if r.Done != c.done || r.Failed != 1-c.done || r.PostCopy != c.postcopy {
			t.Errorf("%s: %d done, %d failed, %d post-copy", c.name, r.Done, r.Failed, r.PostCopy)
		}
		if c.done == 0 {
			continue
		}
		if math.Abs(r.Total.Seconds()-c.total-c.down) > .005 || math.Abs(r.Downtime.Seconds()-c.down) > .0025 || math.Abs(float64(r.Bytes)-c.sent) > 1e6 {
			t.Errorf("%s: total %v, downtime %v, %d bytes", c.name, r.Total, r.Downtime, r.Bytes)
		}
		if r.Bound != 2*time.Second {
			t.Errorf("%s: bound %v", c.name, r.Bound)
		}
	}
}

// Rates are max-min fair: nobody could have more but from somebody who has no more.
func TestLinksAreShared(t *testing.T) {
	for range 2000 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 7))
		rates := make([]float64, 2+r.IntN(6))
		for i := range rates {
			rates[i] = float64(1+r.IntN(10)) * 1e8
		}
		l := newLinks(rates)
		var all []*migration
		for range 40 {
			if len(all) > 0 && r.IntN(3) == 0 {
				i := r.IntN(len(all))
				l.remove(all[i])
				all = append(all[:i], all[i+1:]...)
			} else {
				m := &migration{from: int32(r.IntN(len(rates))), to: int32(r.IntN(len(rates))), capped: r.IntN(4) == 0, most: float64(1+r.IntN(40)) * 1e7}
				l.add(m)
				all = append(all, m)
			}
			l.share()
			used, most := map[int]float64{}, map[int]float64{}
			for _, m := range all {
				for _, w := range m.ways() {
					used[w] += m.rate
					most[w] = max(most[w], m.rate)
				}
			}
			for _, m := range all {
				bottleneck := m.capped && near(m.rate, m.most)
				for _, w := range m.ways() {
					if used[w] > l.rate[w]*(1+1e-9) {
						t.Fatalf("seed %d: %v of %v are used", seed, used[w], l.rate[w])
					}
					bottleneck = bottleneck || near(used[w], l.rate[w]) && near(most[w], m.rate)
				}
				if !bottleneck || m.rate <= 0 || m.capped && m.rate > m.most*(1+1e-9) {
					t.Fatalf("seed %d: a migration has %v and could have more, or has too much", seed, m.rate)
				}
			}
		}
	}
}

// A simulation keeps to all limits, says so in its events, and is the same each time.
func TestSimulateRandomFleets(t *testing.T) {
	done, failed, followed := 0, 0, 0
	for range 300 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 8))
		f := randomFleet(r)
		m := Simulation{Fleet: f, To: Place(f).To, Seed: seed, Failures: .2 * r.Float64(), PreCopy: r.IntN(2) == 0}
		reports, err := Compare(m)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		again, err := m.Run()
		if err != nil || fmt.Sprint(*again) != fmt.Sprint(*reports[0]) {
			t.Fatalf("seed %d: %v, and %v (%v)", seed, *reports[0], *again, err)
		}
		for _, res := range reports {
			c := newChecker(f, m.To)
			for i, e := range res.Events {
				delete(c.running, e.ID)
				switch e.What {
				case Began:
					if why := c.early(e.ID); why != "" {
						t.Fatalf("seed %d, %s: %s", seed, res.Order, why)
					}
					c.running[e.ID] = true
				case Done:
					c.done[e.ID] = true
				case Failed:
					c.out[e.ID] = true
				}
				if i > 0 && e.At < res.Events[i-1].At {
					t.Fatalf("seed %d: time goes back", seed)
				}
				if why := c.broken(); why != "" {
					t.Fatalf("seed %d, %s: %s", seed, res.Order, why)
				}
			}
			if len(c.done) != res.Done || len(c.out) != res.Failed || res.Done+res.Failed != len(m.To) || len(c.running) != 0 {
				t.Fatalf("seed %d, %s: %d done, %d failed of %d", seed, res.Order, res.Done, res.Failed, len(m.To))
			}
			if res.Total < res.Bound {
				t.Fatalf("seed %d, %s: %v, less than the bound of %v", seed, res.Order, res.Total, res.Bound)
			}
			done, failed, followed = done+res.Done, failed+res.Failed, followed+res.PostCopy
		}
	}
	t.Logf("%d done, of these %d followed, %d failed", done, followed, failed)
	if done < 1000 || failed < 100 || followed < 50 {
		t.Error("too few to tell anything")
	}
}

// busyRack has processes that go to and fro between few hosts, most of them on the
// first: what runs beside what decides.
func busyRack(seed uint64, l Limits) Fleet {
	r := rand.New(rand.NewPCG(seed, 12))
	f := rack(16, 16, 240, r, l)
	for i := range f.Hosts {
		f.Hosts[i].Memory, f.Hosts[i].Processes = 0, 0
	}
	for i := range f.Processes {
		p := &f.Processes[i]
		p.Host = f.Hosts[min(r.IntN(16), r.IntN(16))].Name
		for _, h := range r.Perm(16)[:4] {
			p.To = append(p.To, f.Hosts[h].Name)
		}
	}
	return f
}

// Where limits bind, longest first and spread over links beats the other orders.
func TestOrdersDiffer(t *testing.T) {
	for _, l := range []Limits{{AtOnce: 6, PerHost: 2}, {PerHost: 2}} {
		sums := map[Order]float64{}
		for seed := range uint64(5) {
			rep, err := Compare(Simulation{Fleet: busyRack(seed, l), Seed: seed, Failures: .02})
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("seed %d, limits %+v\n%s", seed, l, rep)
			if rep[0].Failed != rep[1].Failed || rep[0].Failed == 0 {
				t.Errorf("seed %d: %d failures in one order, %d in another one", seed, rep[0].Failed, rep[1].Failed)
			}
			for _, r := range rep {
				sums[r.Order] += r.Ratio()
			}
		}
		if sums[LPT] > .95*sums[Listed] || sums[LPT] > .95*sums[Smallest] {
			t.Errorf("limits %+v: %v", l, sums)
		}
	}
}

// With a budget all together keep to it, and those that cannot converge beside each other
// do so one after the other.
func TestSimulateBudget(t *testing.T) {
	f := rack(40, 8, 80, rand.New(rand.NewPCG(1, 3)), Limits{AtOnce: 8, Budget: 2.5e8})
	r, err := Simulation{Fleet: f}.Run()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", Report{r})
	if least := time.Duration(float64(r.Bytes) / 2.5e8 * 1e9); r.Total < least || r.Done != 80 {
		t.Errorf("%d bytes in %v, %d done", r.Bytes, r.Total, r.Done)
	}
	if r.Ratio() > 1.2 {
		t.Errorf("it takes %.3f times the bound", r.Ratio())
	}
}

func TestReport(t *testing.T) {
	r := Report{{Order: LPT, Total: 3 * time.Second, Bound: 2 * time.Second, Downtime: time.Second, MaxDowntime: 9 * time.Millisecond,
		Bytes: 3 * gb, Memory: 2 * gb, Done: 7, PostCopy: 1, Failed: 2, Refused: 4, Most: 5}}
	want := "  order  total  bound  ratio  downtime  largest    bytes   extra  done  post-copy  failed  refused  at once\n" +
		"    lpt  3.0 s  2.0 s  1.500    1.00 s     9 ms  3.0 GiB  50.0 %     7          1       2        4        5\n"
	if r.String() != want {
		t.Errorf("\n%s", r)
	}
}
