package fds

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"

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
