package migrate

import (
	"errors"
	"slices"
	"testing"
)

// TestEdges tries every pair of states; the legal ones are named here a second
// time, so that a change of the table is a decision.
func TestEdges(t *testing.T) {
	source := map[string][]string{
		"running":   {"preparing"},
		"preparing": {"isolated", "held", "aborted"},
		"isolated":  {"tracking", "frozen", "aborted"},
		"tracking":  {"frozen", "aborted"},
		"frozen":    {"held", "aborted"},
		"held":      {"committed", "aborted", "in-doubt"},
		"committed": {"serving", "resident", "aborted", "in-doubt", "lost"},
		"serving":   {"resident", "aborted", "in-doubt", "lost"},
		"resident":  {"done"},
		"done":      {},
		"aborted":   {"in-doubt"},
		"in-doubt":  {"committed", "serving", "resident", "aborted", "lost"},
		"lost":      {"aborted", "resident"},
	}
	if len(source) != int(sourceStates) {
		t.Errorf("%d states of a source, %d in this test", sourceStates, len(source))
	}
	for from := range sourceStates {
		for to := range sourceStates {
			legal := from == to || slices.Contains(source[from.String()], to.String())
			got, err := from.To(to)
			if legal && (err != nil || got != to) {
				t.Errorf("source %v -> %v: %v", from, to, err)
			}
			if !legal && (!errors.Is(err, ErrIllegal) || got != from) {
				t.Errorf("source %v -> %v is taken", from, to)
			}
		}
		if back, err := ParseSourceState(from.String()); err != nil || back != from {
			t.Errorf("%v is parsed as %v, %v", from, back, err)
		}
	}
	dest := map[string][]string{
		"empty":     {"prepared"},
		"prepared":  {"ready", "aborted"},
		"ready":     {"committed", "aborted"},
		"committed": {"running", "lost", "aborted"},
		"running":   {"resident", "lost", "aborted"},
		"resident":  {"done", "aborted"},
		"done":      {},
		"aborted":   {},
		"lost":      {"aborted", "done"},
	}
	if len(dest) != int(destStates) {
		t.Errorf("%d states of a destination, %d in this test", destStates, len(dest))
	}
	for from := range destStates {
		for to := range destStates {
			legal := from == to || slices.Contains(dest[from.String()], to.String())
			got, err := from.To(to)
			if legal && (err != nil || got != to) {
				t.Errorf("destination %v -> %v: %v", from, to, err)
			}
			if !legal && (!errors.Is(err, ErrIllegal) || got != from) {
				t.Errorf("destination %v -> %v is taken", from, to)
			}
		}
		if back, err := ParseDestState(from.String()); err != nil || back != from {
			t.Errorf("%v is parsed as %v, %v", from, back, err)
		}
	}
	// Nothing that comes from a disk is a state that is none.
	for _, bad := range []string{"", "Running", "source(99)"} {
		if _, err := ParseSourceState(bad); err == nil {
			t.Errorf("%q is a state of a source", bad)
		}
		if _, err := ParseDestState(bad); err == nil {
			t.Errorf("%q is a state of a destination", bad)
		}
	}
	if _, err := SourceState(99).To(SourceDone); !errors.Is(err, ErrIllegal) {
		t.Error(err)
	}
	if _, err := DestState(99).To(DestDone); !errors.Is(err, ErrIllegal) {
		t.Error(err)
	}
}
