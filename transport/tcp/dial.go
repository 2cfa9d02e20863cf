package tcp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
	"github.com/pageferry/pageferry/wire"
)

// Dialer opens connections to other hosts' Listeners. Safe for concurrent use.
type Dialer struct{ cfg Config }

// NewDialer checks cfg, of which Client, Insecure and PlainPages matter.
func NewDialer(cfg Config) (*Dialer, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Client == nil && !cfg.Insecure {
		return nil, errors.New("tcp: no certificate for this host; make one with: pageferry keys issue")
	}
	cfg.ensureDefaults()
	return &Dialer{cfg}, nil
}

// DialControl opens a control lane to addr, which is HOST:PORT, and returns it
// with who answered. Errors wrap transport.ErrAuth where one of the two could
// not prove who it is, a *RefusedError where the peer said why not, and
// transport.ErrPeer where the network failed.
func (d *Dialer) DialControl(ctx context.Context, addr string) (transport.Lane, transport.Peer, error) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.HandshakeTimeout)
	defer cancel()
	pre := preamble{version: wire.Version, plain: d.cfg.Insecure, id: transport.LaneID{Kind: transport.Control}}
	s, err := d.connect(ctx, addr, pre)
	if err != nil {
		return nil, transport.Peer{}, fmt.Errorf("dial control to %s: %w", addr, err)
	}
	peer := transport.Peer{Address: s.other.String()}
	var st framed.Stream
	done := bound(ctx, s)
	err = readGreeting(plainStream{s})
	if err == nil {
		st, peer.Name, err = d.cfg.secure(ctx, s, pre.plain, false)
	}
	if err == nil && !pre.plain {
		// TLS 1.3 is done for a client before the server has seen its
		// certificate: wait for the word that it passed.
		err = refusedCert(readGreeting(st))
	}
	if err = done(err); err != nil {
		return nil, transport.Peer{}, fmt.Errorf("dial control to %s: %w", addr, err)
	}
	return framed.New(pre.id, st, d.cfg.Pool), peer, nil
}

// refusedCert: an alert in place of the greeting is the answer to our certificate.
func refusedCert(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		return fmt.Errorf("%w: the peer refused this host's certificate: %w", transport.ErrAuth, op)
	}
	return err
}

// DialLane opens a page lane to addr and proves key, which came over control.
func (d *Dialer) DialLane(ctx context.Context, addr string, id transport.LaneID, key []byte) (transport.Lane, error) {
	if err := checkLane(id, key); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.HandshakeTimeout)
	defer cancel()
	pre := preamble{version: wire.Version, plain: d.cfg.Insecure || d.cfg.PlainPages, id: id}
	s, err := d.connect(ctx, addr, pre)
	if err != nil {
		return nil, fmt.Errorf("dial %s lane %d to %s: %w", id.Kind, id.Index, addr, err)
	}
	var st framed.Stream
	done := bound(ctx, s)
	err = readGreeting(plainStream{s})
	if err == nil {
		st, _, err = d.cfg.secure(ctx, s, pre.plain, false)
	}
	if err == nil {
		err = refusedCert(proveDial(st, pre, key))
	}
	if err = done(err); err != nil {
		return nil, fmt.Errorf("dial %s lane %d to %s: %w", id.Kind, id.Index, addr, err)
	}
	return framed.New(id, st, d.cfg.Pool), nil
}

func checkLane(id transport.LaneID, key []byte) error {
	if id.Kind != transport.Urgent && id.Kind != transport.Bulk {
		return fmt.Errorf("tcp: a page lane cannot be of kind %s", id.Kind)
	}
	if len(key) != KeySize {
		return fmt.Errorf("tcp: one-time key of %d bytes, want %d", len(key), KeySize)
	}
	return nil
}

func (d *Dialer) connect(ctx context.Context, addr string, pre preamble) (*sock, error) {
	nd := net.Dialer{KeepAlive: -1}
	c, err := nd.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", transport.ErrPeer, err)
	}
	fd, err := own(c.(*net.TCPConn))
	if err != nil {
		return nil, err
	}
	s, err := newSock(fd)
	if err != nil {
		return nil, err
	}
	if err := s.tune(pre.id.Kind, &d.cfg); err != nil {
		s.Close()
		return nil, err
	}
	if _, err := s.Write(appendPreamble(nil, pre)); err != nil { // an empty buffer takes it without waiting
		s.Close()
		return nil, err
	}
	return s, nil
}

// AcceptLane makes a lane of f, a connection that a Listener handed out for id,
// perhaps in another process. It takes ownership of f, also when it fails.
// Whether the lane is plain is the dialer's choice within what cfg allows.
func AcceptLane(ctx context.Context, f *os.File, id transport.LaneID, key []byte, cfg Config) (transport.Lane, error) {
	fd, err := own(f)
	if err != nil {
		return nil, err
	}
	s, err := newSock(fd)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(cfg.Validate(), checkLane(id, key)); err != nil {
		s.Close()
		return nil, err
	}
	cfg.ensureDefaults()
	ctx, cancel := context.WithTimeout(ctx, cfg.HandshakeTimeout)
	defer cancel()
	var st framed.Stream
	done := bound(ctx, s)
	err = s.tune(id.Kind, &cfg)
	if err == nil {
		st, err = acceptLane(ctx, s, id, key, &cfg)
	}
	if err = done(err); err != nil {
		return nil, fmt.Errorf("accept %s lane %d from %s: %w", id.Kind, id.Index, s.other, err)
	}
	return framed.New(id, st, cfg.Pool), nil
}

func acceptLane(ctx context.Context, s *sock, id transport.LaneID, key []byte, cfg *Config) (framed.Stream, error) {
	pre, err := readPreamble(s)
	if err != nil {
		return nil, err
	}
	if st, why := cfg.admit(pre); st != StatusOK {
		return nil, refuse(plainStream{s}, st, why, transport.ErrAuth)
	}
	if pre.id != id {
		return nil, fmt.Errorf("%w: the connection is for %+v, not %+v", transport.ErrAuth, pre.id, id)
	}
	if err := send(plainStream{s}, appendGreeting(nil, StatusOK)); err != nil {
		return nil, err
	}
	st, _, err := cfg.secure(ctx, s, pre.plain, true)
	if err != nil {
		return nil, err
	}
	return st, proveAccept(st, pre, key)
}

func readPreamble(s *sock) (preamble, error) {
	b := make([]byte, PreambleSize)
	if err := s.ReadFull(b); err != nil {
		return preamble{}, early(err)
	}
	return parsePreamble(b)
}
