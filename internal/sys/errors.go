package sys

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNotSupported is what every *NotSupported is.
var ErrNotSupported = errors.New("not supported by this kernel")

// NotSupported says that the running kernel lacks a feature, and which version
// brought it.
type NotSupported struct {
	Feature string
	Since   string // first mainline version, "6.7"
	Err     error  // what the kernel answered
}

func (e *NotSupported) Error() string {
	return fmt.Sprintf("%s: not supported by this kernel (needs Linux %s or later): %v", e.Feature, e.Since, e.Err)
}

func (e *NotSupported) Unwrap() error { return e.Err }

// Is makes errors.Is(err, ErrNotSupported) true.
func (e *NotSupported) Is(target error) bool { return target == ErrNotSupported }

// missing turns the errnos that an old kernel gives for an unknown call or
// ioctl into *NotSupported, and leaves others alone.
func missing(feature, since string, err error) error {
	switch err {
	case unix.ENOSYS, unix.ENOTTY, unix.EOPNOTSUPP:
		return &NotSupported{feature, since, err}
	}
	return err
}
