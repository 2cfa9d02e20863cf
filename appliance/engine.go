package appliance

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/pace"
)

// Engine is everything that touches a real process or a real pager. The daemon
// is written against it and runs in tests on a fake; NewEngine is the real one.
type Engine interface {
	// Inspect says what pid is made of and what keeps it from moving. It
	// touches nothing: no ptrace, no injected work.
	Inspect(pid int, opts SourceOptions) (Inspection, error)
	// NewSourceProcess takes hold of a process that is to leave, without
	// stopping it, and says what the destination must know to decide. It fails
	// with a *migrate.Refusal for a process that cannot be carried.
	NewSourceProcess(pid int, opts SourceOptions) (migrate.Process, migrate.Offer, error)
	// AdoptSource takes up a process that an earlier daemon left held (or
	// about to be held) for migration id: it knows it by pid, cgroup and
	// opts.Hint. It wraps migrate.ErrGone where there is no such process.
	AdoptSource(ctx context.Context, id transport.MigrationID, pid int, opts SourceOptions) (migrate.Process, error)
	// NewLanes is the source's end of the page lanes. Nothing is dialled
	// before Open.
	NewLanes(opts LaneOptions) (migrate.Lanes, error)
	// NewHost is the destination's end: skeletons, pagers, cgroups.
	NewHost(opts HostOptions) (Host, error)
}

// SourceHooks is what a migrate.Process may also be: work that only the side
// that owns the connections and the parent can do. See migrate.SourceConfig.
type SourceHooks interface {
	// AtSwitch undoes what must be undone here because the process now lives
	// elsewhere: its connections are destroyed, so that clients come again.
	AtSwitch(ctx context.Context) error
	// OnSourceExit is called before the copy is killed, so that its parent or
	// unit sees what SourceOptions.OnSourceExit says.
	OnSourceExit(ctx context.Context) error
}

// Clocks is what a migrate.Process may also be: see migrate.SourceConfig.
type Clocks interface {
	Clocks() (monotonic, boottime time.Duration, err error)
}

// CommitCheck is what a migrate.Process may also be: the last word before the
// commit, with the process held. See migrate.SourceConfig.
type CommitCheck interface {
	// BeforeCommit fails where the process has changed since its state was taken.
	BeforeCommit(ctx context.Context) error
}

// HostFacts is what does not change while a host is up.
type HostFacts struct {
	Kernel    string // uname -r
	Machine   string // uname -m
	PageSize  int
	XFeatures uint64 // of XCR0
	XSize     uint32 // bytes of one thread's XSTATE
	// Abilities by the names that migrate.Offer.Requires uses, and Missing,
	// by the same names, why this host lacks others: "userfaultfd" ->
	// "needs Linux 5.7 or CAP_SYS_PTRACE".
	Abilities []string
	Missing   map[string]string
}

// Host is the destination's end of the engine.
type Host interface {
	// Prepare is migrate.Host's, told besides who offers: page lanes must come
	// from the same peer. Admission has been passed.
	Prepare(ctx context.Context, peer transport.Peer, id transport.MigrationID, offer migrate.Offer) (migrate.Arrival, error)
	// Adopt takes up what an earlier daemon left of an arriving migration: its
	// pager and its frozen or running process.
	Adopt(ctx context.Context, id transport.MigrationID) (migrate.Arrival, error)
	// Lane gives a connection, its preamble unread, to the pager of the
	// migration that lane names. It takes ownership of conn, also when it
	// fails.
	Lane(lane transport.LaneID, conn *os.File) error
	// Shown says in which directory the memory of an arriving migration can be read,
	// how much of it is here, and whether it is kept when all of it is; ID and those
	// that it does not know are left out. It touches nothing of what is shown. The
	// error, an ErrNotShown, says why there is no such directory.
	Shown(ctx context.Context, id transport.MigrationID) (Memory, error)
	// Unkeep ends the keeping: what is shown goes with the last page.
	Unkeep(id transport.MigrationID) error
	// Close lets go of handles; pagers and processes live on.
	Close() error
}

