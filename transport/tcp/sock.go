package tcp

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/transport"
)

// sock is a connected TCP socket in blocking mode. One goroutine reads, another
// writes, any closes. It is a framed.Stream for plain lanes and a net.Conn for
// crypto/tls to stand on.
type sock struct {
	fd           int
	sent, rcvd   atomic.Uint64
	ioErr        atomic.Pointer[error] // the first error of the connection itself
	local, other net.Addr

	// soon: data is waited for at first without telling the scheduler. ready is
	// the reader's own.
	soon  bool
	ready [1]unix.PollFd

	mu     sync.Mutex
	users  int // calls that use fd; the last one closes it after Close
	closed bool
}

// newSock takes ownership of fd, also when it fails.
func newSock(fd int) (*sock, error) {
	s := &sock{fd: fd}
	if err := unix.SetNonblock(fd, false); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("tcp: blocking mode: %w", err)
	}
	var err error
	if s.local, err = tcpAddr(unix.Getsockname(fd)); err == nil {
		s.other, err = tcpAddr(unix.Getpeername(fd))
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%w: %w", transport.ErrPeer, err)
	}
	return s, nil
}

func tcpAddr(sa unix.Sockaddr, err error) (net.Addr, error) {
	if err != nil {
		return nil, fmt.Errorf("tcp: address of a socket: %w", err)
	}
	switch a := sa.(type) {
	case *unix.SockaddrInet4:
		return &net.TCPAddr{IP: a.Addr[:], Port: a.Port}, nil
	case *unix.SockaddrInet6:
		t := &net.TCPAddr{IP: a.Addr[:], Port: a.Port}
		if i, err := net.InterfaceByIndex(int(a.ZoneId)); a.ZoneId != 0 && err == nil {
			t.Zone = i.Name
		}
		return t, nil
	}
	return nil, errors.New("tcp: not an internet socket")
}

// own copies the descriptor behind c and closes c, which frees it from the
// runtime's poller.
func own(c interface {
	io.Closer
	syscall.Conn
}) (int, error) {
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("tcp: %w", err)
	}
	fd := -1
	if e := raw.Control(func(p uintptr) { fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 3) }); e != nil {
		err = e
	}
	if err != nil {
		return -1, fmt.Errorf("tcp: copy descriptor: %w", err)
	}
	return fd, nil
}

// tune sets what a lane of that kind needs.
func (s *sock) tune(kind transport.Kind, cfg *Config) error {
	probe := max(1, int(cfg.Timeout/time.Second/5))
	for _, o := range []struct{ level, opt, v int }{
		{unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
		{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(cfg.Timeout / time.Millisecond)},
		{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
		{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, probe},
		{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, probe},
		{unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 5},
	} {
		if err := unix.SetsockoptInt(s.fd, o.level, o.opt, o.v); err != nil {
			return fmt.Errorf("tcp: socket option %d of level %d: %w", o.opt, o.level, err)
		}
	}
	if kind == transport.Urgent {
		s.soon = true
		tv := unix.NsecToTimeval(int64(soonLimit))
		if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
			return fmt.Errorf("tcp: receive timeout: %w", err)
		}
	}
	if kind != transport.Bulk {
		// Ahead of the bulk lanes in the queue of this host's interface. Most
		// queues ignore it, and the lane works without.
		_ = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_PRIORITY, 6)
		return nil
	}
	if cfg.BulkBuffer < 0 {
		return nil
	}
	for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
		// The kernel cuts it to net.core.[rw]mem_max without an error.
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, opt, cfg.BulkBuffer); err != nil {
			return fmt.Errorf("tcp: socket buffer of %d bytes: %w", cfg.BulkBuffer, err)
		}
	}
	return nil
}

// enter holds the descriptor open until leave.
func (s *sock) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.users++
	return true
}

func (s *sock) leave() {
	s.mu.Lock()
	s.users--
	last := s.closed && s.users == 0
	s.mu.Unlock()
	if last {
		unix.Close(s.fd)
	}
}

// Close ends both directions and wakes whoever waits. What was written before
// is still delivered, unless something received was never read: then TCP resets
// the connection. Idempotent.
func (s *sock) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	last := s.users == 0
	if !last {
		// Under mu, or the last user might close the descriptor before. An
		// error means that the connection has ended already.
		_ = unix.Shutdown(s.fd, unix.SHUT_RDWR)
	}
	s.mu.Unlock()
	if last {
		unix.Close(s.fd)
	}
	return nil
}

