package bulk

import (
	"strings"
	"testing"
	"time"
)

func TestWindow(t *testing.T) {
	night := Window{From: "22:00", To: "06:00", Zone: "Europe/Berlin"}
	day := Window{From: "09:30", To: "17:00", Zone: "UTC"}
	gap := Window{From: "02:30", To: "04:00", Zone: "Europe/Berlin"}
	inGap := Window{From: "02:10", To: "02:40", Zone: "Europe/Berlin"}
	twice := Window{From: "01:00", To: "02:30", Zone: "Europe/Berlin"}
	for _, c := range []struct {
		name     string
		w        Window
		at, next string
		open     bool
	}{
		{"before", day, "2026-06-01T09:29:59Z", "2026-06-01T09:30:00Z", false},
		{"at its beginning", day, "2026-06-01T09:30:00Z", "2026-06-01T17:00:00Z", true},
		{"at its end", day, "2026-06-01T17:00:00Z", "2026-06-02T09:30:00Z", false},
		{"over the year's end", day, "2026-12-31T23:00:00Z", "2027-01-01T09:30:00Z", false},
		{"before midnight", night, "2026-06-01T23:00:00+02:00", "2026-06-02T06:00:00+02:00", true},
		{"at midnight", night, "2026-06-02T00:00:00+02:00", "2026-06-02T06:00:00+02:00", true},
		{"by day", night, "2026-06-02T12:00:00+02:00", "2026-06-02T22:00:00+02:00", false},
		{"asked in another zone", night, "2026-06-01T20:00:00Z", "2026-06-02T04:00:00Z", true},
		{"in winter", night, "2026-01-10T21:00:00Z", "2026-01-11T05:00:00Z", true},
		// On 2026-03-29 clocks go from 02:00 to 03:00, at 01:00Z.
		{"a short night", night, "2026-03-28T21:00:00Z", "2026-03-29T04:00:00Z", true},
		{"skipped beginning", gap, "2026-03-28T23:00:00Z", "2026-03-29T01:00:00Z", false},
		{"after the skip", gap, "2026-03-29T01:00:00Z", "2026-03-29T02:00:00Z", true},
		{"skipped as a whole", inGap, "2026-03-28T23:00:00Z", "2026-03-30T00:10:00Z", false},
		// On 2026-10-25 clocks go from 03:00 to 02:00, at 01:00Z.
		{"a long night", night, "2026-10-24T20:00:00Z", "2026-10-25T05:00:00Z", true},
		{"the first time", twice, "2026-10-25T00:15:00Z", "2026-10-25T00:30:00Z", true},
		{"between", twice, "2026-10-25T00:30:00Z", "2026-10-25T01:00:00Z", false},
		{"the second time", twice, "2026-10-25T01:00:00Z", "2026-10-25T01:30:00Z", true},
		{"after both", twice, "2026-10-25T01:30:00Z", "2026-10-26T00:00:00Z", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			at, err := time.Parse(time.RFC3339, c.at)
			if err != nil {
				t.Fatal(err)
			}
			open, next := c.w.Open(at)
			if open != c.open || next.Format(time.RFC3339) != c.next {
				t.Errorf("at %s it is open: %v, until %s; want %v, %s", c.at, open, next.Format(time.RFC3339), c.open, c.next)
			}
		})
	}
}

// Every quarter of an hour through a year, in zones whose clocks change by an hour, by
// half an hour, at midnight and never: it is open as the clock says, and changes
// when it said it would.
func TestWindowAgainstTheClock(t *testing.T) {
	for _, zone := range []string{"Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago", "Asia/Kolkata"} {
		loc, err := time.LoadLocation(zone)
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range []Window{{"22:00", "06:00", zone}, {"00:00", "01:45", zone}, {"01:50", "02:10", zone}} {
			at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			was, change := w.openIn(at.Add(-time.Minute), loc)
			for range 365 * 24 * 4 {
				shown := at.In(loc).Format("15:04")
				want := w.From <= shown && shown < w.To
				if w.From > w.To {
					want = shown >= w.From || shown < w.To
				}
				open, next := w.openIn(at, loc)
				if open != want {
					t.Fatalf("%+v at %s, when clocks show %s: open %v", w, at, shown, open)
				}
				if !next.After(at) {
					t.Fatalf("%+v at %s: changes at %s, which is over", w, at, next)
				}
				if (open != was) && change.After(at) {
					t.Fatalf("%+v changed by %s, it had said at %s", w, at, change)
				}
				was, change = open, next
				at = at.Add(15 * time.Minute)
			}
		}
	}
}

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{"90s": 90 * time.Second, "1h30m": 90 * time.Minute, "50ms": 50 * time.Millisecond, "1.5h": 90 * time.Minute} {
		if got, err := parseDuration(text); err != nil || got != want {
			t.Errorf("%q is %s, %v; want %s", text, got, err, want)
		}
	}
	for text, want := range map[string]string{
		"": "not a length", "10": "write 10s, 10m or 10h", "1 h": "write 1h", "3 days": "write 72h", "2w": "one of h, m, s, ms",
		"10msec": "write 10ms", "10 min": "write 10m", "-1s": "not more than no time", "0": "not more", "999999999h": "too large",
	} {
		if got, err := parseDuration(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %s, %v; want %q", text, got, err, want)
		}
	}
}
