package appliance

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestFindByPrefix(t *testing.T) {
	r, err := openRegistry(t.TempDir(), 2)
	if err != nil {
		t.Fatal(err)
	}
	for i, id := range []string{"aa11", "aa22", "bb33"} {
		m := newMigration([16]byte{}, RoleSource, Report{SourcePID: i, Started: time.Unix(int64(i), 0)})
		m.report.ID, m.report.Outcome = id, OutcomeDone
		if err := r.finish(m, nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := r.find("aa11"); !errors.Is(err, ErrUnknown) {
		t.Errorf("the oldest of three is kept though the limit is two: %v", err)
	}
	if _, rep, err := r.find("b"); err != nil || rep.ID != "bb33" {
		t.Errorf("%+v, %v", rep, err)
	}
	if _, _, err := r.find(""); !errors.Is(err, ErrUnknown) {
		t.Errorf("%v", err)
	}
	again, err := openRegistry(r.store.dir, 2)
	if err != nil || len(again.finished) != 2 || again.finished[0].ID != "aa22" {
		t.Errorf("from disk: %+v, %v", again.finished, err)
	}
	m := newMigration([16]byte{}, RoleSource, Report{})
	m.report.ID, m.report.Outcome = "bb44", OutcomeDone
	if err := r.finish(m, nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.find("bb"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("%v", err)
	}
}

// Who is told that a migration has ended may ask for the next one of that process.
func TestFinishedIsFree(t *testing.T) {
	r, err := openRegistry(t.TempDir(), 2)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		m := newMigration([16]byte{1}, RoleSource, Report{SourcePID: 42})
		if err := r.add(m); err != nil {
			t.Fatalf("migration %d: %v", i, err)
		}
		_, changed := m.snapshot()
		go func() { _ = r.finish(m, func(rep *Report) { rep.Outcome = OutcomeDone }) }()
		<-changed
		if rep, _ := m.snapshot(); rep.Outcome != OutcomeDone {
			t.Fatalf("migration %d: %q", i, rep.Outcome)
		}
	}
}

// TestReportHasTheContractsFields keeps the names that scripts rely on.
func TestReportHasTheContractsFields(t *testing.T) {
	data, err := json.Marshal(newMigration([16]byte{}, RoleSource, Report{}).report)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	for _, f := range strings.Fields(`id mode engine trap transport source_pid dest_pid state outcome reason
		total_ms downtime_ms switch_ms resident_ms bytes_memory bytes_wire pages_total pages_sent pages_resent
		pages_zero pages_compressed pages_faulted rounds faults`) {
		if _, ok := m[f]; !ok {
			t.Errorf("field %s is missing", f)
		}
	}
	for _, f := range []string{"count", "p50_us", "p99_us", "max_us"} {
		if _, ok := m["faults"].(map[string]any)[f]; !ok {
			t.Errorf("field faults.%s is missing", f)
		}
	}
	if _, ok := m["rounds"].([]any); !ok {
		t.Error("rounds is not a list")
	}
}
