package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func ioctlPtr(fd int, req uintptr, p unsafe.Pointer) (uintptr, error) {
	r, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, uintptr(p))
	if e != 0 {
		return r, e
	}
	return r, nil
}

// Userfaultfd is userfaultfd(2).
func Userfaultfd(flags int) (fd int, err error) {
	r, _, e := unix.Syscall(unix.SYS_USERFAULTFD, uintptr(flags), 0, 0)
	if e != 0 {
		return -1, missing("userfaultfd", "4.3", e)
	}
	return int(r), nil
}

// UffdAPI is the UFFDIO_API handshake. It returns the features and ioctls that
// the kernel offers; EINVAL where it lacks one that was asked for.
func UffdAPI(fd int, features uint64) (offered, ioctls uint64, err error) {
	a := uffdioAPI{API: UffdAPIVersion, Features: features}
	_, err = ioctlPtr(fd, UFFDIO_API, unsafe.Pointer(&a))
	return a.Features, a.Ioctls, err
}

// UffdRegister registers [start, start+length) with a mode of
// UffdioRegisterMode* and returns the ioctls that the range allows.
func UffdRegister(fd int, start, length, mode uint64) (ioctls uint64, err error) {
	a := uffdioRegister{Start: start, Len: length, Mode: mode}
	_, err = ioctlPtr(fd, UFFDIO_REGISTER, unsafe.Pointer(&a))
	return a.Ioctls, err
}

// UffdUnregister undoes UffdRegister for the range and wakes its waiters.
func UffdUnregister(fd int, start, length uint64) error {
	a := uffdioRange{Start: start, Len: length}
	_, err := ioctlPtr(fd, UFFDIO_UNREGISTER, unsafe.Pointer(&a))
	return err
}

// UffdWake wakes the threads that wait for a page of the range.
func UffdWake(fd int, start, length uint64) error {
	a := uffdioRange{Start: start, Len: length}
	_, err := ioctlPtr(fd, UFFDIO_WAKE, unsafe.Pointer(&a))
	return err
}

// UffdCopy places src at dst. It returns the bytes placed, which may be fewer
// than len(src) along with EAGAIN. src must not be Go heap memory that could be
// unmapped; a page of it that is absent stops the copy.
func UffdCopy(fd int, dst uint64, src []byte, mode uint64) (copied int64, err error) {
	a := uffdioCopy{Dst: dst, Src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(src)))), Len: uint64(len(src)), Mode: mode}
	_, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), UFFDIO_COPY, uintptr(unsafe.Pointer(&a)))
	if e != 0 {
		err = e
	}
	return max(a.Copy, 0), err
}

// UffdZeropage maps zero pages over the range and returns the bytes done.
func UffdZeropage(fd int, start, length, mode uint64) (done int64, err error) {
	return uffdRangeMode(fd, UFFDIO_ZEROPAGE, start, length, mode)
}

// UffdContinue maps pages that are in the page cache already (minor faults) and
// returns the bytes done.
func UffdContinue(fd int, start, length, mode uint64) (done int64, err error) {
	n, err := uffdRangeMode(fd, UFFDIO_CONTINUE, start, length, mode)
	return n, missing("UFFDIO_CONTINUE", "5.13", err)
}

// UffdPoison makes every access to the range raise SIGBUS and returns the bytes
// done.
func UffdPoison(fd int, start, length, mode uint64) (done int64, err error) {
	n, err := uffdRangeMode(fd, UFFDIO_POISON, start, length, mode)
	return n, missing("UFFDIO_POISON", "6.6", err)
}

func uffdRangeMode(fd int, req uintptr, start, length, mode uint64) (int64, error) {
	a := uffdioRangeMode{Start: start, Len: length, Mode: mode}
	_, err := ioctlPtr(fd, req, unsafe.Pointer(&a))
	return max(a.Done, 0), err
}

// UffdWriteprotect sets or, with mode 0, lifts write protection of the range.
func UffdWriteprotect(fd int, start, length, mode uint64) error {
	a := uffdioWriteprotect{Start: start, Len: length, Mode: mode}
	_, err := ioctlPtr(fd, UFFDIO_WRITEPROTECT, unsafe.Pointer(&a))
	return err
}

// UffdMove moves pages from src to dst inside the address space that the
// userfaultfd belongs to, and returns the bytes moved.
func UffdMove(fd int, dst, src, length, mode uint64) (moved int64, err error) {
	a := uffdioCopy{Dst: dst, Src: src, Len: length, Mode: mode}
	_, err = ioctlPtr(fd, UFFDIO_MOVE, unsafe.Pointer(&a))
	return max(a.Copy, 0), missing("UFFDIO_MOVE", "6.8", err)
}