// fail maps an error of the connection and keeps the first.
func (s *sock) fail(call string, err error) error {
	if errors.Is(err, unix.ETIMEDOUT) {
		err = fmt.Errorf("%w: nothing heard from %s: %w", transport.ErrPeer, s.other, os.NewSyscallError(call, err))
	} else if err != io.EOF {
		err = fmt.Errorf("%w: %w", transport.ErrPeer, os.NewSyscallError(call, err))
	}
	s.ioErr.CompareAndSwap(nil, &err)
	return err
}

func (s *sock) Read(p []byte) (int, error) {
	if !s.enter() {
		return 0, transport.ErrClosed
	}
	defer s.leave()
	for {
		n, err := s.read(p)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 0, s.fail("read", err)
		case n == 0 && len(p) > 0:
			return 0, s.fail("read", io.EOF)
		default:
			s.rcvd.Add(uint64(n))
			return n, nil
		}
	}
}

// soonLimit is how long an urgent lane waits without telling the scheduler.
const soonLimit = 2 * time.Millisecond

func (s *sock) read(p []byte) (int, error) {
	if !s.soon {
		return unix.Read(s.fd, p)
	}
	n, err := sys.ReadNow(s.fd, p)
	if err == unix.EAGAIN { // the time that tune has set is up
		err = s.await()
	}
	return n, err
}

// await waits for data, for as long as it takes, and returns EINTR when a read has
// something to say.
func (s *sock) await() error {
	s.ready[0] = unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN}
	if _, err := unix.Poll(s.ready[:], -1); err != nil {
		return err
	}
	return unix.EINTR
}

func (s *sock) write(bufs [][]byte) (int, error) {
	n, err := sys.WriteNow(s.fd, bufs)
	if err == unix.EAGAIN {
		n, err = unix.Writev(s.fd, bufs)
	}
	return n, err
}

// ReadFull lets the kernel gather all of p before it wakes the thread.
func (s *sock) ReadFull(p []byte) error {
	if !s.enter() {
		return transport.ErrClosed
	}
	defer s.leave()
	for len(p) > 0 {
		n, _, err := unix.Recvfrom(s.fd, p, unix.MSG_WAITALL)
		if err == unix.EAGAIN && s.soon {
			err = s.await()
		}
		switch {
		case err == unix.EINTR:
		case err != nil:
			return s.fail("recv", err)
		case n == 0:
			return s.fail("recv", io.EOF)
		default:
			s.rcvd.Add(uint64(n))
			p = p[n:]
		}
	}
	return nil
}

// maxGather is below the kernel's IOV_MAX of 1024.
const maxGather = 512

// WriteBatch sends bufs in order, whose slices it uses up.
func (s *sock) WriteBatch(bufs [][]byte) error {
	if !s.enter() {
		return transport.ErrClosed
	}
	defer s.leave()
	for len(bufs) > 0 {
		n, err := s.write(bufs[:min(len(bufs), maxGather)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return s.fail("writev", err)
		}
		s.sent.Add(uint64(n))
		for n > 0 && n >= len(bufs[0]) {
			n -= len(bufs[0])
			bufs = bufs[1:]
		}
		if n > 0 {
			bufs[0] = bufs[0][n:]
		}
		for len(bufs) > 0 && len(bufs[0]) == 0 {
			bufs = bufs[1:]
		}
	}
	return nil
}

// Write is WriteBatch for crypto/tls and the handshake.
func (s *sock) Write(p []byte) (int, error) {
	one := [1][]byte{p}
	if err := s.WriteBatch(one[:]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Counters are the bytes that crossed the wire, handshake included.
func (s *sock) Counters() (sent, received uint64) { return s.sent.Load(), s.rcvd.Load() }

// lost is the error that ended the connection itself, if one did.
func (s *sock) lost() error {
	if p := s.ioErr.Load(); p != nil {
		return *p
	}
	return nil
}

// LocalAddr and what follows make a net.Conn. There are no deadlines: contexts
// end handshakes by Close.
func (s *sock) LocalAddr() net.Addr              { return s.local }
func (s *sock) RemoteAddr() net.Addr             { return s.other }
func (s *sock) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (s *sock) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (s *sock) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// plainStream is a sock as a framed.Stream.
type plainStream struct{ *sock }

func (s plainStream) Write(bufs [][]byte) error { return s.WriteBatch(bufs) }
