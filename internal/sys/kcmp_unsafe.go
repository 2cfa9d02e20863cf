package sys

import (
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// include/uapi/linux/kcmp.h, since Linux 3.5 (KCMP_EPOLL_TFD since 4.13).
const (
	KCMP_FILE      = 0
	KCMP_VM        = 1
	KCMP_FILES     = 2
	KCMP_FS        = 3
	KCMP_SIGHAND   = 4
	KCMP_IO        = 5
	KCMP_SYSVSEM   = 6
	KCMP_EPOLL_TFD = 7
)

// KcmpEpollSlot is struct kcmp_epoll_slot: the registration number Toff, from
// 0, among those of the epoll descriptor EFD that have the number TFD.
type KcmpEpollSlot struct {
	_    structs.HostLayout
	EFD  uint32
	TFD  uint32
	TOff uint32
}

// Kcmp compares a kernel object of two processes. It returns 0 where they are
// the same one, -1 or 1 for an order among all objects that holds until the
// next boot.
func Kcmp(pid1, pid2, kind int, idx1, idx2 uint64) (int, error) {
	return kcmp(pid1, pid2, kind, uintptr(idx1), uintptr(idx2))
}

// KcmpEpoll compares the descriptor fd of pid1 with the open file that an epoll
// registration of pid2 watches. The answer is as for Kcmp. ENOENT: there is no
// such registration.
func KcmpEpoll(pid1, fd, pid2 int, slot KcmpEpollSlot) (int, error) {
	return kcmp(pid1, pid2, KCMP_EPOLL_TFD, uintptr(fd), uintptr(unsafe.Pointer(&slot)))
}

//go:uintptrescapes
func kcmp(pid1, pid2, kind int, a, b uintptr) (int, error) {
	r, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid1), uintptr(pid2), uintptr(kind), a, b, 0)
	switch {
	case errno != 0:
		return 0, errno
	case r == 0:
		return 0, nil
	case r == 1:
		return -1, nil
	default:
		return 1, nil
	}
}
