package fleet

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func schedule(t *testing.T, f Fleet, to map[string]string) *Schedule {
	t.Helper()
	s, err := NewSchedule(f, to)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// four has processes named by their way and size.
func four(l Limits) (Fleet, map[string]string) {
	f := Fleet{Hosts: []Host{{Name: "a"}, {Name: "b"}, {Name: "c"}, {Name: "d"}}, Limits: l}
	to := map[string]string{}
	for i, p := range []Process{{ID: "ab1", Host: "a", Memory: 1 * gb}, {ID: "ab4", Host: "a", Memory: 4 * gb}, {ID: "ac2", Host: "a", Memory: 2 * gb}, {ID: "dc3", Host: "d", Memory: 3 * gb}} {
		f.Processes = append(f.Processes, p)
		to[p.ID] = []string{"b", "b", "c", "c"}[i]
	}
	return f, to
}

func TestNext(t *testing.T) {
	for _, c := range []struct {
		l    Limits
		want string
	}{
		// Nothing idles: dc3 goes before ac2 and ab1, whose ends are both in use.
		{Limits{}, "ab4 dc3 ac2 ab1"},
		{Limits{AtOnce: 2}, "ab4 dc3"},
		{Limits{AtOnce: 1}, "ab4"},
		{Limits{PerHost: 1}, "ab4 dc3"},
		{Limits{PerLink: 1}, "ab4 dc3 ac2"},
		{Limits{PerHost: 2}, "ab4 dc3 ac2"},
	} {
		f, to := four(c.l)
		s := schedule(t, f, to)
		if got := strings.Join(s.Next(), " "); got != c.want {
			t.Errorf("%+v: %s, want %s", c.l, got, c.want)
		}
	}
	for order, want := range map[Order]string{LPT: "ab4 dc3 ac2 ab1", Listed: "ab1 ab4 ac2 dc3", Smallest: "ab1 ac2 dc3 ab4"} {
		f, to := four(Limits{})
		s, err := newSchedule(f, to, order)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(s.Next(), " "); got != want {
			t.Errorf("%s: %s, want %s", order, got, want)
		}
	}
}

// What others wait for goes first: the chain behind it counts as its own time.
func TestNextMindsWhatComesAfter(t *testing.T) {
	f, to := four(Limits{PerHost: 1})
	f.Groups = []Group{{Name: "first"}, {Name: "then", After: []string{"first"}}}
	f.Processes[0].Group, f.Processes[3].Group = "first", "then"
	f.Processes[3].Memory = 2 * gb
	s := schedule(t, f, to)
	if got := strings.Join(s.Next(), " "); got != "ab4" {
		t.Errorf("%s: 1+2 GiB are no more than 4", got)
	}
	f.Processes[3].Memory = 4 * gb
	s = schedule(t, f, to)
	if got := strings.Join(s.Next(), " "); got != "ab1" {
		t.Errorf("%s: 1+4 GiB are more than 4", got)
	}
}

func TestWaits(t *testing.T) {
	f, to := four(Limits{AtOnce: 3, PerHost: 2, PerLink: 1})
	f.Groups = []Group{{Name: "db", AtOnce: 1}, {Name: "none", After: []string{"db"}}, {Name: "web", After: []string{"none"}}}
	f.Processes[1].Group, f.Processes[3].Group = "db", "web"
	f.Processes = append(f.Processes, Process{ID: "more", Host: "d", Group: "db"})
	to["more"] = "c"
	s := schedule(t, f, to)
	is := func(id, want string) {
		t.Helper()
		if got := s.Waits(id); got != want {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
	}
	is("x", "it is no part of the schedule")
	is("ab4", "")
	is("dc3", "group web comes after group none, and group none comes after group db, of which 2 of 2 are not over")
	s.Begin("ab4")
	is("ab4", "it has begun")
	is("more", "1 migration runs of group db, of 1 that may")
	is("ab1", "1 migration runs from a to b, of 1 that may")
	s.Begin("ac2")
	is("ab1", "2 migrations run to or from a, of 2 that may")
	s.End("ab4", false)
	s.End("ac2", true)
	is("ab4", "it was left out")
	is("ac2", "it is over")
	s.End("more", true)
	is("dc3", "")
	if err := s.Retry("ab4", "d"); err != nil {
		t.Fatal(err)
	}
	is("dc3", "group web comes after group none, and group none comes after group db, of which 1 of 2 are not over")
	s.Begin("ab4")
	s.Begin("ab1")
	s.Begin("dc3") // the caller may know better
	is("ac2", "it is over")
	if s.Left() != 0 || s.Running() != 3 {
		t.Errorf("%d left, %d run", s.Left(), s.Running())
	}
}

func TestScheduleAtOnceReached(t *testing.T) {
	f, to := four(Limits{AtOnce: 1})
	s := schedule(t, f, to)
	s.Begin("dc3")
	if why := s.Waits("ab1"); why != "1 migration runs, of 1 that may at one time" {
		t.Error(why)
	}
}

// Room at a destination is reserved from the beginning, and free again when a
// migration is left out.
func TestReservation(t *testing.T) {
	f, to := four(Limits{})
	f.Hosts[1].Memory = 5 * gb
	f.Hosts[2].Processes = 2
	s := schedule(t, f, to)
	s.Begin("ab1")
	s.End("ab1", false)
	s.Begin("dc3")
	s.End("dc3", false)
	if err := s.Retry("dc3", "b"); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "b, which has 1.0 GiB left of 5.0 GiB") {
		t.Error(err)
	}
	if err := s.Retry("ab1", "c"); err != nil {
		t.Error(err)
	}
	if err := s.Retry("dc3", "c"); err == nil || !strings.Contains(err.Error(), "takes 2 processes") {
		t.Error(err)
	}
	if err := s.Retry("dc3", "d"); err == nil || !strings.Contains(err.Error(), "d, where it is") {
		t.Error(err)
	}
	if err := s.Retry("ac2", "b"); err == nil {
		t.Error("what waits was tried again")
	}
	s.End("ab4", false)
	if err := s.Retry("dc3", "b"); err != nil {
		t.Error(err)
	}
	if got := s.Next(); !slices.Contains(got, "dc3") || slices.Contains(got, "ab4") {
		t.Error(got)
	}
}

func TestNewScheduleRefuses(t *testing.T) {
	for want, change := range map[string]func(f *Fleet, to map[string]string){
		"process ab1 is to go to a, where it is":                  func(f *Fleet, to map[string]string) { to["ab1"] = "a" },
		`process ab1 is to go to host "x", which is not listed`:   func(f *Fleet, to map[string]string) { to["ab1"] = "x" },
		"process zz is to go to a, but is not listed":             func(f *Fleet, to map[string]string) { to["zz"] = "a" },
		"process ab4 has 4.0 GiB and is to go to b, which has 2.": func(f *Fleet, to map[string]string) { f.Hosts[1].Memory = 3 * gb },
		"process dc3 is to go to c, which takes 1 processes":      func(f *Fleet, to map[string]string) { f.Hosts[2].Processes = 1 },
		"host a is listed twice":                                  func(f *Fleet, to map[string]string) { f.Hosts[1].Name = "a" },
	} {
		f, to := four(Limits{})
		change(&f, to)
		if _, err := NewSchedule(f, to); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want: %s", err, want)
		}
	}
}
