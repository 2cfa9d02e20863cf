package fds

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// describePipe is for an end of a pipe or of a FIFO.
func (e *examiner) describePipe(f *file) error {
	f.open.Kind, f.kind = image.FilePipe, "pipe"
	f.what = f.link
	path := ""
	if strings.HasPrefix(f.link, "/") {
		f.open.Kind, f.kind = image.FileFIFO, "fifo"
		if err := e.describePath(f); err != nil {
			return err
		}
		if f.open.Deleted {
			f.open.Deleted = false
			f.reasons = nil
			// Without a name it is what a pipe is.
			f.open.Kind, f.kind, f.open.Path = image.FilePipe, "pipe", ""
		}
		path = f.open.Path
	}
	fd, err := e.dup(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := e.owner(f, fd); err != nil {
		return err
	}
	for _, g := range e.files {
		if g == f {
			break
		}
		if g.pipe >= 0 && g.key() == f.key() {
			f.pipe = g.pipe
		}
	}
	if f.pipe < 0 {
		size, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
		if err != nil {
			return fmt.Errorf("read its capacity: %w", err)
		}
		f.pipe = len(e.pipes)
		e.pipes = append(e.pipes, image.Pipe{Path: path, Capacity: size})
	}
	f.open.Pipe = e.pipeBase + f.pipe
	if mode := f.open.Flags & unix.O_ACCMODE; e.content && mode != unix.O_WRONLY {
		p := &e.pipes[f.pipe]
		if p.Data == nil && p.Packets == nil {
			if err := readPipe(fd, p); err != nil {
				return fmt.Errorf("copy its unread data: %w", err)
			}
		}
	}
	return nil
}

// readPipe copies what is in a pipe without consuming it: tee(2) into a pipe of
// our own, which takes over the boundaries of packets.
func readPipe(fd int, p *image.Pipe) error {
	size, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return err
	}
	if size == 0 {
		return nil
	}
	var own [2]int
	if err := unix.Pipe2(own[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return err
	}
	defer unix.Close(own[0])
	defer unix.Close(own[1])
	if _, err := unix.FcntlInt(uintptr(own[1]), unix.F_SETPIPE_SZ, p.Capacity); err != nil {
		return fmt.Errorf("pipe of %d bytes: %w", p.Capacity, err)
	}
	n, err := unix.Tee(fd, own[1], 1<<30, unix.SPLICE_F_NONBLOCK)
	if err != nil {
		return err
	}
	if int(n) != size {
		return fmt.Errorf("has %d bytes, of which %d could be copied", size, n)
	}
	buf := make([]byte, size)
	for got := 0; got < size; {
		k, err := unix.Read(own[0], buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if k == 0 {
			return errors.New("ended early")
		}
		p.Packets = append(p.Packets, bytes.Clone(buf[:k]))
		got += k
	}
	return nil
}

// finishPipes decides, when all descriptors are known, what becomes of pipes.
func (e *examiner) finishPipes() error {
	for i := range e.pipes {
		p := &e.pipes[i]
		var readers, writers, packets int
		var ends []*file
		for _, f := range e.files {
			if f.pipe != i {
				continue
			}
			ends = append(ends, f)
			switch f.open.Flags & unix.O_ACCMODE {
			case unix.O_RDONLY:
				readers++
			case unix.O_WRONLY:
				writers++
			default:
				readers++
				writers++
			}
			if f.open.Flags&unix.O_DIRECT != 0 && f.open.Flags&unix.O_ACCMODE != unix.O_RDONLY {
				packets++
			}
		}
		if packets == 0 {
			p.Data, p.Packets = bytes.Join(p.Packets, nil), nil
		}
		for _, f := range ends {
			if err := e.otherEnd(f, readers, writers); err != nil {
				if !e.content && errors.Is(err, unix.EBADF) {
					continue
				}
				return fmt.Errorf("process %d, %s: %w", e.pid, f.name(), err)
			}
		}
	}
	return nil
}

// otherEnd refuses a pipe whose other end is outside of the process. That it is
// gone altogether is told by poll(2).
func (e *examiner) otherEnd(f *file, readers, writers int) error {
	if readers > 0 && writers > 0 {
		f.state = "both ends inside"
		return nil
	}
	fd, err := e.dup(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN | unix.POLLOUT}}
	if _, err := unix.Poll(p, 0); err != nil {
		return fmt.Errorf("poll: %w", err)
	}
	if p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0 {
		f.state = "other end gone"
		e.pipes[f.pipe].HangUp = true
		return nil
	}
	side := "reading"
	if writers == 0 {
		side = "writing"
	}
	if f.open.Kind == image.FileFIFO && side == "writing" && f.open.Flags&unix.O_NONBLOCK != 0 && len(e.holders(f.key())) == 0 {
		f.state = "no writer yet"
		return nil
	}
	f.state = "other end outside"
	who := ""
	if h := e.holders(f.key()); len(h) > 0 {
		who = ": " + strings.Join(h, ", ")
	}
	f.refuse("its %s end is held outside of the process%s", side, who)
	return nil
}

// findOutside notes pipes and FIFOs that another process holds as well.
func (e *examiner) findOutside() {
	for _, f := range e.files {
		if f.pipe < 0 || f.state != "both ends inside" {
			continue
		}
		if h := e.holders(f.key()); len(h) > 0 {
			f.refuse("the pipe is shared with %s", strings.Join(h, ", "))
		}
	}
}

// holders names the other processes that have the inode open.
func (e *examiner) holders(k FileKey) []string {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []string
	self := os.Getpid()
	for _, d := range procs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == e.pid || pid == self {
			continue
		}
		dir := "/proc/" + d.Name() + "/fd"
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue
		}
		if slices.ContainsFunc(fds, func(fd os.DirEntry) bool {
			link, err := os.Readlink(dir + "/" + fd.Name())
			if err != nil || !strings.HasPrefix(link, "pipe:") && !strings.HasPrefix(link, "/") {
				return false
			}
			if strings.HasPrefix(link, "pipe:") {
				return link == fmt.Sprintf("pipe:[%d]", k.Ino)
			}
			var st unix.Stat_t
			return unix.Stat(dir+"/"+fd.Name(), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFIFO &&
				st.Dev == k.Dev && st.Ino == k.Ino
		}) {
			comm, _ := os.ReadFile("/proc/" + d.Name() + "/comm")
			out = append(out, fmt.Sprintf("%s (pid %d)", strings.TrimSpace(string(comm)), pid))
		}
	}
	return out
}
