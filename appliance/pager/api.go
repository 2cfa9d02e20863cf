package pager

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// Config is how a pager runs. ID and Dir must be set, the rest has defaults.
type Config struct {
	// Command runs a pager: a path and leading arguments, such as
	// {"/usr/bin/pageferry", "pager"}. Default: this executable and "pager".
	Command []string
	// ID names the migration.
	ID transport.MigrationID
	// Dir holds the pager's socket and pid files: an existing directory that
	// only root can enter, one per migration (/run/pageferry/<id>).
	Dir string
	// Cgroup and KeeperCgroup are paths of existing v2 cgroups that pager and
	// keeper are put into. Default: where the daemon is.
	Cgroup, KeeperCgroup string
	// TLS is for page lanes; nil means that they are plain and bound by their
	// one-time key alone.
	TLS *TLS
	// Window bounds the bytes asked for and not yet arrived on a bulk lane.
	// Default 256 KiB.
	Window int
	// Chunk is how many bytes one background request asks for. Default 128 KiB.
	Chunk int
	// BulkLanes is how many bulk lanes are expected; memory is set aside for
	// them. Default 2.
	BulkLanes int
	// StallTimeout is how long a lane may owe pages and deliver nothing until
	// it counts as lost. Default 10 s.
	StallTimeout time.Duration
	// HeadStart is how long after Fetch only pages around those that threads wait
	// for are fetched. Default 0; not for a process that waits for all of them.
	HeadStart time.Duration
	// IdleSleep lets the host's idle processors sleep while the pager is there.
	// Otherwise they poll, and faults are answered sooner.
	IdleSleep bool
	// ShowDir is where the process is shown as files: a directory that is not there
	// yet. Default: it is not shown.
	ShowDir string
	// Log receives the pager's own log. Default: the file pager.log in Dir, which
	// nobody can keep from being written to by not reading it. See LastWords.
	Log *os.File
}

// TLS names PEM files for mutual TLS on page lanes. That a lane is of this
// migration is proven by its one-time key.
type TLS struct {
	CA   string `cbor:"1,keyasint"`
	Cert string `cbor:"2,keyasint"`
	Key  string `cbor:"3,keyasint"`
}

// WithDefaults is c with every unset field at its default.
func (c Config) WithDefaults() Config {
	if c.Window == 0 {
		c.Window = 256 << 10
	}
	if c.Chunk == 0 {
		c.Chunk = 128 << 10
	}
	if c.BulkLanes == 0 {
		c.BulkLanes = 2
	}
	if c.StallTimeout == 0 {
		c.StallTimeout = 10 * time.Second
	}
	return c
}

// Validate says what is wrong with c after defaults.
func (c *Config) Validate() error {
	switch {
	case !filepath.IsAbs(c.Dir):
		return fmt.Errorf("pager: directory %q is not an absolute path", c.Dir)
	case c.Chunk < page.Size || c.Chunk > 1<<20 || c.Chunk%page.Size != 0:
		return fmt.Errorf("pager: chunk of %d bytes: want whole pages, at most 1 MiB", c.Chunk)
	case c.Window < page.Size || c.Window > 16<<20:
		return fmt.Errorf("pager: window of %d bytes: want 4 KiB to 16 MiB", c.Window)
	case c.BulkLanes < 1 || c.BulkLanes > 16:
		return fmt.Errorf("pager: %d bulk lanes: want 1 to 16", c.BulkLanes)
	case c.StallTimeout < 0 || c.HeadStart < 0:
		return errors.New("pager: negative stall timeout or head start")
	}
	return nil
}

// Kind is how the pages of a region are placed.
type Kind uint8

const (
	// Trapped regions are registered with the userfaultfd for missing pages.
	Trapped Kind = iota + 1
	// Written regions are filled through /proc/PID/mem before the process runs.
	Written
)

// Region is a part of an address space and how it is served.
type Region struct {
	Range page.Range `cbor:"1,keyasint"`
	Kind  Kind       `cbor:"2,keyasint"`
	// Shared regions are mapped shared: MADV_DONTNEED keeps their content.
	Shared bool `cbor:"3,keyasint,omitempty"`
	// Shadow is where the pages of a region go that is a View; else 0.
	Shadow page.Addr `cbor:"4,keyasint,omitempty"`
	// File is the number, plus 1, of the file of Show that is mapped here, from Offset on;
	// else 0.
	File   int    `cbor:"5,keyasint,omitempty"`
	Offset uint64 `cbor:"6,keyasint,omitempty"`
}

