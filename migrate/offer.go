package migrate

import (
	"fmt"
	"time"
)

// Mode is when the pages move.
type Mode string

const (
	ModeStop     Mode = "stop"     // all of them while the process stands still
	ModePostCopy Mode = "postcopy" // after the switch
	ModePreCopy  Mode = "precopy"  // before it, while the process runs, and the rest while it stands still
	ModeHybrid   Mode = "hybrid"   // before it, and the rest after it
)

// Known reports whether m is one of them.
func (m Mode) Known() bool {
	return m == ModeStop || m == ModePostCopy || m.Rounds()
}

// Rounds reports whether pages are copied while the process still runs.
func (m Mode) Rounds() bool { return m == ModePreCopy || m == ModeHybrid }

// Whole reports whether every page is there before the process runs.
func (m Mode) Whole() bool { return m == ModeStop || m == ModePreCopy }

// Offer is what the source tells of the process before anything is touched, so
// that the destination can refuse. Sizes in bytes.
type Offer struct {
	Mode         Mode     `cbor:"1,keyasint"`
	HostPID      int      `cbor:"2,keyasint"` // at the source
	PID          int      `cbor:"3,keyasint"` // to be kept, if it can
	Comm         string   `cbor:"4,keyasint"`
	Exe          string   `cbor:"5,keyasint"`
	Threads      int      `cbor:"6,keyasint"`
	MemoryBytes  uint64   `cbor:"7,keyasint"`
	UID          uint32   `cbor:"8,keyasint"`
	PageSize     int      `cbor:"9,keyasint"`
	XFeatures    uint64   `cbor:"10,keyasint"`
	XSize        uint32   `cbor:"11,keyasint"`
	Kernel       string   `cbor:"12,keyasint"`
	Machine      string   `cbor:"13,keyasint"`
	Listeners    []string `cbor:"14,keyasint"` // addresses that must exist there, "tcp 10.0.0.1:6379"
	Files        []string `cbor:"15,keyasint"` // paths that must exist there; see MappedFiles
	Directories  []string `cbor:"16,keyasint"`
	PIDNamespace string   `cbor:"17,keyasint"` // auto, host or new
	PlainPages   bool     `cbor:"18,keyasint"` // page lanes without TLS
	Lanes        int      `cbor:"19,keyasint"` // bulk lanes wanted
	Trap         string   `cbor:"20,keyasint"` // auto or uffd
	// Requires lists, by name, abilities beyond the base ("time-namespace",
	// "posix-timer-restore"); an unknown one is refused.
	Requires []string `cbor:"21,keyasint"`
	// Monotonic and Boottime are the source's clocks when the offer was made:
	// close enough to prepare a time namespace before the freeze.
	Monotonic time.Duration `cbor:"22,keyasint"`
	Boottime  time.Duration `cbor:"23,keyasint"`
	// Heard is when the destination had the offer: its clocks have gone on by as
	// much as has passed since then. Not sent.
	Heard time.Time `cbor:"-"`
	// Addresses maps addresses there to those here, for sockets.
	Addresses map[string]string `cbor:"24,keyasint"`
	// PGID and SID are its process group and session, as it sees them.
	PGID int `cbor:"25,keyasint"`
	SID  int `cbor:"26,keyasint"`
	// MappedFiles are paths of files that are only mapped privately, and of the
	// executable. Where they are not, or other ones are, the destination can map them
	// from the source, unless Trap is uffd.
	MappedFiles []string `cbor:"27,keyasint,omitempty"`
	// MappedBytes is how much it has mapped of each: memory where the file is not.
	MappedBytes []uint64 `cbor:"28,keyasint,omitempty"`
	// Keep asks the destination to keep the source's memory readable, and with it the
	// source's copy, until a person there releases it: Arrival.Resident returns only then.
	Keep bool `cbor:"29,keyasint,omitempty"`
}

// Refusal says that a host will not take a process, before anything was touched.
type Refusal struct{ Reasons []string }

func (r *Refusal) Error() string {
	if len(r.Reasons) == 1 {
		return "refused: " + r.Reasons[0]
	}
	return fmt.Sprintf("refused for %d reasons: %q", len(r.Reasons), r.Reasons)
}
