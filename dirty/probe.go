package dirty

import (
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Support says whether this host can track by a method.
type Support struct {
	Method Method
	Err    error // why not; nil where it can
}

// Probe tries each method on a page of this program, the best first. Of a process
// that is to be tracked more can be found out by New only.
func Probe() []Support {
	var out []Support
	for _, m := range Methods {
		out = append(out, Support{m, probe(m)})
	}
	return out
}

func probe(m Method) error {
	switch m {
	case WPAsync:
		return withPage(probeWP)
	case SoftDirty:
		return withPage(probeSoftDirty)
	}
	return nil
}

// withPage calls f with a page of private memory that was written.
func withPage(f func(b []byte, r page.Range, pm *proc.Pagemap) error) error {
	b, err := unix.Mmap(-1, 0, page.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return os.NewSyscallError("mmap", err)
	}
	defer unix.Munmap(b)
	b[0] = 1
	pm, err := proc.OpenPagemap(os.Getpid())
	if err != nil {
		return err
	}
	defer pm.Close()
	return f(b, page.PageOf(page.Addr(sys.Address(b))), pm)
}

func probeWP(b []byte, r page.Range, pm *proc.Pagemap) error {
	// Faults of the kernel need no handler here, so every program may have it.
	fd, err := sys.Userfaultfd(unix.O_CLOEXEC | unix.O_NONBLOCK | sys.UffdUserModeOnly)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := wpHandshake(fd); err != nil {
		return err
	}
	if _, err := sys.UffdRegister(fd, uint64(r.Start), r.Bytes(), sys.UffdioRegisterModeWP); err != nil {
		return fmt.Errorf("register for write protection: %w", err)
	}
	take := func() (n int, err error) {
		err = pm.Take(r, true, proc.Walk{Written: func(page.Range) { n++ }})
		return n, err
	}
	if _, err := take(); err != nil {
		return err
	}
	clean, err := take()
	if err != nil {
		return err
	}
	b[0] = 2
	wrote, err := take()
	if err == nil && (clean != 0 || wrote != 1) {
		err = errors.New("a write was not seen")
	}
	return err
}

func probeSoftDirty(_ []byte, r page.Range, pm *proc.Pagemap) error {
	set := false
	// A page that was just made and written has the bit where there is one.
	if err := pm.SoftDirty(r, true, 0, proc.Walk{Written: func(page.Range) { set = true }}); err != nil {
		return err
	}
	if !set {
		return errors.New("a kernel without CONFIG_MEM_SOFT_DIRTY")
	}
	if _, err := os.Stat("/proc/self/clear_refs"); err != nil {
		return err
	}
	return nil
}

// zeroFrame is the number of the page frame that stands for all pages that were
// read and never written, 0 where it cannot be found out.
func zeroFrame() (frame uint64) {
	b, err := unix.Mmap(-1, 0, page.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0
	}
	defer unix.Munmap(b)
	if b[0] != 0 {
		return 0
	}
	pm, err := proc.OpenPagemap(os.Getpid())
	if err != nil {
		return 0
	}
	defer pm.Close()
	e, err := pm.Entry(page.Addr(sys.Address(b)))
	if err != nil || !e.Present {
		return 0
	}
	return e.Frame
}
