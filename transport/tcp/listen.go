package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
)

// Connections that have not become lanes yet, at once: all together, and from
// one address. Those above are closed unheard, so a host that opens many and
// says nothing holds up none but itself.
const (
	maxPending     = 512
	maxPendingHost = 128
)

// Incoming is one accepted connection: a control lane with who is at its other
// end, or a page lane that nobody has shaken hands with yet.
type Incoming struct {
	Control transport.Lane // nil for a page lane
	Peer    transport.Peer

	ID   transport.LaneID // of a page lane; claimed, not proven
	Conn *os.File         // for AcceptLane, its preamble unread; the receiver's to close
}

// Refuse answers a page lane with st and closes it.
func (in *Incoming) Refuse(st Status) {
	if in.Conn == nil {
		return
	}
	fd, err := own(in.Conn)
	if err != nil {
		return
	}
	in.Conn = nil
	s, err := newSock(fd)
	if err != nil {
		return
	}
	defer s.Close()
	if _, err := readPreamble(s); err == nil { // it is there: the listener has seen it
		_ = send(plainStream{s}, appendGreeting(nil, st))
	}
}

// Listener accepts connections on one port. It owns a goroutine that accepts
// and one for each connection in its handshake.
type Listener struct {
	cfg    Config
	ln     *net.TCPListener
	ready  chan Incoming
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	pending map[netip.Addr]int
	total   int
	failed  error // why accepting ended
}

// Listen begins to accept on addr, "[HOST]:PORT". cfg is checked; its Server,
// Insecure and PlainPages matter, and Pool is that of control lanes.
func Listen(addr string, cfg Config) (*Listener, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Server == nil && !cfg.Insecure {
		return nil, errors.New("tcp: no certificate for this host; make one with: pageferry keys issue")
	}
	cfg.ensureDefaults()
	lc := net.ListenConfig{KeepAlive: -1}
	ln, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("tcp: %w", err)
	}
	l := &Listener{cfg: cfg, ln: ln.(*net.TCPListener), ready: make(chan Incoming), pending: make(map[netip.Addr]int)}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.wg.Go(l.accept)
	return l, nil
}

// Addr is where the listener listens.
func (l *Listener) Addr() net.Addr { return l.ln.Addr() }

// Accept returns the next connection whose preamble, and handshake if it is a
// control lane, are done. It fails when ctx ends or, with transport.ErrClosed,
// when the listener is closed.
func (l *Listener) Accept(ctx context.Context) (Incoming, error) {
	select {
	case in := <-l.ready:
		return in, nil
	case <-ctx.Done():
		return Incoming{}, context.Cause(ctx)
	case <-l.ctx.Done():
		return Incoming{}, fmt.Errorf("tcp: listener: %w", transport.ErrClosed)
	}
}

// Close ends the listener and all handshakes under way, and waits for them.
// What Accept has returned is not touched. Idempotent.
func (l *Listener) Close() error {
	l.cancel()
	err := l.ln.Close()
	l.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (l *Listener) accept() {
	delay := time.Duration(0)
	for {
		c, err := l.ln.AcceptTCP()
		if err != nil {
			if l.ctx.Err() != nil {
				return
			}
			// Out of descriptors or memory, or a connection that died in the
			// queue: none is a reason to stop listening.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			l.cfg.Log.Warn("accept failed", "error", err, "retry", delay)
			select {
			case <-time.After(delay):
			case <-l.ctx.Done():
				return
			}
			continue
		}
		delay = 0
		host := hostOf(c)
		if !l.admit(host) {
			c.Close()
			continue
		}
		l.wg.Go(func() {
			defer l.release(host)
			if err := l.serve(c); err != nil && l.ctx.Err() == nil {
				l.cfg.Log.Warn("connection refused", "peer", host, "error", err)
			}
		})
	}
}

func hostOf(c *net.TCPConn) netip.Addr {
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		return a.AddrPort().Addr().Unmap()
	}
	return netip.Addr{}
}

func (l *Listener) admit(host netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.total >= maxPending || l.pending[host] >= maxPendingHost {
		return false
	}
	l.total++
	l.pending[host]++
	return true
}

