package fleet

import (
	"errors"
	"math"
	"strings"
	"testing"
)

// two is a small fleet that is valid.
func two() Fleet {
	return Fleet{
		Hosts:     []Host{{Name: "a"}, {Name: "b"}},
		Processes: []Process{{ID: "p", Host: "a", To: []string{"b"}, Group: "g"}},
		Groups:    []Group{{Name: "g"}, {Name: "h", After: []string{"g"}}, {Name: "i", After: []string{"g", "h"}}},
	}
}

func TestValidate(t *testing.T) {
	f := two()
	if err := f.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(f *Fleet){
		"host 1 of 2 has no name":                           func(f *Fleet) { f.Hosts[0].Name = "" },
		"host a is listed twice":                            func(f *Fleet) { f.Hosts[1].Name = "a" },
		"host b takes -1 processes":                         func(f *Fleet) { f.Hosts[1].Processes = -1 },
		"host b has a rate of NaN":                          func(f *Fleet) { f.Hosts[1].Rate = math.NaN() },
		"process 1 of 1 has no ID":                          func(f *Fleet) { f.Processes[0].ID = "" },
		"process p is listed twice":                         func(f *Fleet) { f.Processes = append(f.Processes, f.Processes[0]) },
		`process p is on host "c", which is not listed`:     func(f *Fleet) { f.Processes[0].Host = "c" },
		`process p may go to host "c", which is not listed`: func(f *Fleet) { f.Processes[0].To = []string{"b", "c"} },
		`process p is of group "x", which is not listed`:    func(f *Fleet) { f.Processes[0].Group = "x" },
		"process p has a dirty rate of -1":                  func(f *Fleet) { f.Processes[0].DirtyRate = -1 },
		"group 2 of 3 has no name":                          func(f *Fleet) { f.Groups[1].Name = "" },
		"group g is listed twice":                           func(f *Fleet) { f.Groups[1].Name = "g" },
		"group h has a limit of -2 at once":                 func(f *Fleet) { f.Groups[1].AtOnce = -2 },
		`group h comes after group "x", which is not`:       func(f *Fleet) { f.Groups[1].After = []string{"g", "x"} },
		"wait for each other: g after g":                    func(f *Fleet) { f.Groups[0].After = []string{"g"} },
		"wait for each other: g after i after g":            func(f *Fleet) { f.Groups[0].After = []string{"i"} },
		"a limit of -1 migrations per link":                 func(f *Fleet) { f.Limits.PerLink = -1 },
		"a limit of -1 migrations per host":                 func(f *Fleet) { f.Limits.PerHost = -1 },
		"a limit of -1 migrations at once":                  func(f *Fleet) { f.Limits.AtOnce = -1 },
		"a budget of +Inf":                                  func(f *Fleet) { f.Limits.Budget = math.Inf(1) },
	} {
		f := two()
		change(&f)
		err := f.Validate()
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want: %s", err, want)
		}
		// Place must bear it.
		p := Place(f)
		if _, ok := p.To[f.Processes[0].ID]; !ok && p.Refused[f.Processes[0].ID] == "" {
			t.Errorf("%s: neither placed nor refused", want)
		}
	}
}

// The circle is named without the groups that lead to it.
func TestCircle(t *testing.T) {
	f := Fleet{Groups: []Group{{Name: "way", After: []string{"fine", "x"}}, {Name: "x", After: []string{"y"}},
		{Name: "y", After: []string{"z"}}, {Name: "z", After: []string{"fine", "x"}}, {Name: "fine"}}}
	err := f.Validate()
	if err == nil || !strings.HasSuffix(err.Error(), "each other: x after y after z after x") {
		t.Error(err)
	}
}