// SourceOptions is how a process is to leave. The zero value is the default.
type SourceOptions struct {
	Migration transport.MigrationID
	Mode      migrate.Mode      // "": postcopy
	Auto      bool              // the model decides whether there are rounds; Mode is hybrid
	Trap      string            // "" or "auto", "uffd"
	Transport string            // "" or "auto", "rdma", "tcp"
	Keep      bool              // ShownKeep
	TCP       string            // "" or "refuse"; "close" closes established connections at the switch
	Addresses map[string]string // address here -> address there, for listeners
	// PIDNamespace is "auto", "host" or "new"; "" is auto.
	PIDNamespace string
	// OnSourceExit is what the parent of the source's copy sees when it ends:
	// "kill" (the default), "exit0" or "stop-unit".
	OnSourceExit string
	PlainPages   bool
	BulkLanes    int
	// MaxDowntime, Throttle and AddressOrder steer the rounds; see migrate.SourceConfig.
	MaxDowntime  time.Duration
	Throttle     float64
	AddressOrder bool
	MaxBandwidth Bandwidth // of all page lanes together; 0 is none
	Compress     codec.Mode
	// Hint is what the process said of itself (migrate.Describer) to an earlier
	// daemon; for AdoptSource.
	Hint   []byte
	Logger *slog.Logger // nil discards
}

// LaneOptions is where and how the source's page lanes go.
type LaneOptions struct {
	Migration transport.MigrationID
	Address   string    // host:port of the destination's daemon
	BulkLanes int       // besides the urgent one
	TLS       *TLSFiles // nil: plain, bound by the one-time key alone
	PeerName  string    // the name that the peer proved on the control lane
	IdleSleep bool      // processors may sleep while the lanes are open
	// Limiter is what the lanes keep to, those that are opened later included.
	// Several migrations may share one. Nil: no limit.
	Limiter  *pace.Limiter
	Logger   *slog.Logger
	Compress codec.Mode
	// Transport is auto, rdma or tcp. With auto, and with no Fabric, it is TCP where
	// RDMA cannot be had.
	Transport string
	Fabric    *Fabric
	// OnTransport is told what was chosen, every time that lanes are opened, and in a
	// remark why, which may be empty. May be nil.
	OnTransport func(name, remark string)
}

// HostOptions is what the destination's end needs to know of its daemon.
type HostOptions struct {
	StateDir string // survives a reboot: journals, event logs
	RunDir   string // does not: sockets of the pagers
	FilesDir string // copies of files that this host lacks; empty: none are kept
	// Pager is the command that runs a pager; its first word is a path.
	Pager       []string
	TLS         *TLSFiles // nil: page lanes are plain
	WindowBytes int64     // asked for and not yet arrived, per bulk lane
	IdleSleep   bool      // processors may sleep while a pager is at work
	Fabric      *Fabric   // nil: page lanes are TCP
	Logger      *slog.Logger
}

// TLSFiles are the paths of PEM files for mutual TLS.
type TLSFiles struct {
	// CA is the authority that signed the certificates of all hosts.
	CA string `yaml:"ca" json:"ca" need:"1"`
	// Cert is the certificate of who uses it.
	Cert string `yaml:"cert" json:"cert" need:"1"`
	// Key is the certificate's private key.
	Key string `yaml:"key" json:"key" need:"1"`
}

// Inspection is what a process is made of, item by item.
type Inspection struct {
	PID         int    `json:"pid"`
	Comm        string `json:"comm"`
	Exe         string `json:"exe"`
	Threads     int    `json:"threads"`
	MemoryBytes uint64 `json:"memory_bytes"`
	// Parent and Unit say who would notice the end of the source's copy;
	// Restarts says whether that one would start another.
	Parent   string           `json:"parent"`
	Unit     string           `json:"unit,omitempty"`
	Restarts bool             `json:"restarts"`
	Items    []InspectionItem `json:"items"`
	Movable  bool             `json:"movable"`
}

// InspectionItem is one thing that a process has.
type InspectionItem struct {
	Kind    string `json:"kind"` // thread, mapping, descriptor, timer, ...
	What    string `json:"what"`
	Carried bool   `json:"carried"`
	Reason  string `json:"reason,omitempty"` // why refused, or how carried
}

// Refusals lists the reasons why the process cannot move.
func (in *Inspection) Refusals() []string {
	var rs []string
	for _, it := range in.Items {
		if !it.Carried {
			rs = append(rs, it.Kind+" "+it.What+": "+it.Reason)
		}
	}
	return rs
}