func (l *Listener) release(host netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.total--
	if l.pending[host]--; l.pending[host] == 0 {
		delete(l.pending, host)
	}
}

// serve brings one connection to where Accept can return it.
func (l *Listener) serve(c *net.TCPConn) error {
	ctx, cancel := context.WithTimeout(l.ctx, l.cfg.HandshakeTimeout)
	defer cancel()
	pre, err := peekPreamble(ctx, c)
	if err != nil {
		c.Close()
		return err
	}
	fd, err := own(c)
	if err != nil {
		return err
	}
	st, why := l.cfg.admit(pre)
	if st == StatusOK && pre.id.Kind != transport.Control {
		return l.deliverLane(ctx, fd, pre.id)
	}
	s, err := newSock(fd)
	if err != nil {
		return err
	}
	if st != StatusOK {
		defer s.Close()
		_ = s.ReadFull(make([]byte, PreambleSize)) // unread, it would reset the connection and the answer with it
		return refuse(plainStream{s}, st, why, nil)
	}
	in := Incoming{Peer: transport.Peer{Address: s.other.String()}}
	var stream framed.Stream
	done := bound(ctx, s)
	if stream, in.Peer.Name, err = l.acceptControl(ctx, s, pre); err == nil {
		in.Control = framed.New(pre.id, stream, l.cfg.Pool)
	}
	if err := done(err); err != nil {
		return err
	}
	if !l.deliver(l.ctx, in) {
		in.Control.Close()
	}
	return nil
}

func (l *Listener) acceptControl(ctx context.Context, s *sock, pre preamble) (framed.Stream, string, error) {
	if err := s.tune(transport.Control, &l.cfg); err != nil {
		return nil, "", err
	}
	if err := s.ReadFull(make([]byte, PreambleSize)); err != nil {
		return nil, "", early(err)
	}
	if err := send(plainStream{s}, appendGreeting(nil, StatusOK)); err != nil {
		return nil, "", err
	}
	st, name, err := l.cfg.secure(ctx, s, pre.plain, true)
	if err == nil && !pre.plain {
		err = send(st, appendGreeting(nil, StatusOK))
	}
	return st, name, err
}

// deliverLane takes ownership of fd.
func (l *Listener) deliverLane(ctx context.Context, fd int, id transport.LaneID) error {
	f := os.NewFile(uintptr(fd), id.Kind.String()+" lane")
	peer, err := tcpAddr(unix.Getpeername(fd))
	if err == nil {
		err = unix.SetNonblock(fd, false)
	}
	if err != nil {
		f.Close()
		return err
	}
	if !l.deliver(ctx, Incoming{Peer: transport.Peer{Address: peer.String()}, ID: id, Conn: f}) {
		f.Close()
	}
	return nil
}

func (l *Listener) deliver(ctx context.Context, in Incoming) bool {
	select {
	case l.ready <- in:
		return true
	case <-ctx.Done():
		return false
	}
}

// peekPreamble waits for the preamble and leaves it in the socket. It runs on
// the runtime's poller: those that say nothing cost no thread.
func peekPreamble(ctx context.Context, c *net.TCPConn) (preamble, error) {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := c.SyscallConn()
	if err != nil {
		return preamble{}, err
	}
	b := make([]byte, PreambleSize)
	n, perr := 0, error(nil)
	err = raw.Read(func(fd uintptr) bool {
		n, _, perr = unix.Recvfrom(int(fd), b, unix.MSG_PEEK)
		switch perr {
		case nil:
			// What cannot become a preamble is not waited for. The poller
			// reports new bytes only, so a part does not make this spin.
			return n == len(b) || n == 0 || n > 4 && [4]byte(b[:4]) != magic
		case syscall.EINTR, syscall.EAGAIN:
			return false
		}
		return true
	})
	if err == nil {
		err = perr
	}
	if err != nil {
		return preamble{}, fmt.Errorf("%w: no preamble: %w", transport.ErrPeer, err)
	}
	return parsePreamble(b[:n])
}
