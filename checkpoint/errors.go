package checkpoint

import (
	"errors"
	"fmt"
	"strings"
)

var (
	ErrNoProcess    = errors.New("there is no such process")
	ErrThread       = errors.New("this is a thread; give the process id")
	ErrKernelThread = errors.New("this is a kernel thread")
	ErrSelf         = errors.New("this is pageferry itself")
	ErrZombie       = errors.New("the process has ended and waits for its parent")
	ErrTraced       = errors.New("the process is traced already, by a debugger or another migration; end that first")
	// ErrStuck says that a thread did not stop in time: it waits in the kernel
	// for a disk, a network file system or the child of a vfork.
	ErrStuck = errors.New("a thread cannot be stopped now; try again later")
	// ErrHeld says that the process was left frozen by an earlier session, for
	// Reattach: it may belong to another host.
	ErrHeld = errors.New("the process stands frozen for a migration that is not over; finish or resolve that first")
	// ErrBusy says that another session is at work on the process.
	ErrBusy = errors.New("another migration or checkpoint of the process is under way; wait for its end")
	// ErrState says that a method was called in a state that does not allow it.
	ErrState = errors.New("the session is in another state")
	// ErrSignaled says that the held process has signals that its image lacks.
	ErrSignaled = errors.New("a signal came while its state was being moved, and is delivered here; try again")
	// ErrKilled says that the session has killed its process.
	ErrKilled = errors.New("the process was killed by this session")
)

// Error is a failure about one process.
type Error struct {
	Op  string
	PID int
	Err error
}

func (e *Error) Error() string { return fmt.Sprintf("%s process %d: %v", e.Op, e.PID, e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// RefusedError lists what of a process cannot be carried.
type RefusedError struct {
	PID     int
	Reasons []string
}

func (e *RefusedError) Error() string {
	return fmt.Sprintf("process %d cannot be carried: %s", e.PID, strings.Join(e.Reasons, "; "))
}
