package fds

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// makeSocket makes a socket. Pairs exist already: the target has made them.
func (m *maker) makeSocket(i int, f *image.OpenFile) (int, error) {
	s := f.Socket
	k := sockKind{s.Family, s.Type, s.Protocol}
	if fd, ok := m.made[i]; ok { // an end of a pair
		return fd, m.options(fd, k, s)
	}
	switch s.Family {
	case unix.AF_INET, unix.AF_INET6:
		if s.State == image.SocketClosed {
			if s.Type != unix.SOCK_STREAM {
				return -1, fmt.Errorf("a dead socket of type %d", s.Type)
			}
			return m.resetSocket(s)
		}
	case unix.AF_UNIX, unix.AF_NETLINK:
	default:
		return -1, fmt.Errorf("a socket of family %d cannot be carried", s.Family)
	}
	if s.Type != unix.SOCK_STREAM && s.Type != unix.SOCK_DGRAM && s.Type != unix.SOCK_SEQPACKET &&
		!(s.Family == unix.AF_NETLINK && s.Type == unix.SOCK_RAW) {
		return -1, fmt.Errorf("a socket of type %d cannot be carried", s.Type)
	}
	fd, err := unix.Socket(s.Family, s.Type|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, s.Protocol)
	if err != nil {
		return -1, fmt.Errorf("make socket: %w", err)
	}
	if f.UID != 0 || f.GID != 0 {
		// What the kernel compares for SO_REUSEPORT and counts by user.
		err = unix.Fchown(fd, int(f.UID), int(f.GID))
	}
	if err == nil {
		err = m.options(fd, k, s)
	}
	if err == nil {
		err = m.nameSocket(fd, f)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (m *maker) options(fd int, k sockKind, s *image.Socket) error {
	opts := s.Options
	if s.Family == unix.AF_NETLINK {
		opts = nil
		for _, o := range s.Options {
			if !isMembership(o) {
				opts = append(opts, o)
			}
		}
	}
	lacking, err := setOptions(fd, k, opts)
	for _, l := range lacking {
		m.log.Warn("this host does not take a socket's option", "option", l)
	}
	return err
}

// isMembership tells the list of a netlink socket's groups from true options.
func isMembership(o image.SockOpt) bool {
	return o.Level == unix.SOL_NETLINK && o.Name == unix.NETLINK_LIST_MEMBERSHIPS
}

// nameNetlink binds a netlink socket and then joins its groups: the binding sets
// the first 32 of them anew.
func (m *maker) nameNetlink(fd int, s *image.Socket) error {
	if s.State != image.SocketBound || len(s.Local) < 12 {
		return nil
	}
	addr := bytes.Clone(s.Local[:12])
	clear(addr[8:])
	err := sys.BindRaw(fd, addr)
	if errors.Is(err, unix.EADDRINUSE) {
		m.log.Warn("a netlink socket's number is taken here, it gets another one")
		clear(addr[4:8])
		err = sys.BindRaw(fd, addr)
	}
	if err != nil {
		return fmt.Errorf("bind netlink socket: %w", err)
	}
	for _, o := range s.Options {
		if isMembership(o) {
			return joinGroups(fd, o.Value)
		}
	}
	return nil
}

// joinGroups joins the netlink groups of a bit mask of 32-bit words.
func joinGroups(fd int, mask []byte) error {
	for w := 0; w+4 <= len(mask); w += 4 {
		for v := binary.NativeEndian.Uint32(mask[w:]); v != 0; v &= v - 1 {
			g := w*8 + bits.TrailingZeros32(v) + 1
			if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
				return fmt.Errorf("join netlink group %d: %w", g, err)
			}
		}
	}
	return nil
}

// nameSocket binds, listens and connects.
func (m *maker) nameSocket(fd int, f *image.OpenFile) error {
	s := f.Socket
	switch s.Family {
	case unix.AF_UNIX:
		return m.nameUnix(fd, f)
	case unix.AF_NETLINK:
		return m.nameNetlink(fd, s)
	}
	if s.State == image.SocketFresh {
		return nil
	}
	local, err := translate(s.Local, m.r.Addresses)
	if err != nil {
		return err
	}
	if s.Type == unix.SOCK_STREAM {
		// Connections of the former process may still linger on this host: they
		// must not stand in the way, whatever the program asked for.
		undo, err := reuse(fd)
		if err != nil {
			return err
		}
		defer undo()
	}
	if err := sys.BindRaw(fd, local); err != nil {
		err = bindError(local, err)
		if s.State != image.SocketConnected || !errors.Is(err, unix.EADDRNOTAVAIL) {
			return err
		}
		// A connected UDP socket has the address of the route it took.
		any, aerr := wildcard(local)
		if aerr != nil || sys.BindRaw(fd, any) != nil {
			return err
		}
	}
	switch s.State {
	case image.SocketListening:
		if err := unix.Listen(fd, s.Backlog); err != nil {
			return fmt.Errorf("listen on %s: %w", addrString(local), err)
		}
	case image.SocketConnected:
		remote, err := translate(s.Remote, m.r.Addresses)
		if err != nil {
			return err
		}
		if err := sys.ConnectRaw(fd, remote); err != nil {
			return fmt.Errorf("connect UDP socket to %s: %w", addrString(remote), err)
		}
		shutdown(fd, s.Shutdown)
	}
	return nil
}

// reuse sets SO_REUSEADDR until undo is called.
func reuse(fd int) (undo func(), err error) {
	old, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR)
	if err == nil {
		err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}
	if err != nil {
		return nil, fmt.Errorf("SO_REUSEADDR: %w", err)
	}
	return func() { _ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, old) }, nil
}

func bindError(addr []byte, err error) error {
	at := addrString(addr)
	switch {
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("bind to %s: this host does not have that address (give --address old=new): %w", at, err)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("bind to %s: another socket of this host has it: %w", at, err)
	}
	return fmt.Errorf("bind to %s: %w", at, err)
}

// wildcard is the address with the same port on all addresses.
func wildcard(raw []byte) ([]byte, error) {
	out := append([]byte(nil), raw...)
	switch {
	case familyOf(raw) == unix.AF_INET && len(raw) >= 8:
		clear(out[4:8])
	case familyOf(raw) == unix.AF_INET6 && len(raw) >= 24:
		clear(out[8:24])
	default:
		return nil, unix.EAFNOSUPPORT
	}
	return out, nil
}

func shutdown(fd, how int) {
	switch how & 3 {
	case 1:
		_ = unix.Shutdown(fd, unix.SHUT_RD)
	case 2:
		_ = unix.Shutdown(fd, unix.SHUT_WR)
	case 3:
		_ = unix.Shutdown(fd, unix.SHUT_RDWR)
	}
}

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
