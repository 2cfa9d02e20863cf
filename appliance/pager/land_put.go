package pager

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// put puts data at r, whether something is there or not: it begins with what is
// more likely, and each of the two ways says where it is the wrong one.
func (l *lander) put(r page.Range, data []byte) error {
	l.mu.Lock()
	over := l.written.Contains(r.Start)
	l.mu.Unlock()
	for tries := 0; len(data) > 0; {
		do, wrong := l.fill, []error{unix.EEXIST, unix.ENOENT}
		if over {
			do, wrong = l.write, []error{unix.EFAULT}
		}
		n, err := do(r.Start, data)
		n &^= page.Size - 1
		data, r.Start = data[n:], r.Start+page.Addr(n)
		switch {
		case n > 0:
			tries = 0
		case tries < 2 && slices.ContainsFunc(wrong, func(e error) bool { return errors.Is(err, e) }):
			over = !over
			tries++
		default:
			l.check(err)
			return fmt.Errorf("pager: land pages %v in process %d: %w", r, l.pid, err)
		}
	}
	return nil
}

// fill places pages that are missing: EEXIST where the first is there, ENOENT where
// none can be missing, as in a mapping of a file. The kernel takes no range that lies
// in two of its mappings, so it may have to be a part.
func (l *lander) fill(at page.Addr, data []byte) (int, error) {
	for {
		n, err := sys.UffdCopy(l.uffd, uint64(at), data, 0)
		if !errors.Is(err, unix.ENOENT) || len(data) <= page.Size {
			return int(n), err
		}
		data = data[:len(data)/2&^(page.Size-1)]
	}
}

// write writes over pages that are there: EFAULT where the first is missing.
func (l *lander) write(at page.Addr, data []byte) (int, error) {
	local := [1]unix.Iovec{{Base: &data[0], Len: uint64(len(data))}}
	remote := [1]unix.RemoteIovec{{Base: uintptr(at), Len: len(data)}}
	return sys.ProcessVMWritevNow(l.pid, local[:], remote[:])
}
