package sys

import (
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What follows are system calls that the scheduler of the Go runtime does not
// see: a goroutine that makes one keeps its processor (P) and looks as if it
// computed. That saves what telling the scheduler costs, which is more than a
// short call itself: its monitor thread (sysmon) looks at every P that is in a
// call for longer than 20 us, and each return from one may wake it.
//
// Such a call must be short, or end when a signal arrives. A stop of the world
// waits for it: the runtime sends SIGURG to the threads that it waits for
// (runtime/signal_unix.go, sigPreempt), which ends a poll with EINTR whatever
// SA_RESTART says (signal(7)), and runs its handler late in any other call. Whoever
// waits this way needs a P of its own: raise GOMAXPROCS by one for it.

// AwaitReady waits until a descriptor is ready, a signal arrives or, if limit is
// not negative, the time is up, and returns how many are ready. It keeps the
// goroutine's P.
func AwaitReady(fds []unix.PollFd, limit time.Duration) (n int, err error) {
	var ts *unix.Timespec
	if limit >= 0 {
		t := unix.NsecToTimespec(int64(limit))
		ts = &t
	}
	r, _, e := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(unsafe.SliceData(fds))), uintptr(len(fds)),
		uintptr(unsafe.Pointer(ts)), 0, 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// ReadNow is read(2) of a descriptor that does not block, or of a socket with a
// short SO_RCVTIMEO: then it is EAGAIN when the time is up, and EINTR after a
// signal, whatever SA_RESTART says (signal(7)).
func ReadNow(fd int, p []byte) (n int, err error) {
	r, _, e := unix.RawSyscall(unix.SYS_READ, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(p))), uintptr(len(p)))
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// WriteNow is sendmsg(2) of bufs, in order, with MSG_DONTWAIT; at most MaxVector
// of them in one call.
func WriteNow(fd int, bufs [][]byte) (n int, err error) {
	var vec [MaxVector]unix.Iovec
	k := 0
	for _, b := range bufs {
		if k == len(vec) {
			break
		}
		if len(b) > 0 {
			vec[k] = unix.Iovec{Base: unsafe.SliceData(b), Len: uint64(len(b))}
			k++
		}
	}
	m := unix.Msghdr{Iov: &vec[0], Iovlen: uint64(k)}
	r, _, e := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&m)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// MaxVector is how many buffers WriteNow takes at once.
const MaxVector = 16

// ProcessVMReadvNow is process_vm_readv(2) for pages that are in memory: it
// waits for those that are swapped out.
func ProcessVMReadvNow(pid int, local []unix.Iovec, remote []unix.RemoteIovec) (n int, err error) {
	r, _, e := unix.RawSyscall6(unix.SYS_PROCESS_VM_READV, uintptr(pid),
		uintptr(unsafe.Pointer(unsafe.SliceData(local))), uintptr(len(local)),
		uintptr(unsafe.Pointer(unsafe.SliceData(remote))), uintptr(len(remote)), 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}

// From <linux/futex.h>.
const (
	futexWaitPrivate = 0 | 128
	futexWakePrivate = 1 | 128
)

// FutexWait sleeps while *at is v, until somebody wakes it, a signal arrives or
// limit is over; see futex(2). It keeps the goroutine's P.
func FutexWait(at *atomic.Uint32, v uint32, limit time.Duration) {
	ts := unix.NsecToTimespec(int64(limit))
	_, _, _ = unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(at)), futexWaitPrivate, uintptr(v), uintptr(unsafe.Pointer(&ts)), 0, 0)
}

// FutexWake wakes all who sleep on at.
func FutexWake(at *atomic.Uint32) {
	_, _, _ = unix.RawSyscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(at)), futexWakePrivate, 1<<31-1, 0, 0, 0)
}

// ProcessVMWritevNow is process_vm_writev(2), the same way round: the pages that
// it touches for the first time are made.
func ProcessVMWritevNow(pid int, local []unix.Iovec, remote []unix.RemoteIovec) (n int, err error) {
	r, _, e := unix.RawSyscall6(unix.SYS_PROCESS_VM_WRITEV, uintptr(pid),
		uintptr(unsafe.Pointer(unsafe.SliceData(local))), uintptr(len(local)),
		uintptr(unsafe.Pointer(unsafe.SliceData(remote))), uintptr(len(remote)), 0)
	if e != 0 {
		return 0, e
	}
	return int(r), nil
}
