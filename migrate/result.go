package migrate

import (
	"time"

	"github.com/pageferry/pageferry/transport"
)

// Outcome is how a migration ended for its source.
type Outcome string

const (
	OutcomeDone    Outcome = "done"     // it lives at the destination, the copy is dead
	OutcomeAborted Outcome = "aborted"  // it runs on at the source
	OutcomeRefused Outcome = "refused"  // before anything was touched
	OutcomeInDoubt Outcome = "in-doubt" // nothing was discarded; a person must resolve
	OutcomeLost    Outcome = "lost"     // released at the destination and gone from there
	// OutcomeInterrupted: the daemon ends after the commit. The journal has it,
	// and Recover goes on.
	OutcomeInterrupted Outcome = "interrupted"
)

// ExitCode is the exit status of the contract.
func (o Outcome) ExitCode() int {
	switch o {
	case OutcomeDone:
		return 0
	case OutcomeAborted:
		return 1
	case OutcomeRefused:
		return 3
	}
	return 4
}

// Round is one pass over memory. The last is what came after the freeze; ModeStop
// and ModePostCopy have no other.
type Round struct {
	Round      int     `json:"round"`
	Pages      uint64  `json:"pages"`
	PagesZero  uint64  `json:"pages_zero"`
	DirtyPages uint64  `json:"dirty_pages"` // written meanwhile, as the look at its end says
	BytesWire  uint64  `json:"bytes_wire"`
	MS         float64 `json:"ms"`

	took, elapsed time.Duration
}

// Faults is how long threads of the program waited for pages.
type Faults struct {
	Count uint64  `json:"count"`
	P50us float64 `json:"p50_us"`
	P99us float64 `json:"p99_us"`
	MaxUS float64 `json:"max_us"`
}

// Result is what came of a migration, with what was measured. Sizes in bytes,
// times in milliseconds, by the source's clock unless the comment says else.
type Result struct {
	ID        transport.MigrationID `json:"-"`
	IDText    string                `json:"id"`
	Mode      Mode                  `json:"mode"`
	SourcePID int                   `json:"source_pid"`
	DestPID   int                   `json:"dest_pid"`
	State     SourceState           `json:"-"`
	StateText string                `json:"state"`
	Outcome   Outcome               `json:"outcome"`
	Reason    string                `json:"reason"`
	// Unsettled: the other side has not yet said that it knows; the journal is
	// kept until Settle has returned.
	Unsettled bool `json:"unsettled,omitempty"`

	TotalMS    float64 `json:"total_ms"`
	DowntimeMS float64 `json:"downtime_ms"` // before the freeze until RUNNING was heard
	SwitchMS   float64 `json:"switch_ms"`   // READY heard until RUNNING heard
	ResidentMS float64 `json:"resident_ms"` // freeze until RESIDENT heard
	// The parts of the downtime.
	FreezeMS  float64 `json:"freeze_ms"`  // stop and capture
	SendMS    float64 `json:"send_ms"`    // hand the state to the lane
	RebuildMS float64 `json:"rebuild_ms"` // at the destination, by its clock
	HoldMS    float64 `json:"hold_ms"`
	CommitMS  float64 `json:"commit_ms"`  // journal COMMIT at the source
	AcceptMS  float64 `json:"accept_ms"`  // journal COMMIT at the destination, by its clock
	ReleaseMS float64 `json:"release_ms"` // thaw, by the destination's clock

	BytesImage    uint64  `json:"bytes_image"` // the state but its pages
	BytesMemory   uint64  `json:"bytes_memory"`
	BytesWire     uint64  `json:"bytes_wire"`
	PagesTotal    uint64  `json:"pages_total"`
	PagesSent     uint64  `json:"pages_sent"`
	PagesResent   uint64  `json:"pages_resent"` // came twice: a fault overtook its page
	PagesZero     uint64  `json:"pages_zero"`
	PagesOneSided uint64  `json:"pages_one_sided,omitempty"`
	PagesFaulted  uint64  `json:"pages_faulted"`
	PagesResident uint64  `json:"pages_resident"`
	Rounds        []Round `json:"rounds"`
	// Saved is what was sent how, on the lanes of this daemon.
	Saved Saved `json:"saved"`
	// Tracker is how dirty pages were found, and Switch why the rounds ended.
	Tracker string `json:"tracker,omitempty"`
	Switch  string `json:"switch_reason,omitempty"`
	// Throttle is how much of its time the program was kept from running, at most.
	Throttle float64 `json:"throttle,omitempty"`
	Faults   Faults  `json:"faults"`
	// Predicted is what was expected before the first round; nil where nothing was
	// measured. Chosen is what SourceConfig.Auto came to, and ChosenWhy why.
	Predicted *Predicted `json:"predicted,omitempty"`
	Chosen    Mode       `json:"chosen,omitempty"`
	ChosenWhy string     `json:"chosen_why,omitempty"`
}

// Progress is a snapshot of a migration that goes on.
type Progress struct {
	ID     transport.MigrationID
	Role   Role
	Mode   Mode   // set at the destination
	Trap   string // of the offer
	Keep   bool   // of the offer
	State  string // of SourceState or DestState
	Peer   string
	Comm   string
	Reason string // of the last trouble, "" where there is none
	PID    int    // on this host, 0 where it has none yet
	// SourcePID is its pid at the source; set at the destination.
	SourcePID int
	Started   time.Time
	Elapsed   time.Duration

	BytesMemory uint64
	BytesWire   uint64
	ArrivalStats

	WireBytesPerSecond float64
	PagesPerSecond     float64

	// Of pre-copy, at the source: the round that is going on, pages that it and
	// later ones have to send, how fast the program dirties memory, what a switch
	// now would cost, and the part of its time that the program is kept from running.
	Round               int
	PagesLeft           uint64
	DirtyBytesPerSecond float64
	ExpectedDowntime    time.Duration
	Throttle            float64
}

// ms is d in milliseconds, and 0 where one of the ends was never reached.
func ms(from, to time.Time) float64 {
	if from.IsZero() || to.IsZero() {
		return 0
	}
	return float64(to.Sub(from)) / float64(time.Millisecond)
}

func micros(n uint64) float64 { return float64(n) / 1000 }

func (s ArrivalStats) onAir() statsOnAir   { return statsOnAir(s) }
func (s statsOnAir) arrival() ArrivalStats { return ArrivalStats(s) }

// rate measures how fast a count grows, smoothed over about a second.
type rate struct {
	at    time.Time
	count uint64
	value float64
}

func (r *rate) update(now time.Time, count uint64) float64 {
	dt := now.Sub(r.at).Seconds()
	switch {
	case r.at.IsZero() || count < r.count:
		r.at, r.count = now, count
	case dt >= 0.1:
		fresh := float64(count-r.count) / dt
		keep := max(0, 1-dt)
		r.value = keep*r.value + (1-keep)*fresh
		r.at, r.count = now, count
	}
	return r.value
}