// Adoption is an address space that a pager is to serve. Its sets are those of
// checkpoint/image.Memory: Lazy pages lie in Trapped regions, Eager ones in
// regions of either kind, Hot is part of Lazy.
type Adoption struct {
	Space page.Space
	// PID is the process as the pager's namespace sees it.
	PID int
	// UFFD is the userfaultfd, created by the process itself, non-blocking,
	// with UFFDIO_API done (features sys.UFFDServeFeatures) and all Trapped
	// regions registered. May be nil where there is none. The caller must
	// close its own copy after Adopt, and the process's.
	UFFD *os.File
	// Mem is /proc/PID/mem opened for writing. May be nil where there are no
	// Written regions.
	Mem     *os.File
	Regions []Region
	Lazy    page.Set
	Eager   page.Set
	Hot     page.Set
	// Veil is the userfaultfd of Views, with the features of fault.VeilFeatures and
	// all of them registered; Group is the cgroup that the process and its children
	// live in. The pager must show an image (Show).
	Veil  *os.File
	Views []View
	Kept  page.Set // pages of Views that are in their shadows already
	Group string
	// Shown: it has mappings of files of Show.
	Shown bool
}

// PageFile is a file that holds pages, for a restore without a source host.
type PageFile struct {
	File  *os.File
	Space page.Space
	Index []FileRange // in ascending order of Range, not overlapping
	// Sums are the CRC32C of each page of the file. A page that does not have it
	// is lost, and with it all that is missing: the process gets SIGBUS at the
	// next of them, instead of running on a damaged page. Nil: not checked.
	Sums []uint32
}

// FileRange says that the pages of Range lie at Offset one after the other.
type FileRange struct {
	Range  page.Range `cbor:"1,keyasint"`
	Offset int64      `cbor:"2,keyasint"`
}

// EventKind is what an Event tells.
type EventKind uint8

const (
	Progress  EventKind = iota + 1 // a snapshot, about ten a second while pages arrive
	EagerDone                      // every eager page is in place
	Resident                       // every page has arrived
	LaneLost                       // a lane has failed: Lane and Err say which and why
	Exited                         // the pager is gone; the channel is closed next
)

// Event is what the pager tells by itself.
type Event struct {
	Kind  EventKind
	Stats Stats
	Lane  transport.LaneID
	Err   error
}

// Stats counts what a pager has done. Pages are counted at the destination:
// a page that a forked child needs as well counts for the parent only.
type Stats struct {
	PagesTotal    uint64 `cbor:"1,keyasint"`
	PagesResident uint64 `cbor:"2,keyasint"` // arrived, dropped by the program, or zero
	PagesZero     uint64 `cbor:"3,keyasint"` // arrived as zero
	PagesDropped  uint64 `cbor:"4,keyasint"` // given up by the program before they arrived
	PagesFaulted  uint64 `cbor:"5,keyasint"` // asked for because a thread waited
	PagesDouble   uint64 `cbor:"6,keyasint"` // arrived a second time
	PagesEager    uint64 `cbor:"7,keyasint"` // eager pages still to come
	BytesWire     uint64 `cbor:"8,keyasint"` // received on all page lanes
	Faults        uint64 `cbor:"9,keyasint"` // page fault events, hits on zero pages included
	Forks         uint64 `cbor:"10,keyasint"`
	Removes       uint64 `cbor:"11,keyasint"`
	Remaps        uint64 `cbor:"12,keyasint"`
	Unmaps        uint64 `cbor:"13,keyasint"`
	BadPages      uint64 `cbor:"14,keyasint"` // failed their checksum
	LanesLost     uint64 `cbor:"15,keyasint"`
	Lanes         int    `cbor:"16,keyasint"` // attached now
	// Fault latency, from the reading of the event to the wake, of faults that
	// had to be fetched.
	FaultP50  time.Duration `cbor:"17,keyasint"`
	FaultP99  time.Duration `cbor:"18,keyasint"`
	FaultMax  time.Duration `cbor:"19,keyasint"`
	FaultMean time.Duration `cbor:"20,keyasint"`
	// FilesLost: a page of a file that the process maps was refused, as the source's copy
	// has ended. Whoever touched it got SIGBUS.
	FilesLost bool `cbor:"30,keyasint,omitempty"`
	// PagesLanded came before the process was adopted, some of them repeatedly.
	PagesLanded uint64 `cbor:"21,keyasint"`
	// PagesOneSided were read from the source's memory by RDMA.
	PagesOneSided uint64 `cbor:"31,keyasint,omitempty"`
}

var (
	// ErrGone: the pager has exited.
	ErrGone = errors.New("pager: process is gone")
	// ErrLost: the source is lost for good and the missing pages are poisoned.
	ErrLost = errors.New("pager: source lost")
	// ErrNoKeeper: pager and keeper are both gone, and with them what was
	// missing: the kernel gives out zeros for it.
	ErrNoKeeper = errors.New("pager: nobody has kept the memory")
	// ErrNoPager: nothing listens in Dir, and Takeover is the way.
	ErrNoPager = errors.New("pager: no pager listens")
)

var _ io.Closer = (*Client)(nil)
