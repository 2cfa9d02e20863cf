package proc

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// ErrNoPage says that an address has no page that could be read or written.
var ErrNoPage = errors.New("no such page")

// Memory reads and writes the memory of a process, stopped or not. Reads and
// writes are safe for concurrent use.
type Memory struct {
	pid int
	f   *os.File
}

// OpenMemory opens /proc/PID/mem. The handle stays with the address space that
// the process has now, even if it calls exec.
func OpenMemory(pid int) (*Memory, error) {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, Gone(pid, err)
	}
	return &Memory{pid, f}, nil
}

// Close releases the descriptor. It may be called while others read and write:
// they fail with os.ErrClosed from then on.
func (m *Memory) Close() error { return m.f.Close() }

// File is the /proc/PID/mem descriptor; m keeps it.
func (m *Memory) File() *os.File { return m.f }

// ReadPages copies the pages of rs, one after the other, into buf, which must be
// exactly as long as they are together. Pages that the program itself may not
// read (PROT_NONE) are read too.
func (m *Memory) ReadPages(rs []page.Range, buf []byte) error {
	const most = 1024 // IOV_MAX
	var total uint64
	for _, r := range rs {
		total += r.Bytes()
	}
	if total != uint64(len(buf)) {
		return fmt.Errorf("read memory of pid %d: %d bytes into a buffer of %d", m.pid, total, len(buf))
	}
	var remote [64]unix.RemoteIovec
	for len(rs) > 0 {
		iov, bytes := remote[:0], 0
		for _, r := range rs[:min(len(rs), most)] {
			if r.Empty() {
				continue
			}
			iov = append(iov, unix.RemoteIovec{Base: uintptr(r.Start), Len: int(r.Bytes())})
			bytes += int(r.Bytes())
		}
		done := min(len(rs), most)
		n := 0
		if bytes > 0 {
			local := [1]unix.Iovec{{Base: &buf[0], Len: uint64(bytes)}}
			var err error
			n, err = sys.ProcessVMReadvNow(m.pid, local[:], iov)
			if err != nil {
				if err != unix.EFAULT {
					return Gone(m.pid, fmt.Errorf("read memory of pid %d: %w", m.pid, err))
				}
				n = 0
			}
		}
		if n == bytes {
			rs, buf = rs[done:], buf[bytes:]
			continue
		}
		// It ended inside one range, on a page that may not be read this way.
		buf = buf[n:]
		for uint64(n) >= rs[0].Bytes() {
			n -= int(rs[0].Bytes())
			rs = rs[1:]
		}
		r := page.Range{Start: rs[0].Start + page.Addr(n), End: rs[0].End}
		if err := m.ReadAt(buf[:r.Bytes()], r.Start); err != nil {
			return err
		}
		rs, buf = rs[1:], buf[r.Bytes():]
	}
	return nil
}

// Alive fails with ErrGone where nobody has the address space any more: its process
// has ended, or called exec. The kernel then has nothing to read for the handle
// (mem_rw in fs/proc/base.c), and else no page at address 0, or one.
func (m *Memory) Alive() error {
	var b [1]byte
	err := m.ReadAt(b[:], 0)
	if errors.Is(err, ErrNoPage) {
		err = nil
	}
	return err
}

// ReadAt fills b from address at on, whatever the protection.
func (m *Memory) ReadAt(b []byte, at page.Addr) error {
	if _, err := m.f.ReadAt(b, int64(at)); err != nil {
		return m.fail("read", at, err)
	}
	return nil
}

// WriteAt writes b at address at, whatever the protection: a private page that
// is read-only becomes the process's own copy.
func (m *Memory) WriteAt(b []byte, at page.Addr) error {
	if _, err := m.f.WriteAt(b, int64(at)); err != nil {
		return m.fail("write", at, err)
	}
	return nil
}

func (m *Memory) fail(what string, at page.Addr, err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		err = pe.Err
	}
	switch {
	case err == io.EOF: // the address space is gone
		err = fmt.Errorf("%w", ErrGone)
	case err == unix.EIO || err == unix.EFAULT:
		err = fmt.Errorf("%w: %w", ErrNoPage, err)
	}
	return Gone(m.pid, fmt.Errorf("%s memory of pid %d at %v: %w", what, m.pid, at, err))
}
