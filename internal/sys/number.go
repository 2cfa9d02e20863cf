package sys

import (
	"sync"

	"golang.org/x/sys/unix"
)

// WideNumbers reports whether the kernel takes only the lower half of rax for the
// number of a system call (5.14).
var WideNumbers = sync.OnceValue(func() bool {
	pid, _, err := unix.RawSyscall(unix.SYS_GETPID|1<<32, 0, 0, 0)
	return err == 0 && int(pid) == unix.Getpid()
})
