package image

import (
	"fmt"
	"strings"

	"github.com/pageferry/pageferry/page"
)

// userTop is the end of user addresses with four-level page tables; nothing of a
// process that does not ask for more lies above it.
const userTop = page.Addr(1) << 47

// Validate checks that the image hangs together: indexes inside their lists,
// ranges aligned, in order and in user space, sizes that the kernel would take.
// Whoever rebuilds a process relies on it and does not check again.
func (img *Image) Validate() error {
	bad := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, a...))
	}
	if len(img.Processes) == 0 || img.Root < 0 || img.Root >= len(img.Processes) {
		return bad("%d processes, root %d", len(img.Processes), img.Root)
	}
	for i := range img.Processes {
		p := &img.Processes[i]
		if p.PID <= 0 || len(p.Threads) == 0 || p.Threads[0].TID != p.PID {
			return bad("process %d has pid %d and %d threads", i, p.PID, len(p.Threads))
		}
		for _, t := range p.Threads {
			if t.TID <= 0 || len(t.XState) < 576 || len(t.XState) > 1<<20 || !siginfos(t.Pending) {
				return bad("thread %d of process %d", t.TID, p.PID)
			}
		}
		if !siginfos(p.Pending) {
			return bad("pending signals of process %d", p.PID)
		}
		for _, a := range p.SigActions {
			if a.Signal < 1 || a.Signal > 64 {
				return bad("signal action %d of process %d", a.Signal, p.PID)
			}
		}
		at := page.Addr(0)
		for _, v := range p.VMAs {
			if v.Kind == VMAVsyscall {
				continue
			}
			if v.Kind < VMAAnon || v.Kind > VMADevice || v.Empty() || !v.Aligned() || v.Start < at || v.End > userTop {
				return bad("mapping %v of process %d", v.Range, p.PID)
			}
			if v.Kind == VMAShared && (v.Memory < 0 || v.Memory >= len(img.Memories)) {
				return bad("mapping %v of process %d names shared memory %d of %d", v.Range, p.PID, v.Memory, len(img.Memories))
			}
			if v.Window && (v.Kind != VMAShared || !v.Shared || v.Offset != 0) {
				return bad("mapping %v of process %d is a window of kind %d", v.Range, p.PID, v.Kind)
			}
			if v.MappedFile < 0 || v.MappedFile > len(img.MappedFiles) || v.MappedFile > 0 && v.Kind != VMAFile {
				return bad("mapping %v of process %d, of kind %d, names file %d of %d", v.Range, p.PID, v.Kind, v.MappedFile, len(img.MappedFiles))
			}
			at = v.End
		}
		if p.ExeFile < 0 || p.ExeFile > len(img.MappedFiles) {
			return bad("the executable of process %d is file %d of %d", p.PID, p.ExeFile, len(img.MappedFiles))
		}
		last := -1
		for _, d := range p.FDs {
			if d.Num <= last || d.Num >= 1<<20 || d.File < 0 || d.File >= len(img.Files) {
				return bad("descriptor %d of process %d", d.Num, p.PID)
			}
			last = d.Num
		}
	}
	for i, f := range img.MappedFiles {
		if f.File.Size < 0 || f.Path == "" || strings.ContainsRune(f.Path, 0) {
			return bad("mapped file %d", i)
		}
	}
	for i := range img.Files {
		if err := img.validFile(&img.Files[i]); err != "" {
			return bad("open file %d: %s", i, err)
		}
	}
	for i, m := range img.Memories {
		if m.Size < 0 || !chunks(m.Chunks, m.Size) {
			return bad("shared memory %d", i)
		}
	}
	for i, p := range img.Pipes {
		if p.Capacity < 0 || p.Capacity > 1<<31 || len(p.Data) > p.Capacity {
			return bad("pipe %d", i)
		}
	}
	return nil
}

func (img *Image) validFile(f *OpenFile) string {
	switch f.Kind {
	case FileRegular, FileDirectory, FileDevice, FileSignalFD, FileInotify:
	case FilePipe, FileFIFO:
		if f.Pipe < 0 || f.Pipe >= len(img.Pipes) {
			return "no such pipe"
		}
	case FileMemFD:
		if f.Memory < 0 || f.Memory >= len(img.Memories) {
			return "no such shared memory"
		}
	case FileEventFD:
		if f.EventFD == nil {
			return "eventfd without state"
		}
	case FileTimerFD:
		if f.TimerFD == nil {
			return "timerfd without state"
		}
	case FileEpoll:
		for _, e := range f.Epoll {
			if e.File < 0 || e.File >= len(img.Files) {
				return "epoll item names no open file"
			}
		}
	case FileSocket:
		s := f.Socket
		if s == nil || len(s.Local) > 128 || len(s.Remote) > 128 || s.Peer < -1 || s.Peer >= len(img.Files) {
			return "socket without usable state"
		}
		if s.State < SocketFresh || s.State > SocketClosed {
			return "socket in no known state"
		}
	default:
		return fmt.Sprintf("kind %d", f.Kind)
	}
	if f.Pos < 0 {
		return "negative offset"
	}
	if !chunks(f.Content, f.ID.Size) {
		return "content outside the file"
	}
	return ""
}

func chunks(cs []Chunk, size int64) bool {
	at := int64(0)
	for _, c := range cs {
		if c.Offset < at || int64(len(c.Data)) > size-c.Offset {
			return false
		}
		at = c.Offset + int64(len(c.Data))
	}
	return true
}

func siginfos(s [][]byte) bool {
	for _, b := range s {
		if len(b) != 128 {
			return false
		}
	}
	return true
}
