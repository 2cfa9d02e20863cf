package proc

import (
	"errors"
	"fmt"
	"os"
	"sort"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Lookup finds single mappings of a process that may have very many. Not for
// concurrent use.
type Lookup struct {
	pid int
	f   *os.File
	old bool      // the kernel has no PROCMAP_QUERY (6.11)
	all []Mapping // then
}

// OpenLookup opens /proc/PID/maps. The handle stays with the address space that
// the process has now, even if it calls exec.
func OpenLookup(pid int) (*Lookup, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, Gone(pid, err)
	}
	return &Lookup{pid: pid, f: f}, nil
}

// Close releases the descriptor.
func (l *Lookup) Close() error { return l.f.Close() }

// Again makes At look at what there is now: before Linux 6.11 all mappings are read
// once and kept until then.
func (l *Lookup) Again() { l.all = nil }

// At is the mapping that a lies in, without a name and flags; false where there is
// none.
func (l *Lookup) At(a page.Addr) (Mapping, bool, error) {
	if !l.old {
		q, err := sys.QueryMapping(int(l.f.Fd()), uint64(a))
		switch {
		case err == nil:
			return queried(q), true, nil
		case err == unix.ENOENT:
			return Mapping{}, false, nil
		case !errors.Is(err, sys.ErrNotSupported):
			return Mapping{}, false, Gone(l.pid, fmt.Errorf("look up the mapping of pid %d at %v: %w", l.pid, a, err))
		}
		l.old = true
	}
	if l.all == nil {
		all, err := ReadMaps(l.pid)
		if err != nil {
			return Mapping{}, false, err
		}
		l.all = all
	}
	i := sort.Search(len(l.all), func(i int) bool { return l.all[i].End > a })
	if i == len(l.all) || l.all[i].Start > a {
		return Mapping{}, false, nil
	}
	m := l.all[i]
	m.Name, m.Deleted = "", false
	return m, true, nil
}

func queried(q sys.ProcmapQuery) Mapping {
	m := Mapping{
		Range: page.Range{Start: page.Addr(q.Start), End: page.Addr(q.End)}, Shared: q.Flags&sys.ProcmapVMAShared != 0,
		Offset: q.Offset, Dev: unix.Mkdev(q.DevMajor, q.DevMinor), Ino: q.Ino,
	}
	if q.Flags&sys.ProcmapVMAReadable != 0 {
		m.Prot |= unix.PROT_READ
	}
	if q.Flags&sys.ProcmapVMAWritable != 0 {
		m.Prot |= unix.PROT_WRITE
	}
	if q.Flags&sys.ProcmapVMAExecutable != 0 {
		m.Prot |= unix.PROT_EXEC
	}
	return m
}
