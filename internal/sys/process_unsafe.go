package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// GetRobustList returns the robust futex list head of a thread and its length.
func GetRobustList(tid int) (head, length uint64, err error) {
	_, _, e := unix.RawSyscall(unix.SYS_GET_ROBUST_LIST, uintptr(tid), uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&length)))
	if e != 0 {
		return 0, 0, e
	}
	return head, length, nil
}

// IoprioGet returns the I/O priority of a thread.
func IoprioGet(tid int) (int, error) {
	r, _, e := unix.RawSyscall(unix.SYS_IOPRIO_GET, IoprioWhoProcess, uintptr(tid), 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// SchedGetattr reads a thread's scheduling policy and parameters.
func SchedGetattr(tid int) (a SchedAttr, err error) {
	_, _, e := unix.RawSyscall6(unix.SYS_SCHED_GETATTR, uintptr(tid), uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a), 0, 0, 0)
	if e != 0 {
		return a, e
	}
	return a, nil
}

// SchedGetaffinity returns the words of the thread's cpu_set_t, as many as the
// kernel has.
func SchedGetaffinity(tid int) ([]uint64, error) {
	var buf [128]uint64
	r, _, e := unix.RawSyscall(unix.SYS_SCHED_GETAFFINITY, uintptr(tid), unsafe.Sizeof(buf), uintptr(unsafe.Pointer(&buf)))
	if e != 0 {
		return nil, e
	}
	out := make([]uint64, r/8)
	copy(out, buf[:])
	return out, nil
}

// Tgkill sends sig to one thread; sig 0 only asks whether it is there.
func Tgkill(pid, tid int, sig unix.Signal) error {
	return unix.Tgkill(pid, tid, sig)
}
