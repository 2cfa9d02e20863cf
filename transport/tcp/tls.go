package tcp

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/pageferry/pageferry/transport"
)

// tlsBuffer is how much of the encrypted stream is read or written at once: a
// record is 16 KiB, and a system call for each would cost as much as its cipher.
const tlsBuffer = 128 << 10

// batcher stands between crypto/tls and the socket. Reads are buffered, and so
// are writes while a batch is being written.
type batcher struct {
	*sock
	in   []byte // the reader's own
	r, w int

	mu      sync.Mutex // crypto/tls also writes from Read: alerts, key updates
	out     []byte
	batched bool
}

func (b *batcher) Read(p []byte) (int, error) {
	if b.r == b.w {
		if len(p) >= len(b.in) {
			return b.sock.Read(p)
		}
		n, err := b.sock.Read(b.in)
		if err != nil {
			return 0, err
		}
		b.r, b.w = 0, n
	}
	n := copy(p, b.in[b.r:b.w])
	b.r += n
	return n, nil
}

func (b *batcher) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.batched {
		return b.sock.Write(p)
	}
	if len(b.out)+len(p) > cap(b.out) {
		if err := b.flush(); err != nil {
			return 0, err
		}
	}
	if len(p) > cap(b.out) {
		return b.sock.Write(p)
	}
	b.out = append(b.out, p...)
	return len(p), nil
}

// flush needs mu.
func (b *batcher) flush() error {
	if len(b.out) == 0 {
		return nil
	}
	_, err := b.sock.Write(b.out)
	b.out = b.out[:0]
	return err
}

func (b *batcher) batch(on bool) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.batched = on
	if on {
		return nil
	}
	return b.flush()
}

// tlsStream is a framed.Stream over TLS. It ends without a close_notify: an end
// that was cut off is told by the messages, which say when they are done.
type tlsStream struct {
	*sock
	b *batcher
	c *tls.Conn
}

func newTLS(s *sock, wrap func(net.Conn) *tls.Conn) *tlsStream {
	b := &batcher{sock: s, in: make([]byte, tlsBuffer), out: make([]byte, 0, tlsBuffer)}
	return &tlsStream{sock: s, b: b, c: wrap(b)}
}

func (t *tlsStream) Read(p []byte) (int, error) {
	n, err := t.c.Read(p)
	if err != nil {
		return n, t.classify(err)
	}
	return n, nil
}

func (t *tlsStream) ReadFull(p []byte) error {
	_, err := io.ReadFull(t, p)
	return err
}

func (t *tlsStream) Write(bufs [][]byte) error {
	if err := t.b.batch(true); err != nil {
		return err
	}
	var err error
	for _, b := range bufs {
		if _, err = t.c.Write(b); err != nil {
			break
		}
	}
	if e := t.b.batch(false); err == nil {
		err = e
	}
	if err != nil {
		return t.classify(err)
	}
	return nil
}

// classify tells a connection that broke from a stream that was tampered with.
func (t *tlsStream) classify(err error) error {
	var op *net.OpError
	switch {
	case errors.Is(err, transport.ErrClosed), errors.Is(err, transport.ErrPeer):
		return err
	case errors.As(err, &op) && op.Op == "remote error":
		return fmt.Errorf("%w: %w", transport.ErrPeer, err)
	case err == io.EOF: // a close_notify, which no end of ours sends
		return err
	case t.sock.lost() != nil:
		if lost := t.sock.lost(); lost != io.EOF {
			return lost
		}
		return io.EOF
	}
	return fmt.Errorf("%w: %w", transport.ErrDamaged, err)
}

// handshake runs TLS and returns the peer's name. server says whether this end
// verified the chain by crypto/tls itself.
func (t *tlsStream) handshake(ctx context.Context, server bool) (string, error) {
	err := t.c.HandshakeContext(ctx)
	if err != nil {
		return "", t.authError(err)
	}
	cs := t.c.ConnectionState()
	if cs.Version != tls.VersionTLS13 || len(cs.PeerCertificates) == 0 || server && len(cs.VerifiedChains) == 0 {
		return "", fmt.Errorf("%w: TLS without a verified certificate", transport.ErrAuth)
	}
	leaf := cs.PeerCertificates[0]
	if len(leaf.DNSNames) > 0 {
		return leaf.DNSNames[0], nil
	}
	return leaf.Subject.CommonName, nil
}

// authError is what a failed handshake means: a broken connection, or a peer
// that could not prove who it is, to us or we to it.
func (t *tlsStream) authError(err error) error {
	var op *net.OpError
	remote := errors.As(err, &op) && op.Op == "remote error"
	if lost := t.sock.lost(); lost != nil && !remote {
		if lost == io.EOF {
			return fmt.Errorf("%w: closed by the peer during the TLS handshake", transport.ErrPeer)
		}
		return fmt.Errorf("TLS handshake: %w", lost)
	}
	if remote {
		return fmt.Errorf("%w: the peer refused this host's certificate: %w", transport.ErrAuth, err)
	}
	return fmt.Errorf("%w: %w", transport.ErrAuth, err)
}
