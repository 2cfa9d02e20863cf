package fleet

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestPlace(t *testing.T) {
	f := Fleet{
		Hosts: []Host{{Name: "old", Rate: 1e9}, {Name: "slow", Rate: 1e8}, {Name: "fast", Rate: 1e9}, {Name: "small", Memory: gb, Rate: 1e9}, {Name: "one", Processes: 1, Rate: 1e9}},
		Processes: []Process{
			{ID: "prefers", Host: "old", Memory: gb, To: []string{"small", "fast"}},
			{ID: "fast", Host: "old", Memory: 8 * gb, To: []string{"slow", "fast"}},
			{ID: "stays", Host: "old", To: []string{"old"}},
			{ID: "nowhere", Host: "old"},
			{ID: "large", Host: "old", Memory: 3 * gb, To: []string{"old", "small"}},
			{ID: "first", Host: "old", Memory: 2, To: []string{"one"}},
			{ID: "second", Host: "old", Memory: 1, To: []string{"one"}},
		},
	}
	p := Place(f)
	checkPlacement(t, f, p)
	for id, host := range map[string]string{"prefers": "small", "fast": "fast", "first": "one"} {
		if p.To[id] != host {
			t.Errorf("%s goes to %q, want %s", id, p.To[id], host)
		}
	}
	for id, why := range map[string]string{
		"stays":   "it may only go to old, where it is",
		"nowhere": "there is no host that it may go to",
		"large":   "it has 3.0 GiB, and of the 1 hosts that it may go to small has most room left, 0 bytes",
		"second":  "none of the 1 hosts that it may go to takes another process",
	} {
		if p.Refused[id] != why {
			t.Errorf("%s: %q, want %q", id, p.Refused[id], why)
		}
	}
}

// One that has a choice makes room for one that has none.
func TestPlaceMakesRoom(t *testing.T) {
	f := Fleet{Hosts: []Host{{Name: "old"}, {Name: "a", Memory: 4 * gb}, {Name: "b", Memory: 4 * gb}}, Processes: []Process{
		{ID: "free", Host: "old", Memory: 4 * gb, To: []string{"a", "b"}}, {ID: "bound", Host: "old", Memory: 3 * gb, To: []string{"a"}}}}
	if p := Place(f); p.To["bound"] != "a" || p.To["free"] != "b" {
		t.Errorf("%+v", p)
	}
}

// The last host to finish does so within Graham's bound of the best that there is, which
// is found by trying all.
func TestPlaceIsBalanced(t *testing.T) {
	for range 300 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 6))
		hosts := 2 + r.IntN(2)
		f := Fleet{Hosts: []Host{{Name: "old"}}}
		var to []string
		for i := range hosts {
			to = append(to, fmt.Sprint(i))
			f.Hosts = append(f.Hosts, Host{Name: to[i], Rate: 1e9})
		}
		var takes []float64
		for i := range 1 + r.IntN(8) {
			f.Processes = append(f.Processes, Process{ID: fmt.Sprint(i), Host: "old", Memory: r.Uint64N(4 * gb), To: to})
			takes = append(takes, f.Processes[i].seconds(1e9))
		}
		var best func(i int, busy []float64) float64
		best = func(i int, busy []float64) float64 {
			if i == len(takes) {
				return slices.Max(busy)
			}
			least := math.Inf(1)
			for h := range busy {
				busy[h] += takes[i]
				least = min(least, best(i+1, busy))
				busy[h] -= takes[i]
			}
			return least
		}
		busy, m := make([]float64, hosts), float64(hosts)
		p := Place(f)
		for i := range f.Processes {
			busy[slices.Index(to, p.To[f.Processes[i].ID])] += takes[i]
		}
		if got, want := slices.Max(busy), best(0, make([]float64, hosts)); got > want*(4.0/3-1/(3*m))+1e-9 {
			t.Fatalf("seed %d: %.3f s, %.3f would do", seed, got, want)
		}
	}
}

// Hosts get as much as their links carry.
func TestPlaceMindsRates(t *testing.T) {
	f := anywhere(10, 1000, true, Limits{})
	for i := range f.Hosts {
		f.Hosts[i].Memory, f.Hosts[i].Processes = 0, 0
	}
	f.Hosts[3].Rate *= 4
	fast := 0
	for _, h := range Place(f).To {
		if h == f.Hosts[3].Name {
			fast++
		}
	}
	if fast < 220 || fast > 330 { // 4 of 13 parts, without those that are there
		t.Errorf("%d of 1000 go to the host that is four times as fast", fast)
	}
}

// No process of the host that finishes last could go elsewhere and be there earlier.
func TestPlaceRelievesTheLast(t *testing.T) {
	f := Fleet{Hosts: []Host{{Name: "old"}, {Name: "a"}, {Name: "b"}}, Processes: []Process{
		{ID: "free", Host: "old", Memory: 4 * gb, To: []string{"a", "b"}}, {ID: "bound", Host: "old", Memory: 3 * gb, To: []string{"a"}}}}
	if p := Place(f); p.To["bound"] != "a" || p.To["free"] != "b" {
		t.Errorf("%+v", p)
	}
	for range 500 {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 9))
		f := randomFleet(r)
		for i := range f.Hosts {
			f.Hosts[i] = Host{Name: f.Hosts[i].Name, Rate: 1e9}
		}
		p := Place(f)
		busy := map[string]float64{}
		last := f.Hosts[0].Name
		for _, q := range f.Processes {
			if to, ok := p.To[q.ID]; ok {
				busy[to] += q.seconds(1e9)
			}
		}
		for h := range busy {
			if busy[h] > busy[last] {
				last = h
			}
		}
		for _, q := range f.Processes {
			for _, h := range q.To {
				if p.To[q.ID] == last && h != q.Host && busy[h]+q.seconds(1e9) < busy[last]*(1-1e-6) {
					t.Fatalf("seed %d: %s goes to %s, %.2f s, and %s would have been done with it in %.2f s", seed, q.ID, last, busy[last], h, busy[h]+q.seconds(1e9))
				}
			}
		}
	}
}
