package restore

import (
	"errors"
	"fmt"
)

var (
	// ErrPIDBusy: the pid, or the number of one of the threads, is taken in
	// the pid namespace that was asked for.
	ErrPIDBusy = errors.New("number is taken by another process")
	// ErrFileDiffers: a file that the process has mapped is missing here, or
	// is another one.
	ErrFileDiffers = errors.New("file is not the one that the process has mapped")
	// ErrInsideVDSO: a thread stands inside the source's vdso and this kernel
	// has another one. The source can be frozen again: it takes nanoseconds to
	// get out.
	ErrInsideVDSO = errors.New("thread stands inside the vdso of another kernel")
	// ErrUnsupported: the image has something that cannot be rebuilt here.
	ErrUnsupported = errors.New("cannot be rebuilt on this host")
	// ErrNoSkeleton: there is nothing to reattach to.
	ErrNoSkeleton = errors.New("no rebuilt process of that id")
	// ErrState: the call does not fit what was done before.
	ErrState = errors.New("wrong moment")
)

// Error says in which step the rebuild of which process failed, and over what.
type Error struct {
	Step   string // "threads", "mappings", ...
	PID    int    // of the image
	Object string // "mapping 7f00-7f10 of /usr/lib/libc.so.6"; may be empty
	Err    error
}

func (e *Error) Error() string {
	if e.Object == "" {
		return fmt.Sprintf("restore: pid %d: %s: %v", e.PID, e.Step, e.Err)
	}
	return fmt.Sprintf("restore: pid %d: %s: %s: %v", e.PID, e.Step, e.Object, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// object is an error about something that has a name; the step and the pid are
// added where it passes.
type object struct {
	name string
	err  error
}

func (o *object) Error() string { return o.name + ": " + o.err.Error() }
func (o *object) Unwrap() error { return o.err }

func about(err error, format string, a ...any) error {
	return &object{fmt.Sprintf(format, a...), err}
}
