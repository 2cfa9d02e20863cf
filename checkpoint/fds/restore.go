package fds

import (
	"context"
	"errors"
	"log/slog"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
)

// RestoreContext is what Restore works on. The caller owns all of it.
type RestoreContext struct {
	Target  *inject.Target
	TID     int // the thread that makes the calls: the leader
	PID     int // of the skeleton, in our pid namespace
	Image   *image.Image
	Process *image.Process
	// MemoryFD names, for objects of Image.Memories that the skeleton has
	// mapped, a descriptor of it, at least 1000. Restore closes them.
	MemoryFD map[int]int
	// Keep are further descriptors of the target that Restore must not close.
	Keep []int
	// Addresses maps addresses of the source to those of this host: "10.0.0.1"
	// or "10.0.0.1:6379" to the same form.
	Addresses map[string]string
	Log       *slog.Logger
}

// Restore makes the descriptor table of the target what Process.FDs says, and
// nothing else: what was open before is closed, but for Keep.
func Restore(ctx context.Context, r *RestoreContext) error {
	return errors.ErrUnsupported
}
