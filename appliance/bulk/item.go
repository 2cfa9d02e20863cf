package bulk

import (
	"fmt"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// State of an item.
type State string

const (
	Waiting  State = "waiting"
	Moving   State = "moving"
	Done     State = "done"
	Failed   State = "failed"   // and the process runs on where it was
	Refused  State = "refused"  // by its host or all that it might go to; nothing was touched
	Gone     State = "gone"     // the process has ended by itself
	InDoubt  State = "in-doubt" // its hosts do not agree, or one cannot be asked; nobody tries again
	Returned State = "returned" // it had moved, and was brought back
)

// over reports whether nothing more is done about an item in this run.
func (s State) over() bool { return s != Waiting && s != Moving }

// Item is a process of a run.
type Item struct {
	Host    string `json:"host"` // where it was when it was selected
	PID     int    `json:"pid"`
	Started uint64 `json:"started"` // appliance.ProcessInfo.Started
	Command string `json:"command"`
	User    string `json:"user,omitempty"`
	Memory  uint64 `json:"memory_bytes"`
	Group   string `json:"group"`

	To       string `json:"to,omitempty"`
	State    State  `json:"state"`
	Reason   string `json:"reason,omitempty"`
	Attempts int    `json:"attempts"`
	// Migration is the last one's id, chosen before its daemon hears of it.
	Migration string `json:"migration,omitempty"`
	// Full are hosts that have refused it.
	Full []string `json:"refused_by,omitempty"`
	// Of the migration that moved it:
	Mode       string  `json:"mode,omitempty"`
	DestPID    int     `json:"dest_pid,omitempty"`
	TotalMS    float64 `json:"total_ms,omitempty"`
	DowntimeMS float64 `json:"downtime_ms,omitempty"`
	BytesWire  uint64  `json:"bytes_wire,omitempty"`
	// Changed is when State did.
	Changed time.Time `json:"changed"`
}

// ID names an item: one process of one host, as long as that is up.
func (i *Item) ID() string { return fmt.Sprintf("%s/%d/%d", i.Host, i.PID, i.Started) }

func (i *Item) String() string {
	return fmt.Sprintf("process %d (%s) of host %s", i.PID, i.Command, i.Host)
}

// take notes what a finished migration says.
func (i *Item) take(r *appliance.Report) {
	i.Mode, i.DestPID, i.Reason = r.Mode, r.DestPID, r.Reason
	i.TotalMS, i.DowntimeMS, i.BytesWire = r.TotalMS, r.DowntimeMS, r.BytesWire
	switch r.Outcome {
	case appliance.OutcomeDone:
		i.State = Done
	case appliance.OutcomeRefused:
		i.State = Refused
	case appliance.OutcomeInDoubt, appliance.OutcomeLost:
		i.State = InDoubt
	default:
		i.State = Failed
	}
}
