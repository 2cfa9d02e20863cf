package fds

import (
	"context"
	"errors"
	"log/slog"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// FileKey names an inode on this host.
type FileKey struct{ Dev, Ino uint64 }

// CaptureContext is what Capture works on. The caller owns all of it.
type CaptureContext struct {
	HostPID int
	PIDFD   int
	Image   *image.Image
	Process *image.Process
	// Memories are the shared memory objects that mappings already put into
	// Image.Memories, by their inode. Capture adds those that only descriptors
	// hold. Nil is an empty map.
	Memories map[FileKey]int
	// TCPClose: established TCP connections become sockets that were reset,
	// instead of being refused.
	TCPClose bool
	// Addresses maps addresses of the source to those of the destination
	// (--address). It is not applied here: Restore does that.
	Addresses map[string]string
	Log       *slog.Logger
}

// Capture reads the descriptor table of a frozen process into Process.FDs and
// what the descriptors name into Image.Files, Pipes and Memories. The process
// is ptrace-stopped or in a frozen cgroup and is not changed.
func Capture(ctx context.Context, c *CaptureContext) error {
	return errors.ErrUnsupported
}
