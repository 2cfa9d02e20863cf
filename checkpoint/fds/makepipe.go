package fds

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// pipeEnds is a pipe that was made anew. r and w belong to the maker, also when
// they are handed over.
type pipeEnds struct {
	r, w         int // -1 where the end is open nowhere
	rUsed, wUsed bool
}

// pipeEnd makes or finds the pipe and returns the end that f is.
func (m *maker) pipeEnd(f *image.OpenFile) (int, error) {
	p := m.pipes[f.Pipe]
	if p == nil {
		var err error
		if p, err = m.makePipe(f.Pipe); err != nil {
			return -1, err
		}
		m.pipes[f.Pipe] = p
		m.temps = append(m.temps, p.r, p.w)
	}
	if f.Kind == image.FileFIFO {
		fd, err := unix.Open(m.r.Image.Pipes[f.Pipe].Path, openFlags(f.Flags)|unix.O_NONBLOCK, 0)
		if err != nil {
			return -1, fmt.Errorf("open FIFO %s: %w", m.r.Image.Pipes[f.Pipe].Path, err)
		}
		return fd, nil
	}
	// The first one of each side is the end that pipe(2) made, others are
	// opened anew, as they must have been at the source.
	switch mode := f.Flags & unix.O_ACCMODE; {
	case mode == unix.O_RDONLY && !p.rUsed:
		p.rUsed = true
		return unix.FcntlInt(uintptr(p.r), unix.F_DUPFD_CLOEXEC, 0)
	case mode == unix.O_WRONLY && !p.wUsed:
		p.wUsed = true
		return unix.FcntlInt(uintptr(p.w), unix.F_DUPFD_CLOEXEC, 0)
	}
	g := *f
	g.Pos = 0
	g.Flags |= unix.O_NONBLOCK
	return reopen(p.r, &g)
}

func (m *maker) makePipe(index int) (*pipeEnds, error) {
	s := &m.r.Image.Pipes[index]
	p := &pipeEnds{r: -1, w: -1}
	writer := false
	var f *image.OpenFile // any end
	for i := range m.r.Image.Files {
		g := &m.r.Image.Files[i]
		if (g.Kind == image.FilePipe || g.Kind == image.FileFIFO) && g.Pipe == index {
			if f == nil {
				f = g
			}
			writer = writer || g.Flags&unix.O_ACCMODE != unix.O_RDONLY
		}
	}
	if s.Path != "" {
		if err := m.openFIFO(p, s, f, writer || s.HangUp || len(s.Data) > 0 || len(s.Packets) > 0); err != nil {
			return nil, fmt.Errorf("FIFO %s: %w", s.Path, err)
		}
	} else {
		flags := unix.O_CLOEXEC | unix.O_NONBLOCK
		if len(s.Packets) > 0 {
			flags |= unix.O_DIRECT
		}
		var ends [2]int
		if err := unix.Pipe2(ends[:], flags); err != nil {
			return nil, fmt.Errorf("make pipe: %w", err)
		}
		p.r, p.w = ends[0], ends[1]
		if f.UID != 0 || f.GID != 0 {
			if err := unix.Fchown(p.r, int(f.UID), int(f.GID)); err != nil {
				return nil, fmt.Errorf("owner of a pipe: %w", err)
			}
		}
	}
	if err := fillPipe(p, s); err != nil {
		unix.Close(p.r)
		unix.Close(p.w)
		return nil, err
	}
	return p, nil
}

func fillPipe(p *pipeEnds, s *image.Pipe) error {
	fd := p.w
	if fd < 0 {
		fd = p.r
	}
	if s.Capacity > 0 {
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, s.Capacity); err != nil {
			return fmt.Errorf("pipe of %d bytes: %w", s.Capacity, err)
		}
	}
	parts := s.Packets
	if len(s.Data) > 0 {
		parts = append([][]byte{s.Data}, parts...)
	}
	for _, b := range parts {
		for len(b) > 0 {
			n, err := unix.Write(fd, b)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return fmt.Errorf("put back %d unread bytes of a pipe: %w", len(b), err)
			}
			b = b[n:]
		}
	}
	return nil
}

// openFIFO opens a named pipe, which is made where it does not exist. both is
// whether it is to have had a writer.
func (m *maker) openFIFO(p *pipeEnds, s *image.Pipe, f *image.OpenFile, both bool) error {
	err := unix.Mkfifo(s.Path, 0o600)
	switch {
	case err == nil:
		m.created = append(m.created, s.Path)
		if err := errors.Join(unix.Chown(s.Path, int(f.UID), int(f.GID)), unix.Chmod(s.Path, f.ID.Mode&0o7777)); err != nil {
			return err
		}
	case !errors.Is(err, unix.EEXIST):
		return err
	}
	mode := unix.O_RDONLY
	if both {
		mode = unix.O_RDWR
	}
	fd, err := unix.Open(s.Path, mode|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	n := 0
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFIFO {
		err = errors.New("is not a FIFO on this host")
	}
	if err == nil {
		n, err = unix.IoctlGetInt(fd, unix.TIOCINQ)
	}
	if err == nil && n > 0 {
		err = fmt.Errorf("has %d bytes in it on this host already", n)
	}
	if err != nil {
		unix.Close(fd)
		return err
	}
	if both {
		p.w = fd
	} else {
		p.r = fd
	}
	return nil
}
