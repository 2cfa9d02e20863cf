package bulk

import (
	"maps"
	"time"

	"github.com/pageferry/pageferry/appliance"
)

// Group is a number of processes that move in the same way. What is unset below
// OnFailure is the daemon's default.
type Group struct {
	// Name of the group, for after and in reports.
	Name string `yaml:"name" need:"1" form:"name"`
	// Select finds the processes: each one that fits any of the selectors.
	Select []Selector `yaml:"select" need:"1"`
	// To lists the hosts that they may go to, in order of preference where they are equal. Default: every host that is not evacuated.
	To []string `yaml:"to,omitempty"`
	// After lists the groups that must be over before this one begins.
	After []string `yaml:"after,omitempty"`
	// AtOnce is how many of the group move at one time. 0 is no limit, the default.
	AtOnce int `yaml:"at_once,omitempty" min:"0"`
	// Deadline of the group, from the beginning of the run: 30m. Nothing of it begins after that. Default: the file's.
	Deadline Duration `yaml:"deadline,omitempty"`
	// Retries of each process, 0 to 100. Default: the file's.
	Retries *int `yaml:"retries,omitempty" min:"0" max:"100"`
	// OnFailure is continue, stop or return, when a process of the group could not be moved. Default: the file's.
	OnFailure string `yaml:"on_failure,omitempty" oneof:"continue stop return"`
	// Mode is when the pages move: hybrid (before and after the switch), precopy, postcopy, stop, or auto.
	Mode string `yaml:"mode,omitempty" oneof:"auto hybrid precopy postcopy stop"`
	// Trap is what waits for pages that are not there yet: auto, uffd or fuse.
	Trap string `yaml:"trap,omitempty" oneof:"auto uffd fuse"`
	// Transport is what page lanes go over: auto, rdma or tcp.
	Transport string `yaml:"transport,omitempty" oneof:"auto rdma tcp"`
	// TCP is what becomes of established connections: refuse (to move the process) or close (them at the switch).
	TCP string `yaml:"tcp,omitempty" oneof:"refuse close"`
	// Compress is auto (what gets across sooner), lz4 or none.
	Compress string `yaml:"compress,omitempty" oneof:"auto lz4 none"`
	// Shown is drop or keep: whether a process's memory can be read at the destination until all pages have arrived, or until it is released there.
	Shown string `yaml:"shown,omitempty" oneof:"drop keep"`
	// MaxBandwidth limits the page lanes of each migration, per second: 1Gbit, 100MiB, none.
	MaxBandwidth string `yaml:"max_bandwidth,omitempty" form:"bandwidth"`
	// MaxDowntime is how long a process may stand still at the switch: 50ms. For hybrid and precopy.
	MaxDowntime Duration `yaml:"max_downtime,omitempty"`
	// Throttle is how much of its time a process may be kept from running so that precopy converges: 0 to 0.99.
	Throttle float64 `yaml:"throttle,omitempty" form:"part"`
	// PIDNS is where a process keeps its pid: auto, host or new (in a namespace of its own).
	PIDNS string `yaml:"pidns,omitempty" oneof:"auto host new"`
	// OnSourceExit is how the copy that stays behind ends: kill, exit0 or stop-unit.
	OnSourceExit string `yaml:"on_source_exit,omitempty" oneof:"kill exit0 stop-unit"`
	// Addresses says which address of the old host becomes which of the new, for listening sockets.
	Addresses map[string]string `yaml:"addresses,omitempty"`
	// Optional says that it is no error when nothing is selected.
	Optional bool `yaml:"optional,omitempty"`
}

// Request asks a daemon to move one process of the group to the host at peer.
func (g *Group) Request(pid int, peer string) appliance.MigrateRequest {
	return appliance.MigrateRequest{
		PID: pid, To: peer,
		Mode: g.Mode, Trap: g.Trap, Transport: g.Transport, TCP: g.TCP, Compress: g.Compress, Shown: g.Shown,
		MaxBandwidth:  g.MaxBandwidth,
		MaxDowntimeMS: float64(g.MaxDowntime) / float64(time.Millisecond),
		Throttle:      g.Throttle,
		PIDNS:         g.PIDNS, OnSourceExit: g.OnSourceExit,
		Addresses: maps.Clone(g.Addresses),
	}
}
