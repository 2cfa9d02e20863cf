package tcp

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
	"github.com/pageferry/pageferry/wire"
)

// KeySize is the length in bytes of the one-time key of an epoch's lanes.
const KeySize = 32

// NewKey returns a random key.
func NewKey() []byte {
	k := make([]byte, KeySize)
	rand.Read(k)
	return k
}

const nonceSize = 32

// stream is what a handshake runs on.
type stream interface {
	framed.Stream
	io.Reader
}

func send(s framed.Stream, b []byte) error { return s.Write([][]byte{b}) }

func readGreeting(s framed.Stream) error {
	var b [greetingSize]byte
	if err := s.ReadFull(b[:]); err != nil {
		return early(err)
	}
	return parseGreeting(b[:])
}

// early is the error of a handshake that the peer ended.
func early(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: closed by the peer during the handshake", transport.ErrPeer)
	}
	return err
}

// refuse answers with st and returns the error for this end.
func refuse(s framed.Stream, st Status, why string, err error) error {
	_ = send(s, appendGreeting(nil, st)) // best effort: the peer sees the end anyway
	if err == nil {
		return errors.New("tcp: refused a connection: " + why)
	}
	return fmt.Errorf("tcp: refused a connection: %s: %w", why, err)
}

// secure runs TLS over s as cfg demands and returns the stream to go on with.
// A plain connection keeps s and has no name.
func (c *Config) secure(ctx context.Context, s *sock, plain, server bool) (framed.Stream, string, error) {
	if plain {
		return plainStream{s}, "", nil
	}
	t := newTLS(s, func(b net.Conn) *tls.Conn {
		if server {
			return tls.Server(b, c.serverTLS())
		}
		return tls.Client(b, c.clientTLS())
	})
	name, err := t.handshake(ctx, server)
	return t, name, err
}

// proof is the HMAC by which one side shows that it knows key. It covers the
// preamble, so that it is good for this lane alone, both nonces, so that it is
// good once, and the TLS session where there is one, so that nobody can stand
// in the middle and pass it on.
func proof(key []byte, role string, pre preamble, a, d, session []byte) []byte {
	m := hmac.New(sha256.New, key)
	io.WriteString(m, "pageferry lane 1 "+role+"\x00")
	m.Write(appendPreamble(nil, pre))
	m.Write(a)
	m.Write(d)
	m.Write(session)
	return m.Sum(nil)
}

// session identifies the TLS session of s, or is zeros.
func session(s framed.Stream) ([]byte, error) {
	t, ok := s.(*tlsStream)
	if !ok {
		return make([]byte, 32), nil
	}
	cs := t.c.ConnectionState()
	b, err := cs.ExportKeyingMaterial("EXPORTER-pageferry-lane", nil, 32)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", transport.ErrAuth, err)
	}
	return b, nil
}

// proveAccept is the acceptor's side of the key proof, proveDial the dialer's:
//
//	acceptor -> dialer    nonce A
//	dialer -> acceptor    nonce D, HMAC by the dialer
//	acceptor -> dialer    greeting, HMAC by the acceptor
func proveAccept(s framed.Stream, pre preamble, key []byte) error {
	sess, err := session(s)
	if err != nil {
		return err
	}
	a := make([]byte, nonceSize)
	rand.Read(a)
	if err := send(s, a); err != nil {
		return err
	}
	answer := make([]byte, nonceSize+sha256.Size)
	if err := s.ReadFull(answer); err != nil {
		return early(err)
	}
	d := answer[:nonceSize]
	if !hmac.Equal(answer[nonceSize:], proof(key, "dialer", pre, a, d, sess)) {
		return refuse(s, StatusKey, "the lane's one-time key was not proven", transport.ErrAuth)
	}
	return send(s, append(appendGreeting(nil, StatusOK), proof(key, "acceptor", pre, a, d, sess)...))
}

func proveDial(s framed.Stream, pre preamble, key []byte) error {
	sess, err := session(s)
	if err != nil {
		return err
	}
	a, d := make([]byte, nonceSize), make([]byte, nonceSize)
	if err := s.ReadFull(a); err != nil {
		return early(err)
	}
	rand.Read(d)
	if err := send(s, append(d[:nonceSize:nonceSize], proof(key, "dialer", pre, a, d, sess)...)); err != nil {
		return err
	}
	if err := readGreeting(s); err != nil {
		return err
	}
	mac := make([]byte, sha256.Size)
	if err := s.ReadFull(mac); err != nil {
		return early(err)
	}
	if !hmac.Equal(mac, proof(key, "acceptor", pre, a, d, sess)) {
		return fmt.Errorf("%w: the peer does not know the lane's one-time key", transport.ErrAuth)
	}
	return nil
}

// admit decides on a preamble before anything else is done.
func (c *Config) admit(pre preamble) (Status, string) {
	switch {
	case pre.version != wire.Version:
		return StatusVersion, fmt.Sprintf("it speaks version %d of the protocol, this end %d", pre.version, wire.Version)
	case pre.plain && !c.Insecure && (pre.id.Kind == transport.Control || !c.PlainPages):
		return StatusNoPlain, "it came without TLS, which is demanded here"
	case !pre.plain && c.Server == nil:
		return StatusNoTLS, "there is no certificate to offer TLS with"
	}
	return StatusOK, ""
}

// bound closes s when ctx ends before the function that it returns is called,
// which then reports why. The stream is the caller's again after.
func bound(ctx context.Context, s *sock) func(error) error {
	stop := context.AfterFunc(ctx, func() { s.Close() })
	return func(err error) error {
		if !stop() {
			s.Close()
			if err == nil || errors.Is(err, transport.ErrClosed) || errors.Is(err, transport.ErrPeer) || errors.Is(err, context.Cause(ctx)) {
				return fmt.Errorf("%w: handshake: %w", transport.ErrPeer, context.Cause(ctx))
			}
			return err
		}
		if err != nil {
			s.Close()
		}
		return err
	}
}
