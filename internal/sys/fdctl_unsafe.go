package sys

import (
	"structs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// FOwnerEx is struct f_owner_ex of include/uapi/asm-generic/fcntl.h, since Linux 2.6.32.
type FOwnerEx struct {
	_    structs.HostLayout
	Type int32 // F_OWNER_*
	PID  int32
}

// F_OWNER_* of include/uapi/asm-generic/fcntl.h.
const (
	F_OWNER_TID  = 0
	F_OWNER_PID  = 1
	F_OWNER_PGRP = 2
)

// GetOwner is fcntl(F_GETOWN_EX); PID 0 is no owner. The pid is as seen from our
// pid namespace.
func GetOwner(fd int) (FOwnerEx, error) {
	var o FOwnerEx
	_, _, errno := unix.Syscall(unix.SYS_FCNTL, uintptr(fd), unix.F_GETOWN_EX, uintptr(unsafe.Pointer(&o)))
	if errno != 0 {
		return o, errno
	}
	return o, nil
}

// SetTimerFDTicks sets how many expirations of a timerfd are unread
// (include/uapi/linux/timerfd.h, TFD_IOC_SET_TICKS). Needs
// CONFIG_CHECKPOINT_RESTORE.
func SetTimerFDTicks(fd int, ticks uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), IOW('T', 0, 8), uintptr(unsafe.Pointer(&ticks)))
	if errno != 0 {
		return missing("setting the ticks of a timerfd", "3.17", errno)
	}
	return nil
}

// SetNextWatch makes the next new watch of an inotify descriptor get the number
// wd (include/uapi/linux/inotify.h, INOTIFY_IOC_SETNEXTWD). Needs
// CONFIG_CHECKPOINT_RESTORE.
func SetNextWatch(fd, wd int) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), IOW('I', 0, 4), uintptr(wd))
	if errno != 0 {
		return missing("choosing the number of an inotify watch", "4.16", errno)
	}
	return nil
}
