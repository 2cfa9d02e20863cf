package proc

import (
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Piece is a mapping as far as one needs to know to find a file's.
type Piece struct {
	page.Range
	Offset   uint64 // bytes into the file
	Dev, Ino uint64 // Dev as makedev gives it; both 0 without a file
}

// EachMapping calls f for every mapping of pid that overlaps r, in order. Where the
// kernel can be asked for single mappings (PROCMAP_QUERY, 6.11) that costs nothing
// for the others.
func EachMapping(pid int, r page.Range, f func(Piece)) error {
	file, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return Gone(pid, err)
	}
	defer file.Close()
	for at := r.Start; at < r.End; {
		q, err := sys.NextMapping(int(file.Fd()), uint64(at))
		switch {
		case errors.Is(err, unix.ENOENT):
			return nil
		case errors.As(err, new(*sys.NotSupported)):
			return eachOfAll(pid, r, f)
		case err != nil:
			return Gone(pid, fmt.Errorf("mappings of pid %d: %w", pid, err))
		case page.Addr(q.Start) >= r.End:
			return nil
		}
		f(Piece{page.Range{Start: page.Addr(q.Start), End: page.Addr(q.End)}, q.Offset, unix.Mkdev(q.DevMajor, q.DevMinor), q.Ino})
		at = page.Addr(q.End)
	}
	return nil
}

func eachOfAll(pid int, r page.Range, f func(Piece)) error {
	ms, err := ReadMaps(pid)
	if err != nil {
		return err
	}
	for i := range ms {
		if m := &ms[i]; m.Overlaps(r) {
			f(Piece{m.Range, m.Offset, m.Dev, m.Ino})
		}
	}
	return nil
}
