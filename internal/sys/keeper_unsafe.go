package sys

import (
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// CloneKeeper starts a child that shares this process's descriptor table
// (CLONE_FILES), does nothing but pause, and so keeps every descriptor open, also
// those that are opened later, until it is killed. It ignores all signals but
// SIGKILL and SIGSTOP. name, up to 15 bytes, becomes its comm, and cmdline, with
// a zero byte after each word, its command line as far as it fits into the space
// of this process's.
//
// The child has a copy of the calling thread only and never runs Go code that
// could allocate, grow its stack or wait for another thread. Call it while the
// heap is small: the child keeps what is mapped privately now.
func CloneKeeper(name string, cmdline []byte) (pid int, err error) {
	var comm [16]byte
	copy(comm[:15], name)
	area := argvArea()
	text := make([]byte, len(area)) // zeros behind cmdline
	copy(text, cmdline)
	if len(text) > 0 {
		text[len(text)-1] = 0 // what is not zero here makes ps read on into the environment
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	all, old := ^uint64(0), uint64(0)
	_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK,
		uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	p, e := cloneKeeper(&comm, unsafe.SliceData(area), unsafe.SliceData(text), uintptr(len(area)))
	_, _, _ = syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK,
		uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	runtime.KeepAlive(text)
	if e != 0 {
		return 0, e
	}
	return int(p), nil
}

// cloneKeeper returns in the parent only. What follows the system call in the
// child runs on a copy of this stack.
//
//go:nosplit
//go:norace
func cloneKeeper(comm *[16]byte, area, text *byte, n uintptr) (uintptr, syscall.Errno) {
	pid, _, e := syscall.RawSyscall6(unix.SYS_CLONE, unix.CLONE_FILES|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if e != 0 || pid != 0 {
		return pid, e
	}
	_, _, _ = syscall.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(comm)), 0, 0, 0, 0)
	for i := uintptr(0); i < n; i++ {
		*(*byte)(unsafe.Add(unsafe.Pointer(area), i)) = *(*byte)(unsafe.Add(unsafe.Pointer(text), i))
	}
	for {
		_, _, _ = syscall.RawSyscall6(unix.SYS_PAUSE, 0, 0, 0, 0, 0, 0)
	}
}

// argvArea is where the kernel put the words of the command line, one after the
// other; os.Args points into it. It is empty where that does not hold.
func argvArea() []byte {
	args := runtimeArgs()
	if len(args) == 0 {
		return nil
	}
	start := unsafe.StringData(args[0])
	n := uintptr(0)
	for _, a := range args {
		if unsafe.StringData(a) != (*byte)(unsafe.Add(unsafe.Pointer(start), n)) {
			return nil
		}
		n += uintptr(len(a)) + 1
	}
	return unsafe.Slice(start, n)
}
