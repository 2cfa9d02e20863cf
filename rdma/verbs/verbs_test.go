package verbs

import (
	"errors"
	"syscall"
	"testing"
)

// TestOpenNothing: a device that is not there and a library that is not there
// are told apart, and neither is more than an error.
func TestOpenNothing(t *testing.T) {
	_, err := Open("no such device")
	if lib := Available(); lib != nil {
		if !errors.Is(err, ErrNoLibrary) || !errors.Is(lib, ErrNoLibrary) {
			t.Errorf("without the library: %v, %v", err, lib)
		}
		return
	}
	if !errors.Is(err, syscall.ENODEV) && !errors.Is(err, syscall.ENOSYS) {
		t.Errorf("with the library: %v", err)
	}
	if s := RetryExceeded.String(); s != "transport retry counter exceeded" {
		t.Errorf("status 12 is %q", s)
	}
	if s := EventPortDown.String(); s != "port error" {
		t.Errorf("event 10 is %q", s)
	}
}
