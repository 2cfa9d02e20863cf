package fds

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// nameUnix binds a unix socket and connects one that needs nobody's consent.
// listen(2) is left to the target, whom SO_PEERCRED will name.
func (m *maker) nameUnix(fd int, f *image.OpenFile) error {
	s := f.Socket
	path, abstract := unixPath(s.Local)
	switch {
	case abstract:
		if err := sys.BindRaw(fd, s.Local); err != nil {
			return bindError(s.Local, err)
		}
	case path != "" && f.Path != "":
		if err := m.bindPath(fd, f); err != nil {
			return err
		}
	}
	if s.State != image.SocketConnected {
		return nil
	}
	to, _ := unixPath(s.Remote)
	if s.Type == unix.SOCK_STREAM {
		if to != journalSocket {
			return fmt.Errorf("a socket connected to %s cannot be carried", addrString(s.Remote))
		}
		return m.joinJournal(fd, s)
	}
	if err := sys.ConnectRaw(fd, s.Remote); err != nil {
		// As after its peer has gone: the program sees that at its next send.
		m.log.Warn("a datagram socket's peer is not there", "peer", addrString(s.Remote), "err", err)
	}
	return nil
}

// bindPath binds to a path, which is made with the mode and owner it had.
func (m *maker) bindPath(fd int, f *image.OpenFile) error {
	path := f.Path
	if f.Deleted {
		path = filepath.Join(filepath.Dir(path), fmt.Sprintf(".pageferry-%d-%d", os.Getpid(), fd))
	}
	addr, err := unixAddr(path)
	if err != nil {
		return err
	}
	if !f.Deleted {
		if err := clearStale(path, addr); err != nil {
			return err
		}
	}
	if err := sys.BindRaw(fd, addr); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("bind to %s: its directory does not exist on this host: %w", path, err)
		}
		return bindError(addr, err)
	}
	if f.Deleted {
		return os.Remove(path)
	}
	m.created = append(m.created, path)
	if err := errors.Join(unix.Chown(path, int(f.Socket.UID), int(f.Socket.GID)), unix.Chmod(path, f.Socket.Mode&0o7777)); err != nil {
		return fmt.Errorf("owner and mode of %s: %w", path, err)
	}
	return nil
}

// clearStale removes a socket's path that nobody is bound to any more. Connecting
// with a type that no socket there has tells without disturbing a living one.
func clearStale(path string, addr []byte) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return fmt.Errorf("bind to %s: it exists on this host and is not a socket: %w", path, unix.EADDRINUSE)
	}
	for _, kind := range []int{unix.SOCK_SEQPACKET, unix.SOCK_STREAM} {
		probe, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return err
		}
		err = sys.ConnectRaw(probe, addr)
		unix.Close(probe)
		if errors.Is(err, unix.ECONNREFUSED) {
			return os.Remove(path)
		}
		if err == nil || !errors.Is(err, unix.EPROTOTYPE) {
			break
		}
	}
	return fmt.Errorf("bind to %s: a living socket of this host has it: %w", path, unix.EADDRINUSE)
}

// finish does what needs both ends of a pair: what waits unread, and who has
// stopped to send or receive.
func (m *maker) finish(files []int) error {
	for _, i := range files {
		f := &m.r.Image.Files[i]
		s := f.Socket
		if s == nil || s.Family != unix.AF_UNIX || len(s.Queue) == 0 {
			continue
		}
		from, own := -1, false
		switch {
		case s.State == image.SocketClosed:
			from = m.lost[i]
		case s.Peer >= 0:
			from = m.made[s.Peer]
		case s.Type == unix.SOCK_DGRAM:
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			from, own = fd, true
			name, err := sys.Sockname(m.made[i])
			if err == nil {
				err = sys.ConnectRaw(fd, name)
			}
			if err != nil {
				unix.Close(fd)
				return fmt.Errorf("put back unread datagrams: %w", err)
			}
		default:
			return fmt.Errorf("unread data of a socket in state %d", s.State)
		}
		err := m.putBack(from, m.made[i], s)
		if own {
			unix.Close(from)
		}
		if err != nil {
			return fmt.Errorf("put back unread data of a socket: %w", err)
		}
	}
	for _, i := range files {
		s := m.r.Image.Files[i].Socket
		if s == nil || s.Family != unix.AF_UNIX {
			continue
		}
		if s.State == image.SocketConnected && s.Peer >= 0 {
			shutdown(m.made[i], s.Shutdown)
		}
		if fd, ok := m.lost[i]; ok {
			unix.Close(fd)
			delete(m.lost, i)
		}
	}
	return nil
}

// putBack sends the unread messages of a socket to it. Where it wants the
// sender's credentials, they are those of the process itself.
func (m *maker) putBack(from, to int, s *image.Socket) error {
	creds, err := unix.GetsockoptInt(to, unix.SOL_SOCKET, unix.SO_PASSCRED)
	if err != nil {
		return err
	}
	var control []byte
	if creds != 0 {
		c := &m.r.Process.Creds
		control = unix.UnixCredentials(&unix.Ucred{Pid: int32(m.r.PID), Uid: c.UID[0], Gid: c.GID[0]})
	}
	old, err := unix.GetsockoptInt(from, unix.SOL_SOCKET, unix.SO_SNDBUF)
	if err != nil {
		return err
	}
	total := 0
	for _, b := range s.Queue {
		total += len(b) + 1024 // the kernel counts its own structures
	}
	if 2*total > old {
		if err := unix.SetsockoptInt(from, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 2*total); err != nil {
			return err
		}
		defer unix.SetsockoptInt(from, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, old/2)
	}
	for _, b := range s.Queue {
		for {
			n, err := unix.SendmsgN(from, b, control, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return err
			}
			if b = b[n:]; len(b) == 0 {
				break
			}
		}
	}
	return nil
}
