package bulk

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // a window in a zone must not depend on what this host has installed

	"github.com/goccy/go-yaml/ast"
)

// Duration is a length of time; in a file it carries units: 90s, 1h30m. 0 is
// unset, and cannot be written.
type Duration time.Duration

func (d Duration) String() string { return time.Duration(d).String() }

// MarshalYAML implements yaml.InterfaceMarshaler.
func (d Duration) MarshalYAML() (any, error) { return d.String(), nil }

// UnmarshalYAML implements yaml.NodeUnmarshaler.
func (d *Duration) UnmarshalYAML(node ast.Node) error {
	v, err := parseDuration(node.GetToken().Value)
	if err == nil {
		*d = Duration(v)
	}
	return err
}

var oneUnit = regexp.MustCompile(`^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$`)

func parseDuration(text string) (time.Duration, error) {
	d, err := time.ParseDuration(text)
	m := oneUnit.FindStringSubmatch(text)
	switch {
	case err == nil && d <= 0:
		return 0, fmt.Errorf("%q is not more than no time; leave the key out for none", text)
	case err == nil:
		return d, nil
	case m == nil:
		return 0, fmt.Errorf("%q is not a length of time; write numbers with the units h, m, s or ms, as in 1h30m", text)
	case m[2] == "":
		return 0, fmt.Errorf("%q has no unit; write %ss, %sm or %sh", text, m[1], m[1], m[1])
	}
	unit := strings.ToLower(m[2])
	for _, u := range []struct{ like, unit string }{{"ms", "ms"}, {"mil", "ms"}, {"s", "s"}, {"m", "m"}, {"h", "h"}} {
		if strings.HasPrefix(unit, u.like) && d == 0 {
			return 0, fmt.Errorf("%q: the unit %q is not known or too large; write %s%s", text, m[2], m[1], u.unit)
		}
	}
	if n, err := strconv.ParseFloat(m[1], 64); err == nil && strings.HasPrefix(unit, "d") && n < 1000 {
		return 0, fmt.Errorf("%q: the unit %q is not known; write %vh", text, m[2], n*24)
	}
	return 0, fmt.Errorf("%q: the unit %q is not known; it is one of h, m, s, ms", text, m[2])
}

// Window is a part of each day. It may pass midnight.
type Window struct {
	// From is when it opens: "22:00".
	From string `yaml:"from" need:"1" form:"clock"`
	// To is when it closes: "06:00".
	To string `yaml:"to" need:"1" form:"clock"`
	// Zone whose clocks are meant: Europe/Berlin, UTC. Default: that of the host where the run is started.
	Zone string `yaml:"zone,omitempty"`
}

// Open reports whether clocks in the window's zone show a time from From up to,
// and not with, To when it is t, and the next moment at which that changes. When
// clocks are changed, times that they skip are passed at once, and those that
// they show twice are in the window both times. w must be valid.
func (w *Window) Open(t time.Time) (open bool, next time.Time) {
	zone, err := time.LoadLocation(w.zoneName())
	if err != nil {
		zone = time.Local // Validate has seen it
	}
	return w.openIn(t, zone)
}

func (w *Window) openIn(t time.Time, zone *time.Location) (open bool, next time.Time) {
	open = w.shows(t.In(zone))
	// Between changes of the clocks all is arithmetic; see at each change again.
	for at := t.In(zone); ; {
		_, change := at.ZoneBounds()
		next = at.Add(min(until(at, w.From), until(at, w.To)))
		if change.IsZero() || next.Before(change) {
			return open, next.In(t.Location())
		}
		if at = change.In(zone); w.shows(at) != open {
			return open, at.In(t.Location())
		}
	}
}

// shows reports whether a clock that shows t is within the window.
func (w *Window) shows(t time.Time) bool {
	from, to, at := clock(w.From), clock(w.To), sinceMidnight(t)
	if from < to {
		return from <= at && at < to
	}
	return from <= at || at < to
}

func (w *Window) zoneName() string {
	if w.Zone == "" {
		return "Local"
	}
	return w.Zone
}

// until is how long it takes a clock that shows t to show text, more than 0.
func until(t time.Time, text string) time.Duration {
	d := clock(text) - sinceMidnight(t)
	if d <= 0 {
		d += 24 * time.Hour
	}
	return d
}

func sinceMidnight(t time.Time) time.Duration {
	h, m, s := t.Clock()
	return time.Duration(h)*time.Hour + time.Duration(m)*time.Minute + time.Duration(s)*time.Second + time.Duration(t.Nanosecond())
}

var clockForm = regexp.MustCompile(`^([01][0-9]|2[0-3]):([0-5][0-9])$`)

func checkClock(text string) error {
	switch {
	case text == "":
		return errors.New("is missing; write a time of day such as 22:00")
	case text == "24:00":
		return errors.New("\"24:00\" is no time of day; write 00:00 for midnight")
	case !clockForm.MatchString(text):
		return fmt.Errorf("%q is no time of day; write hours and minutes, from 00:00 to 23:59", text)
	}
	return nil
}

// clock is a valid time of day, since midnight.
func clock(text string) time.Duration {
	t, _ := time.Parse("15:04", text) // checkClock has seen it
	return sinceMidnight(t)
}
