package appliance

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pageferry/pageferry/migrate"
)

// Outcome is how a migration ended; "" while it has not.
type Outcome string

const (
	OutcomeDone     Outcome = "done"
	OutcomeFailed   Outcome = "failed"   // and the source's process runs on
	OutcomeCanceled Outcome = "canceled" // and the source's process runs on
	OutcomeRefused  Outcome = "refused"  // before anything was touched
	OutcomeInDoubt  Outcome = "in-doubt" // Reason says what to do
	OutcomeLost     Outcome = "lost"     // after the commit, beyond repair
)

// Role says which end of a migration this host is.
type Role string

const (
	RoleSource      Role = "source"
	RoleDestination Role = "destination"
)

// Report is a migration as the API, `--json` and the files of StateDir/reports
// show it, while it runs and after. Sizes in bytes, times in milliseconds unless
// the name says otherwise.
type Report struct {
	ID        string  `json:"id"`
	Mode      string  `json:"mode"`
	Engine    string  `json:"engine"`
	Trap      string  `json:"trap"`
	Transport string  `json:"transport"`
	SourcePID int     `json:"source_pid"`
	DestPID   int     `json:"dest_pid"`
	State     string  `json:"state"`
	Outcome   Outcome `json:"outcome"`
	Reason    string  `json:"reason"`

	TotalMS    float64 `json:"total_ms"`
	DowntimeMS float64 `json:"downtime_ms"` // freeze to running, by the source's clock
	SwitchMS   float64 `json:"switch_ms"`   // final state captured to running
	ResidentMS float64 `json:"resident_ms"` // freeze to the last page

	BytesMemory     uint64 `json:"bytes_memory"`
	BytesWire       uint64 `json:"bytes_wire"`
	PagesTotal      uint64 `json:"pages_total"`
	PagesSent       uint64 `json:"pages_sent"`
	PagesResent     uint64 `json:"pages_resent"`
	PagesZero       uint64 `json:"pages_zero"`
	PagesCompressed uint64 `json:"pages_compressed"`
	PagesFaulted    uint64 `json:"pages_faulted"`
	PagesDouble     uint64 `json:"pages_double"`              // came twice: a fault overtook its page
	PagesOneSided   uint64 `json:"pages_one_sided,omitempty"` // read from the source's memory by RDMA
	PagesResident   uint64 `json:"pages_resident"`            // at the destination, so far

	// MaxBandwidth is the limit of its page lanes in bytes per second; 0 is none.
	MaxBandwidth Bandwidth `json:"max_bandwidth,omitempty"`
	Lanes        int       `json:"lanes,omitempty"` // for background pages

	Rounds []Round `json:"rounds"`
	Faults Faults  `json:"faults"`
	// Saved says which pages were sent how, and how many bytes that took.
	Saved migrate.Saved `json:"saved"`
	// Tracker is how written pages were found, and SwitchReason why the rounds ended.
	Tracker      string `json:"tracker,omitempty"`
	SwitchReason string `json:"switch_reason,omitempty"`
	// Predicted is what was expected of it before the first round: to be held against
	// what happened.
	Predicted *migrate.Predicted `json:"predicted,omitempty"`
	// While rounds go on: which one, pages still to be sent, rates in bytes per
	// second, what a switch now would cost, and how much the program is slowed.
	Round      int     `json:"round,omitempty"`
	PagesLeft  uint64  `json:"pages_left,omitempty"`
	DirtyRate  float64 `json:"dirty_rate,omitempty"`
	WireRate   float64 `json:"wire_rate,omitempty"`
	ExpectedMS float64 `json:"expected_downtime_ms,omitempty"`
	Throttle   float64 `json:"throttle,omitempty"`

	Role    Role      `json:"role"`
	Peer    string    `json:"peer"`
	Comm    string    `json:"comm"`
	Started time.Time `json:"started"`
	// Kept: its memory stays readable at the destination until it is released there
	// (ShownKeep), and the migration goes on as long.
	Kept bool `json:"kept,omitempty"`
	// Remarks says what was chosen and why not the better one.
	Remarks []string `json:"remarks,omitempty"`
}

// Round is one pass over memory. The last is what came after the freeze; stop and
// post-copy have no other.
type Round struct {
	Round      int     `json:"round"`
	Pages      uint64  `json:"pages"`
	PagesZero  uint64  `json:"pages_zero"`
	DirtyPages uint64  `json:"dirty_pages"` // written while it went on
	BytesWire  uint64  `json:"bytes_wire"`
	MS         float64 `json:"ms"`
}

// Faults is how long threads of the program waited for pages.
type Faults struct {
	Count uint64  `json:"count"`
	P50us float64 `json:"p50_us"`
	P99us float64 `json:"p99_us"`
	MaxUS float64 `json:"max_us"`
}

// Finished reports whether nothing about the migration will change any more.
func (r *Report) Finished() bool { return r.Outcome != "" }

// reports keeps the reports of finished migrations as files, the newest limit
// of them. Not safe for concurrent use; the registry's lock guards it.
type reports struct {
	dir   string
	limit int
}

func (s reports) name(r *Report) string {
	// Sorting by name is sorting by time: that is all that prune needs.
	return fmt.Sprintf("%s-%s-%s.json", r.Started.UTC().Format("20060102T150405.000"), r.ID, r.Role)
}

// save writes a report so that a crash leaves either the old one or the new.
func (s reports) save(r *Report) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return fmt.Errorf("report of migration %s: %w", r.ID, err)
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("report of migration %s: %w", r.ID, err)
	}
	path := filepath.Join(s.dir, s.name(r))
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(data, '\n'), 0o600); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("report of migration %s: %w", r.ID, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		_ = os.Remove(tmp)
		return fmt.Errorf("report of migration %s: %w", r.ID, err)
	}
	return s.prune()
}

func (s reports) files() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".json") {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

func (s reports) prune() error {
	names, err := s.files()
	if err != nil {
		return err
	}
	for len(names) > s.limit {
		if err := os.Remove(filepath.Join(s.dir, names[0])); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		names = names[1:]
	}
	return nil
}

// load reads what is there, oldest first. Files that are not reports are
// passed over: a damaged report is no reason for a daemon not to start.
func (s reports) load() ([]Report, error) {
	names, err := s.files()
	if err != nil {
		return nil, fmt.Errorf("reports: %w", err)
	}
	var rs []Report
	for _, n := range names {
		data, err := os.ReadFile(filepath.Join(s.dir, n))
		if err != nil {
			continue
		}
		var r Report
		if json.Unmarshal(data, &r) == nil && r.ID != "" {
			rs = append(rs, r)
		}
	}
	slices.SortStableFunc(rs, func(a, b Report) int { return cmp.Compare(a.Started.UnixNano(), b.Started.UnixNano()) })
	return rs, nil
}
