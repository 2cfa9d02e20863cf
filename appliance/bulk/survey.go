package bulk

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/plan/fleet"
)

// survey finds what is to be moved: what a group selects and is not on one of its hosts.
// The first group that selects a process has it.
func (h *hosts) survey(ctx context.Context) (items []Item, err error) {
	all, err := h.census(ctx)
	if err != nil {
		return nil, err
	}
	taken := map[string]bool{}
	for k := range h.file.Groups {
		g := &h.file.Groups[k]
		found := 0
		to := h.file.Destinations(g)
		for _, name := range h.names() {
			for _, p := range all[name] {
				fits := false
				for s := range g.Select {
					fits = fits || g.Select[s].picks(name, p)
				}
				if !fits {
					continue
				}
				found++
				i := Item{Host: name, PID: p.PID, Started: p.Started, Command: p.Command, User: p.User,
					Memory: p.MemoryBytes, Group: g.Name, State: Waiting}
				if slices.Contains(to, name) || taken[i.ID()] || p.Arriving {
					continue
				}
				taken[i.ID()] = true
				items = append(items, i)
			}
		}
		if found == 0 && !g.Optional {
			return nil, fmt.Errorf("group %s selects no process of hosts %s; write \"optional: true\" if that may be", g.Name, strings.Join(h.names(), ", "))
		}
	}
	return items, nil
}

func (f *File) group(name string) *Group {
	for k := range f.Groups {
		if f.Groups[k].Name == name {
			return &f.Groups[k]
		}
	}
	return nil
}

// fleet is the run for the planner, as far as items are still to be moved.
func (f *File) fleet(items []Item) fleet.Fleet {
	out := fleet.Fleet{Limits: fleet.Limits{AtOnce: f.atOnce(), PerHost: f.Limits.PerHost, PerLink: f.Limits.PerLink, Budget: f.BudgetBytes()}}
	for name, h := range f.Hosts {
		out.Hosts = append(out.Hosts, fleet.Host{Name: name, Memory: uint64(h.Capacity.Memory), Processes: h.Capacity.Processes})
	}
	slices.SortFunc(out.Hosts, func(a, b fleet.Host) int { return strings.Compare(a.Name, b.Name) })
	for k := range f.Groups {
		g := &f.Groups[k]
		out.Groups = append(out.Groups, fleet.Group{Name: g.Name, After: g.After, AtOnce: g.AtOnce})
	}
	for _, i := range items {
		if i.State != Waiting && i.State != Moving {
			continue
		}
		to := []string{i.To} // where it is going already
		if i.State == Waiting {
			to = slices.DeleteFunc(slices.Clone(f.Destinations(f.group(i.Group))), func(n string) bool {
				return n == i.Host || slices.Contains(i.Full, n) || f.full(n, items)
			})
		}
		out.Processes = append(out.Processes, fleet.Process{ID: i.ID(), Host: i.Host, Memory: i.Memory, To: to, Group: i.Group})
	}
	for k := range out.Hosts {
		h := &out.Hosts[k]
		memory, processes := f.arrived(h.Name, items)
		if h.Memory > 0 {
			h.Memory -= min(memory, h.Memory-1) // full hosts are nobody's destination
		}
		if h.Processes > 0 {
			h.Processes -= min(processes, h.Processes-1)
		}
	}
	return out
}

// arrived is what of this run a host has taken.
func (f *File) arrived(host string, items []Item) (memory uint64, processes int) {
	for _, i := range items {
		if i.State == Done && i.To == host {
			memory, processes = memory+i.Memory, processes+1
		}
	}
	return memory, processes
}

// full reports whether a host has taken all that it may.
func (f *File) full(host string, items []Item) bool {
	c := f.Hosts[host].Capacity
	memory, processes := f.arrived(host, items)
	return c.Memory > 0 && memory >= uint64(c.Memory) || c.Processes > 0 && processes >= c.Processes
}

// budgetAtOnce is how many share a budget where nothing says how many move at one time.
const budgetAtOnce = 4

// atOnce is how many may move at one time, 0 for any number. A budget is shared out in as
// many equal parts.
func (f *File) atOnce() int {
	if f.Limits.AtOnce == 0 && f.BudgetBytes() > 0 {
		return budgetAtOnce
	}
	return f.Limits.AtOnce
}

// picks is Fits, with what the daemon says of the pidfile.
func (s *Selector) picks(host string, p appliance.ProcessInfo) bool {
	return s.Fits(host, p) && (s.PIDFile == "" || slices.Contains(p.PIDFiles, s.PIDFile))
}

// pidFiles are those that the daemon of a host has to be asked for.
func (f *File) pidFiles(host string) (paths []string) {
	for k := range f.Groups {
		for _, s := range f.Groups[k].Select {
			if s.NeedsFile() && (s.Host == "" || s.Host == host) && !slices.Contains(paths, s.PIDFile) {
				paths = append(paths, s.PIDFile)
			}
		}
	}
	return paths
}

// request is what the host of an item is asked for.
func (h *hosts) request(i *Item, bandwidth string) appliance.MigrateRequest {
	r := h.file.group(i.Group).Request(i.PID, h.file.Hosts[i.To].Peer())
	r.ID, r.Started, r.MaxBandwidth = i.Migration, i.Started, bandwidth
	return r
}
