package dirty

import (
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// borders knows where the mappings of a process begin and end now.
//
// A list of mappings is some milliseconds old when it is used. Registering a range
// of it that is in the middle of a mapping by now splits that in two, and then an
// mremap of it, which worked before anybody tracked, fails with EFAULT in the
// program (mremap(2)). So a range is registered only where it still is whole
// mappings. What is left out counts as written, and is there at the next look.
type borders struct{ maps *os.File }

func openBorders(pid int) (*borders, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, proc.Gone(pid, err)
	}
	return &borders{f}, nil
}

func (b *borders) Close() error { return b.maps.Close() }

// hold reports whether r begins and ends where mappings do. Before Linux 6.11
// that cannot be asked for one mapping, and r is believed.
func (b *borders) hold(r page.Range) bool {
	first, err := sys.QueryMapping(int(b.maps.Fd()), uint64(r.Start))
	if err == nil && first.Start == uint64(r.Start) && first.End == uint64(r.End) {
		return true
	}
	last := first
	if err == nil && first.End < uint64(r.End) {
		last, err = sys.QueryMapping(int(b.maps.Fd()), uint64(r.End)-1)
	}
	return errors.Is(err, sys.ErrNotSupported) || err == nil && first.Start == uint64(r.Start) && last.End == uint64(r.End)
}
