package restore

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

// Values of Config.PIDNamespace.
const (
	NamespaceAuto = "auto" // the caller's where the numbers are free, else a new one
	NamespaceHost = "host" // the caller's, or fail with ErrPIDBusy
	NamespaceNew  = "new"  // always a new one, with an init that reaps
)

// Config says how a process is to be rebuilt. Only ID has no default.
type Config struct {
	// ID names the cgroup of the process; unique on this host, one path
	// element.
	ID string
	// CgroupParent is the path of the v2 cgroup, below the mount of the tree,
	// under which the process gets its own. It must not lie in the daemon's:
	// the end of that service would end the process. Default "/pageferry"; made
	// if it is missing.
	CgroupParent string
	// PIDNamespace is one of the Namespace constants. Default auto.
	PIDNamespace string
	// PID that the process had and is to have. Prepare sees to it that it can;
	// 0 leaves all of that to Rebuild.
	PID int
	// PGID and SID are its process group and session, as far as known.
	PGID, SID int
	// Monotonic and Boottime are the source's clocks at the moment of Prepare,
	// as far as it is known: the process's time namespace is then made before
	// the freeze. Rebuild holds them against the image, makes another one if
	// the clocks would run backwards or jump, and needs neither.
	Monotonic, Boottime time.Duration
	// ClocksAt is the moment at which they were heard: they go on from there.
	// Default: that of Prepare.
	ClocksAt time.Time
	// Addresses maps addresses of the source to those of this host, for
	// sockets: see fds.RestoreContext.
	Addresses map[string]string
	// Image is the path of a file that shows the memory of the process, page by page
	// where its View says. Anonymous memory is then veiled by it; empty: it is not. It
	// must answer no later than Trap.Adopt returns.
	Image string
	// FileAt says from which path file i of Image.MappedFiles is to be mapped, which
	// this host has not, or another one of; see Lacking. It is asked when Rebuild
	// begins, and the path is opened by the process, with all rights. On error, or with
	// no FileAt, the process is refused, with all reasons.
	FileAt func(i int) (string, error)
	// Exe gives the executable, file i, where this host has not the same: a file
	// with all of its content, as MakeExe makes it, that stays the process's when
	// nothing is mapped from elsewhere any more. It is called when Rebuild begins, on
	// a goroutine of its own, and the file is closed when it was used. Nil: refused.
	Exe func(ctx context.Context, i int) (*os.File, error)
	// ForceVDSOBridge treats this kernel's vdso as different from the image's.
	// It is there for tests: a bridge is otherwise only built between kernels.
	ForceVDSOBridge bool
	// Log takes what is worth knowing. Nil discards.
	Log *slog.Logger
	// KillPoint is called with "restore/STEP/before" and "restore/STEP/after"
	// around every step. Tests end the program in it. Nil does nothing.
	KillPoint func(name string)
}

// Validate says what of c cannot be.
func (c *Config) Validate() error {
	if c.ID == "" || strings.ContainsAny(c.ID, "/\x00\n") || c.ID == "." || c.ID == ".." {
		return fmt.Errorf("restore: id %q cannot name a cgroup", c.ID)
	}
	switch c.PIDNamespace {
	case "", NamespaceAuto, NamespaceHost, NamespaceNew:
	default:
		return fmt.Errorf("restore: pid namespace %q is none of auto, host, new", c.PIDNamespace)
	}
	if c.PID < 0 {
		return fmt.Errorf("restore: pid %d", c.PID)
	}
	if c.CgroupParent != "" && (!strings.HasPrefix(c.CgroupParent, "/") || strings.Contains(c.CgroupParent, "..")) {
		return fmt.Errorf("restore: cgroup parent %q is no absolute path in the v2 tree", c.CgroupParent)
	}
	return nil
}

func (c *Config) ensureDefaults() {
	if c.CgroupParent == "" {
		c.CgroupParent = "/pageferry"
	}
	if c.PIDNamespace == "" {
		c.PIDNamespace = NamespaceAuto
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.KillPoint == nil {
		c.KillPoint = func(string) {}
	}
}

// Trap takes charge of a rebuilt process's memory: it fills it, before and after
// the process runs.
type Trap interface {
	// Adopt is called when the memory is mapped and registered, before anything
	// touches it. It takes ownership of the descriptors in a, also on error.
	Adopt(ctx context.Context, a Adoption) error
	// WaitEager returns when every page of every Memory.Eager is in place.
	WaitEager(ctx context.Context) error
}

// Adoption is the memory of one process.
type Adoption struct {
	Space page.Space
	// UFFD is the process's userfaultfd, non-blocking, after UFFDIO_API with
	// the FORK, REMAP, REMOVE and UNMAP events, with every RegionUFFD
	// registered for missing pages. Nobody else holds a copy. Nil if no region
	// is a RegionUFFD.
	UFFD *os.File
	// Mem is /proc/PID/mem, open for reading and writing.
	Mem *os.File
	// Veil is the process's userfaultfd for what it does to Views, after UFFDIO_API
	// with the features of fault.VeilFeatures, and with all of them registered for
	// write protection. Nil where there are none.
	Veil  *os.File
	Views []View
	// Kept are the pages of Views that are in their shadows already.
	Kept page.Set
	PID  int // in our pid namespace
	// Regions are the mappings that have content to come, ascending. All of
	// Memory.Lazy lies in those of RegionUFFD; Memory.Eager lies in either.
	Regions []Region
	Memory  image.Memory
}

// RegionKind says how pages get into a region.
type RegionKind uint8

const (
	// RegionUFFD is registered with the userfaultfd: UFFDIO_COPY.
	RegionUFFD RegionKind = iota + 1
	// RegionWrite is not: write to Adoption.Mem, which goes through protection.
	RegionWrite
)

// Region is one mapping.
type Region struct {
	page.Range
	Kind RegionKind
	// Shared: mapped shared, where MADV_DONTNEED keeps the content.
	Shared bool
	// Shadow is where the pages go instead, of a region that is a View; else 0.
	Shadow page.Addr
	// File is the index in Image.MappedFiles, plus 1, of the file that is mapped here
	// from where Config.FileAt said, from Offset on; else 0. Whoever writes to it has
	// the kernel read that file.
	File   int
	Offset uint64
}

// Place is where its pages go.
func (r Region) Place() page.Range {
	if r.Shadow == 0 {
		return r.Range
	}
	return page.Range{Start: r.Shadow, End: r.Shadow + page.Addr(r.Bytes())}
}
