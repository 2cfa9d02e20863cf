package inject

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

var (
	// ErrNoRoom says that the process has no spare executable bytes for the
	// code that maps the stub area.
	ErrNoRoom = errors.New("no room for the bootstrap code in the vdso or any executable mapping")
	// ErrSeccomp says that a seccomp filter stands between the stub and the kernel.
	ErrSeccomp = errors.New("a seccomp filter is in force")
	// ErrMode says that a thread runs 32-bit code, which the stub cannot.
	ErrMode = errors.New("thread runs in 32-bit mode")
)

// CallError says which call of a batch failed.
type CallError struct {
	PID, TID int
	Index    int // of the call in its batch, from 0
	Nr       uintptr
	Name     string
	Args     [6]uint64
	Errno    unix.Errno
}

func (e *CallError) Error() string {
	return fmt.Sprintf("injected %s(%#x, %#x, %#x, ...), call %d of its batch in pid %d thread %d: %v",
		e.Name, e.Args[0], e.Args[1], e.Args[2], e.Index, e.PID, e.TID, e.Errno)
}

func (e *CallError) Unwrap() error { return e.Errno }

// FaultError says that injected code met a fault: a call wrote a result where
// nothing is mapped, or the stub area was unmapped. The thread is stopped and
// can still be released.
type FaultError struct {
	PID, TID int
	Signal   unix.Signal
	Addr     uint64 // that was accessed
	IP       uint64 // of the stub
}

func (e *FaultError) Error() string {
	return fmt.Sprintf("injected code in pid %d thread %d got %v for address %#x at %#x", e.PID, e.TID, unix.SignalName(e.Signal), e.Addr, e.IP)
}

// KillPoint, when set by a test, is called on the tracer's thread with the name
// of each point at which a tracer might die. Nil in production.
var KillPoint func(point string)

// Point says that the program under migration is at a point where a tracer might
// die. Others whose work can be cut short anywhere call it too.
func Point(name string) {
	if KillPoint != nil {
		KillPoint(name)
	}
}
