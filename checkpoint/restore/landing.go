package restore

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// landingFeatures: a page that is missing is an error for whoever touches it, and
// no event for anybody. Whoever lands pages touches them by process_vm_writev(2)
// too, and would wait for himself (fs/userfaultfd.c, handle_userfault).
const landingFeatures = sys.UffdFeatureSigbus

// landing is the userfaultfd of what was laid. UFFDIO_COPY puts a page that is
// missing in place in one step, for two thirds of what a write from outside costs,
// for which the kernel clears the page first. It is another one than traps the
// memory later, and ends before that comes: a mapping has one at a time, and what
// happens to the mappings until then concerns nobody.
type landing struct {
	file *os.File // nil: nothing was laid yet
	in   page.Set // registered
}

// open makes the process open it, and takes it over.
func (l *landing) open(h *held) error {
	sc := newScript(h.t)
	sc.onf("userfaultfd for pages that land")
	made := sc.call(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK)
	if err := sc.run(h.pid); err != nil {
		return err
	}
	fd, err := made.Ret()
	if err != nil {
		return err
	}
	f, err := takeOver(h.pid, int(fd))
	if err != nil {
		return err
	}
	sc = newScript(h.t)
	sc.call(unix.SYS_CLOSE, fd)
	if err := sc.run(h.pid); err != nil {
		f.Close()
		return err
	}
	if _, _, err := sys.UffdAPI(int(f.Fd()), landingFeatures); err != nil {
		f.Close()
		return fmt.Errorf("userfaultfd: features %#x: %w (needs Linux 4.14 and CAP_SYS_PTRACE)", landingFeatures, err)
	}
	l.file = f
	return nil
}

// takeOver is a copy of descriptor fd of a process.
func takeOver(pid, fd int) (*os.File, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	n, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_getfd: %w", err)
	}
	return os.NewFile(uintptr(n), "userfaultfd"), nil
}

// follow registers what was made since the time before. whole is all that there is.
func (l *landing) follow(h *held, whole, made page.Set) error {
	if l.file == nil {
		if err := l.open(h); err != nil {
			return err
		}
	}
	for _, r := range made.Ranges() {
		if _, err := sys.UffdRegister(int(l.file.Fd()), uint64(r.Start), r.Bytes(), sys.UffdioRegisterModeMissing); err != nil {
			return about(fmt.Errorf("userfaultfd: register: %w", err), "mapping %v", r)
		}
	}
	l.in = whole
	return nil
}

// end leaves ordinary mappings behind. Closing alone would do that only once every
// copy is closed, and somebody may just have forked.
func (l *landing) end() error {
	if l.file == nil {
		return nil
	}
	f := l.file
	defer f.Close()
	l.file = nil
	for _, r := range l.in.Ranges() {
		if err := sys.UffdUnregister(int(f.Fd()), uint64(r.Start), r.Bytes()); err != nil {
			return about(fmt.Errorf("userfaultfd: unregister: %w", err), "mapping %v", r)
		}
	}
	return nil
}

// forget is end where the process is gone.
func (l *landing) forget() {
	if l.file != nil {
		l.file.Close()
	}
	*l = landing{}
}

// Landing is the userfaultfd by which pages can be put where Lay made room: by
// UFFDIO_COPY where nothing is yet, by process_vm_writev(2) where something is;
// each fails where the other is right, with EEXIST and EFAULT. It stays the
// skeleton's, and is nil before the first Lay.
func (s *Skeleton) Landing() *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.landing.file
}
