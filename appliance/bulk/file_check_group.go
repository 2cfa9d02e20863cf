package bulk

import (
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/appliance"
)

func (f *File) checkGroups() error {
	if len(f.Groups) == 0 {
		return bad("groups", "is missing; write at least one, with a name and what it selects")
	}
	names, selectors := map[string]int{}, map[Selector]string{}
	for i := range f.Groups {
		g, field := &f.Groups[i], fmt.Sprintf("groups[%d]", i)
		if err := checkName(field+".name", g.Name, true); err != nil {
			return err
		}
		if j, ok := names[g.Name]; ok {
			return bad(field+".name", "%s is the name of groups[%d], too", g.Name, j)
		}
		names[g.Name] = i
		if len(g.Select) == 0 {
			return bad(field+".select", "is missing; say which processes, as in [{host: HOST, unit: redis}]")
		}
		for j := range g.Select {
			s, at := &g.Select[j], fmt.Sprintf("%s.select[%d]", field, j)
			if err := f.checkSelector(at, s); err != nil {
				return err
			}
			if other := selectors[*s]; other != "" {
				return bad(at, "is the same as %s; a process can be in one group only", other)
			}
			selectors[*s] = at
		}
		if err := f.checkTo(field+".to", g); err != nil {
			return err
		}
		if err := g.checkOptions(field); err != nil {
			return err
		}
	}
	return nil
}

func (f *File) checkSelector(field string, s *Selector) error {
	if *s == (Selector{Host: s.Host}) {
		return bad(field, "selects everything; say what, and unit: \"*\" or command: \"*\" where all is meant")
	}
	if s.Host != "" {
		if err := f.checkHost(field+".host", s.Host); err != nil {
			return err
		}
	}
	for _, x := range []struct{ key, pattern string }{{"command", s.Command}, {"cgroup", s.Cgroup}, {"unit", s.Unit}} {
		if _, err := path.Match(x.pattern, ""); err != nil {
			return bad(field+"."+x.key, "%q is no pattern: a [ without its ], or a \\ at the end", x.pattern)
		}
	}
	switch {
	case s.PID != 0 && s.Host == "":
		return bad(field+".pid", "needs host: on each host another process has it")
	case s.PIDFile != "" && s.Host == "":
		return bad(field+".pidfile", "needs host: that on which the file lies")
	case s.PIDFile != "" && s.PID != 0:
		return bad(field+".pidfile", "contradicts pid; leave one of them out")
	case s.PIDFile != "" && !path.IsAbs(s.PIDFile):
		return bad(field+".pidfile", "%q is not an absolute path", s.PIDFile)
	case s.Cgroup != "" && !path.IsAbs(s.Cgroup):
		return bad(field+".cgroup", "%q does not begin with /; write it as in /proc/PID/cgroup, such as /system.slice", s.Cgroup)
	case strings.HasPrefix(s.Label, "="):
		return bad(field+".label", "%q is not KEY or KEY=VALUE", s.Label)
	}
	return nil
}

// checkTo finds destinations that no process could go to.
func (f *File) checkTo(field string, g *Group) error {
	if err := f.checkNames(field, g.To); err != nil {
		return err
	}
	for i, h := range g.To {
		if slices.Contains(f.Evacuate, h) {
			return bad(fmt.Sprintf("%s[%d]", field, i), "%s is evacuated: nothing comes to it", h)
		}
	}
	if to := f.Destinations(g); len(to) == 1 {
		for i, s := range g.Select {
			if s.Host == to[0] {
				at := fmt.Sprintf("%s.select[%d].host", strings.TrimSuffix(field, ".to"), i)
				return bad(at, "%s is the only host that the group may go to; what is there cannot move", s.Host)
			}
		}
	}
	return nil
}

// checkOptions finds what the daemon would refuse for each process.
func (g *Group) checkOptions(field string) error {
	if _, err := appliance.ParseBandwidth(g.MaxBandwidth); err != nil {
		return bad(field+".max_bandwidth", "%v", err)
	}
	switch {
	case g.Deadline < 0:
		return bad(field+".deadline", "%s is negative", g.Deadline)
	case g.MaxDowntime < 0:
		return bad(field+".max_downtime", "%s is negative", g.MaxDowntime)
	case g.MaxDowntime > 0 && (g.Mode == "postcopy" || g.Mode == "stop"):
		return bad(field+".max_downtime", "steers hybrid and precopy, the mode is %s", g.Mode)
	case !(g.Throttle >= 0 && g.Throttle < 1): // NaN, too
		return bad(field+".throttle", "%v is no part of the time; write 0 to 0.99", g.Throttle)
	case g.Throttle > 0 && g.Mode != "precopy":
		return bad(field+".throttle", "steers precopy; write mode: precopy, too")
	case g.Shown == appliance.ShownKeep && g.Trap == appliance.TrapUFFD:
		return bad(field+".shown", "nothing is shown with trap uffd, so nothing can be kept; leave one of the two out")
	}
	for _, old := range slices.Sorted(maps.Keys(g.Addresses)) {
		for _, a := range []string{old, g.Addresses[old]} {
			if _, err := netip.ParseAddr(a); err != nil {
				return bad(field+".addresses."+old, "%q is no IP address; write OLD: NEW", a)
			}
		}
	}
	return nil
}

// checkOrder finds groups that wait for nobody, or for each other.
func (f *File) checkOrder() error {
	index := map[string]int{}
	for i, g := range f.Groups {
		index[g.Name] = i
	}
	for i, g := range f.Groups {
		for j, a := range g.After {
			at := fmt.Sprintf("groups[%d].after[%d]", i, j)
			if _, ok := index[a]; !ok {
				return bad(at, "%q is none of groups: %s", a, strings.Join(f.groupNames(), ", "))
			}
			if slices.Contains(g.After[:j], a) {
				return bad(at, "%s is in the list already", a)
			}
		}
	}
	// A group that is entered again while it is open closes a circle.
	state := make([]int, len(f.Groups)) // 0 not seen, 1 open, 2 done
	var trail []string
	var visit func(i int) error
	visit = func(i int) error {
		state[i] = 1
		trail = append(trail, f.Groups[i].Name)
		for j, a := range f.Groups[i].After {
			k := index[a]
			if state[k] == 1 {
				circle := append(slices.Clone(trail[slices.Index(trail, a):]), a)
				return bad(fmt.Sprintf("groups[%d].after[%d]", i, j), "goes in a circle: %s", strings.Join(circle, " after "))
			}
			if state[k] == 0 {
				if err := visit(k); err != nil {
					return err
				}
			}
		}
		trail, state[i] = trail[:len(trail)-1], 2
		return nil
	}
	for i := range f.Groups {
		if state[i] == 0 {
			if err := visit(i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *File) groupNames() []string {
	var names []string
	for _, g := range f.Groups {
		names = append(names, g.Name)
	}
	if len(names) > 8 {
		names = append(names[:8:8], "...")
	}
	return names
}
