package inspect

import (
	"fmt"

	"github.com/pageferry/pageferry/checkpoint/fds"
)

// Options say for which kind of migration to judge. The zero value refuses
// established TCP connections.
type Options struct {
	TCPClose bool // established TCP connections are reset at the switch
}

// Item is one thing that a process has.
type Item struct {
	Kind    string `json:"kind"` // namespace, mapping, descriptor, timer, ...
	What    string `json:"what"`
	Carried bool   `json:"carried"`
	Reason  string `json:"reason,omitempty"` // why not
	Note    string `json:"note,omitempty"`   // what will be different
}

// Report is what Inspect has found.
type Report struct {
	PID          int      `json:"pid"`
	InnerPID     int      `json:"inner_pid"` // in its innermost pid namespace
	Comm         string   `json:"comm"`
	Exe          string   `json:"exe"`
	Cwd          string   `json:"cwd"`
	State        string   `json:"state"`
	UID          uint32   `json:"uid"`
	GID          uint32   `json:"gid"`
	Capabilities uint64   `json:"capabilities"` // effective
	NoNewPrivs   bool     `json:"no_new_privs"`
	Threads      []Thread `json:"threads"`

	ParentPID  int    `json:"parent_pid"`
	ParentComm string `json:"parent_comm"`
	Cgroup     string `json:"cgroup"`
	Unit       *Unit  `json:"unit,omitempty"`

	Memory      Memory         `json:"memory"`
	Mappings    []Mapping      `json:"mappings"`
	Descriptors []fds.OpenFile `json:"descriptors"`
	Items       []Item         `json:"items"` // everything judged, the above included

	// What a destination must have.
	MemoryBytes uint64   `json:"memory_bytes"`
	Listeners   []string `json:"listeners"` // "tcp 10.0.0.1:6379"
	Files       []string `json:"files"`
	MappedFiles []string `json:"mapped_files"` // only mapped privately, or executed: or be able to map from the source
	Directories []string `json:"directories"`

	Movable bool `json:"movable"`
}

// Thread is one thread.
type Thread struct {
	TID   int    `json:"tid"`
	Comm  string `json:"comm"`
	State string `json:"state"`
}

// Unit is the systemd unit that a process runs in.
type Unit struct {
	Name    string `json:"name"`
	Main    bool   `json:"main"`              // the process is its main one
	Restart string `json:"restart,omitempty"` // Restart= of the unit
	// Whether the unit starts the program again when the process here ends.
	RestartsOnKill  bool `json:"restarts_on_kill"`
	RestartsOnExit0 bool `json:"restarts_on_exit0"`
}

// Memory sums the mappings up, in bytes.
type Memory struct {
	TotalBytes    uint64       `json:"total_bytes"`
	ResidentBytes uint64       `json:"resident_bytes"`
	SwappedBytes  uint64       `json:"swapped_bytes"`
	Kinds         []MemoryKind `json:"kinds"`
}

// MemoryKind sums up the mappings of one kind.
type MemoryKind struct {
	Kind          string `json:"kind"`
	Mappings      int    `json:"mappings"`
	TotalBytes    uint64 `json:"total_bytes"`
	ResidentBytes uint64 `json:"resident_bytes"`
	SwappedBytes  uint64 `json:"swapped_bytes"`
}

// Mapping is one mapping.
type Mapping struct {
	Start         uint64 `json:"start"`
	End           uint64 `json:"end"`
	Prot          string `json:"prot"` // "rw-p", as in maps
	Kind          string `json:"kind"`
	Path          string `json:"path,omitempty"`
	ResidentBytes uint64 `json:"resident_bytes"`
	SwappedBytes  uint64 `json:"swapped_bytes"`
	OwnBytes      uint64 `json:"own_bytes"` // what has to be copied
	Carried       bool   `json:"carried"`
	Reason        string `json:"reason,omitempty"`
}

// Refusals lists why the process cannot move, in words. None: it can.
func (r *Report) Refusals() []string {
	var out []string
	for _, it := range r.Items {
		if !it.Carried {
			out = append(out, fmt.Sprintf("%s %s: %s", it.Kind, it.What, it.Reason))
		}
	}
	return out
}

func (r *Report) carry(kind, format string, a ...any) *Item {
	r.Items = append(r.Items, Item{Kind: kind, What: fmt.Sprintf(format, a...), Carried: true})
	return &r.Items[len(r.Items)-1]
}

func (r *Report) refuse(kind, what, format string, a ...any) {
	r.Items = append(r.Items, Item{Kind: kind, What: what, Reason: fmt.Sprintf(format, a...)})
}
