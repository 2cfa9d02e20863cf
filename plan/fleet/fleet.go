package fleet

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Host is a machine that processes leave or come to.
type Host struct {
	Name string
	// Memory is how many bytes it can take, and Processes how many processes,
	// beside what it has. What leaves it makes no room, as that comes too late for
	// what arrives at the same time. 0: no limit.
	Memory    uint64
	Processes int
	// Rate is what its link carries each way at once, in bytes per second. 0: not
	// known, it is taken for the slowest that is known, else for 10 Gbit/s.
	Rate float64
}

// Process is one that is to move.
type Process struct {
	ID        string
	Host      string  // where it is
	Memory    uint64  // bytes
	DirtyRate float64 // bytes per second
	// To are the hosts that it may go to, in order of preference where they are
	// equal. Its own may be among them, and is passed over. Many processes may
	// share one slice, which is also faster.
	To    []string
	Group string // "": none
}

// Group is a set of processes that waits for others.
type Group struct {
	Name   string
	After  []string // groups that must be over before
	AtOnce int      // 0: no limit
}

// Limits are what all migrations together keep to. 0: no limit.
type Limits struct {
	AtOnce  int // migrations at one time
	PerHost int // of these, that touch one host, whichever way
	PerLink int // of these, from one host to another one, this way
	// Budget is how many bytes per second all may take together, see [Share].
	Budget float64
}

// Fleet is what is to be planned. No function of this package changes it.
type Fleet struct {
	Hosts     []Host
	Processes []Process
	Groups    []Group
	Limits    Limits
}

// ErrInvalid is in the chain of what Validate and NewSchedule return.
var ErrInvalid = errors.New("fleet: cannot be planned")

func invalid(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, args...))
}

// Validate reports the first thing that is wrong: a host or group that does not
// exist or exists twice, a process that is listed twice, a number that makes no
// sense, or groups that wait for each other, with the whole circle.
func (f *Fleet) Validate() error {
	_, err := f.validate(true)
	return err
}

// validate returns the hosts, too. It passes To over where that does not matter.
func (f *Fleet) validate(to bool) (*hosts, error) {
	x, err := f.hosts()
	if err != nil {
		return nil, err
	}
	if err := f.Limits.validate(); err != nil {
		return nil, err
	}
	if err := f.validateGroups(); err != nil {
		return nil, err
	}
	groups := map[string]bool{"": true}
	for _, g := range f.Groups {
		groups[g.Name] = true
	}
	seen := make(map[string]bool, len(f.Processes))
	for i := range f.Processes {
		p := &f.Processes[i]
		switch _, known := x.number[p.Host]; {
		case p.ID == "":
			return nil, invalid("process %d of %d has no ID", i+1, len(f.Processes))
		case seen[p.ID]:
			return nil, invalid("process %s is listed twice", p.ID)
		case !known:
			return nil, invalid("process %s is on host %q, which is not listed", p.ID, p.Host)
		case !groups[p.Group]:
			return nil, invalid("process %s is of group %q, which is not listed", p.ID, p.Group)
		case !amount(p.DirtyRate):
			return nil, invalid("process %s has a dirty rate of %v: must be 0 or more", p.ID, p.DirtyRate)
		}
		seen[p.ID] = true
		if !to {
			continue
		}
		if _, unknown := x.resolve(p.To); unknown != "" {
			return nil, invalid("process %s may go to host %q, which is not listed", p.ID, unknown)
		}
	}
	return x, nil
}

// amount reports whether v is a finite number that is not negative.
func amount(v float64) bool { return v >= 0 && !math.IsInf(v, 0) }

func (l *Limits) validate() error {
	for _, n := range []struct {
		name string
		n    int
	}{{"migrations at once", l.AtOnce}, {"migrations per host", l.PerHost}, {"migrations per link", l.PerLink}} {
		if n.n < 0 {
			return invalid("a limit of %d %s: must be 0, for no limit, or more", n.n, n.name)
		}
	}
	if !amount(l.Budget) {
		return invalid("a budget of %v bytes per second: must be 0, for none, or more", l.Budget)
	}
	return nil
}

func (f *Fleet) validateGroups() error {
	byName := make(map[string]*Group, len(f.Groups))
	for i := range f.Groups {
		g := &f.Groups[i]
		switch {
		case g.Name == "":
			return invalid("group %d of %d has no name", i+1, len(f.Groups))
		case byName[g.Name] != nil:
			return invalid("group %s is listed twice", g.Name)
		case g.AtOnce < 0:
			return invalid("group %s has a limit of %d at once: must be 0, for no limit, or more", g.Name, g.AtOnce)
		}
		byName[g.Name] = g
	}
	for _, g := range f.Groups {
		for _, a := range g.After {
			if byName[a] == nil {
				return invalid("group %s comes after group %q, which is not listed", g.Name, a)
			}
		}
	}
	if c := circle(f.Groups, byName); c != nil {
		return invalid("groups wait for each other: %s", strings.Join(c, " after "))
	}
	return nil
}

// circle returns groups of which each comes after the next, the last of which is
// the first again, or nil where there is no circle.
func circle(groups []Group, byName map[string]*Group) []string {
	over := map[string]bool{}
	var path []string
	var walk func(name string) []string
	walk = func(name string) []string {
		if i := slices.Index(path, name); i >= 0 {
			return append(slices.Clone(path[i:]), name)
		}
		if over[name] {
			return nil
		}
		path = append(path, name)
		for _, a := range byName[name].After {
			if c := walk(a); c != nil {
				return c
			}
		}
		path = path[:len(path)-1]
		over[name] = true
		return nil
	}
	for _, g := range groups {
		if c := walk(g.Name); c != nil {
			return c
		}
	}
	return nil
}
