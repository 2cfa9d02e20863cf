package fds

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// resetter makes TCP sockets that their peer has reset.
type resetter struct {
	listener int
	addr     []byte
}

// resetSocket is what becomes of a connection that is ended by --tcp close: a
// socket that was connected and got a reset, so that a read gives ECONNRESET and
// poll a hang-up, as the program has to expect of any connection.
func (m *maker) resetSocket(s *image.Socket) (int, error) {
	r, err := m.resetter(s.Family)
	if err != nil {
		return -1, fmt.Errorf("make a reset connection on the loopback device: %w", err)
	}
	fd, err := unix.Socket(familyOf(r.addr), unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := r.reset(fd); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("make a reset connection on the loopback device: %w", err)
	}
	if !s.Reset {
		// It was dead before, and the program has been told.
		if _, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

func (r *resetter) reset(fd int) error {
	if err := sys.ConnectRaw(fd, r.addr); err != nil {
		return err
	}
	peer, _, err := unix.Accept4(r.listener, unix.SOCK_CLOEXEC)
	if err != nil {
		return err
	}
	err = unix.SetsockoptLinger(peer, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	if err := errors.Join(err, unix.Close(peer)); err != nil {
		return err
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	for {
		n, err := unix.Poll(p, 1000)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return unix.ETIMEDOUT
		case p[0].Revents&unix.POLLERR != 0:
			return nil
		}
	}
}

func (m *maker) resetter(family int) (*resetter, error) {
	if r, ok := m.resets[family]; ok {
		return r, nil
	}
	var sa unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if family == unix.AF_INET6 {
		sa = &unix.SockaddrInet6{Addr: [16]byte{15: 1}}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	r := &resetter{listener: fd}
	if err = unix.Bind(fd, sa); err == nil {
		err = unix.Listen(fd, 16)
	}
	if err == nil {
		r.addr, err = sys.Sockname(fd)
	}
	if err != nil {
		unix.Close(fd)
		if family == unix.AF_INET6 {
			return m.mappedResetter()
		}
		return nil, err
	}
	m.resets[family] = r
	return r, nil
}

// mappedResetter serves AF_INET6 on a host whose loopback device has no ::1.
func (m *maker) mappedResetter() (*resetter, error) {
	r4, err := m.resetter(unix.AF_INET)
	if err != nil {
		return nil, err
	}
	addr := make([]byte, 28) // struct sockaddr_in6
	addr[0] = unix.AF_INET6
	copy(addr[2:4], r4.addr[2:4])
	addr[18], addr[19] = 0xff, 0xff
	copy(addr[20:24], r4.addr[4:8])
	fd, err := unix.Dup(r4.listener)
	if err != nil {
		return nil, err
	}
	r := &resetter{listener: fd, addr: addr}
	m.resets[unix.AF_INET6] = r
	return r, nil
}

// joinJournal connects to this host's journal, as systemd does for a service's
// standard output (systemd.exec(5)): a header of seven lines, then text.
func (m *maker) joinJournal(fd int, s *image.Socket) error {
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", m.r.PID))
	if len(m.r.Process.Threads) > 0 {
		comm = []byte(m.r.Process.Threads[0].Comm)
	}
	header := fmt.Sprintf("%s\n\n6\n1\n0\n0\n0\n", bytes.TrimSpace(comm))
	err := sys.ConnectRaw(fd, s.Remote)
	if err == nil {
		_, err = unix.Write(fd, []byte(header))
	}
	if err != nil {
		return fmt.Errorf("connect to this host's journal: %w", err)
	}
	_ = unix.Shutdown(fd, unix.SHUT_RD)
	return nil
}
