package fusemem

import (
	"context"
	"errors"
	"os"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Lender is a Source that may have pages in its own memory. The kernel copies those into its page
// cache from where they lie; by way of a buffer the server's share of a read from beginning to end
// takes a third more processor time.
type Lender interface {
	page.Source
	// Lend returns n pages from first on, or nil where it does not have all of them, and then
	// ReadPages is asked. It does not wait. Until Close of the FS has returned the pages stay where
	// and as they are.
	Lend(first page.Num, n int) []byte
}

// Held is a file that is here as a whole, in memory that a descriptor stands for
// (memfd_create(2)): a Lender. It is mapped, but the mapping is only ever read by the kernel on
// behalf of write(2): a page that is missing there would be EFAULT, not SIGBUS.
type Held struct {
	fd int
	m  []byte // nil where it could not be mapped: it is still read
}

// NewHeld returns what fd stands for, size bytes, which nobody changes any more. The descriptor
// stays the caller's, and open for as long as the Held is used.
func NewHeld(fd int, size int64) *Held {
	h := &Held{fd: fd}
	// Not MAP_POPULATE: 0.14 s for each GiB, and a page that nobody asks for twice is mapped in no
	// less time than when it is asked for.
	if m, err := unix.Mmap(fd, 0, (int(size)+page.Size-1)&^(page.Size-1), unix.PROT_READ, unix.MAP_SHARED); err == nil {
		h.m = m
	}
	return h
}

// Close takes the mapping away: after Close of every FS that has this Source.
func (h *Held) Close() error {
	m := h.m
	if h.m = nil; m == nil {
		return nil
	}
	return os.NewSyscallError("munmap", unix.Munmap(m))
}

// Lend lends the last page as a whole, with zeros behind the end of the file.
func (h *Held) Lend(first page.Num, n int) []byte {
	if have := page.Num(len(h.m) >> page.Shift); first < have && page.Num(n) <= have-first {
		return h.m[first.Addr():][:n<<page.Shift]
	}
	return nil
}

// ReadPages gives zeros behind the end of the file.
func (h *Held) ReadPages(_ context.Context, first page.Num, buf []byte, _ page.Priority) error {
	for at := int64(first.Addr()); len(buf) > 0; {
		n, err := unix.Pread(h.fd, buf, at)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("pread", err)
		case n == 0:
			clear(buf)
			return nil
		}
		at, buf = at+int64(n), buf[n:]
	}
	return nil
}
