package fds

import (
	"context"
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
// is ptrace-stopped or in a frozen cgroup and is not changed. What cannot be
// carried is a *RefusedError, and then the image is as it was.
func Capture(ctx context.Context, c *CaptureContext) error {
	log := c.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	e := &examiner{
		pid: c.HostPID, pidfd: c.PIDFD, content: true, tcpClose: c.TCPClose,
		fileBase: len(c.Image.Files), pipeBase: len(c.Image.Pipes), memoryBase: len(c.Image.Memories),
		memories: c.Memories, vmas: c.Process.VMAs,
	}
	defer e.close()
	if err := e.run(ctx); err != nil {
		return err
	}
	var reasons []string
	for _, f := range e.files {
		for _, r := range f.reasons {
			reasons = append(reasons, f.name()+": "+r)
		}
		for _, n := range f.notes {
			log.Warn("descriptor", "pid", c.HostPID, "fd", f.nums, "what", f.what, "note", n)
		}
	}
	if len(reasons) > 0 {
		return &RefusedError{PID: c.HostPID, Reasons: reasons}
	}
	for _, f := range e.files {
		c.Image.Files = append(c.Image.Files, f.open)
	}
	c.Image.Pipes = append(c.Image.Pipes, e.pipes...)
	c.Image.Memories = append(c.Image.Memories, e.newMemories...)
	for i, ch := range e.uncovered {
		c.Image.Memories[i].Chunks = ch
	}
	if c.Memories != nil {
		for k, i := range e.ownMemories {
			c.Memories[k] = i
		}
	}
	c.Process.FDs = c.Process.FDs[:0]
	for _, d := range e.table {
		c.Process.FDs = append(c.Process.FDs, image.FD{
			Num: d.num, CloseOnExec: d.cloexec, File: e.fileBase + d.file,
		})
	}
	return nil
}
