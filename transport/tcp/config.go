package tcp

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Config is what both ends of a connection are set up with. The zero value
// lacks the certificates and is otherwise the documented default.
type Config struct {
	// Server is this host towards those that connect, Client towards those it
	// connects to. Server must demand and verify a certificate of the peer,
	// and Client must verify the peer's; keys.LoadTLS makes both. An end
	// needs only the one that it uses.
	Server, Client *tls.Config

	// Insecure leaves TLS out of everything, control included, and accepts
	// the same from peers. Anyone who reaches the port can then put a process
	// on this host, as root. Only for tests and a lab within one host.
	Insecure bool

	// PlainPages dials page lanes without TLS, and accepts them so. Where the
	// peer does not accept them the dial is refused. Default: TLS.
	PlainPages bool

	// Pool takes the payloads that the lanes receive. Default nil: a frame
	// with a payload is damaged.
	Pool *transport.Pool

	// HandshakeTimeout bounds everything from connect to a usable lane.
	// Default 10 s.
	HandshakeTimeout time.Duration

	// Timeout is after how long of silence a link is taken for lost, in whole
	// seconds where it is waited for by keep-alive probes. It is also how long
	// a peer may leave its window shut. Default 10 s; at least 1 s.
	Timeout time.Duration

	// BulkBuffer is the size of the socket buffers of bulk lanes, each way, in
	// bytes. It bounds what is in flight, and with it how long a page that
	// was asked for again waits behind what is on the way. Default 256 KiB;
	// a link of high bandwidth and long delay wants more. Negative leaves the
	// kernel to size them.
	BulkBuffer int

	// Log is told of connections that failed to become lanes. Nil discards.
	Log *slog.Logger
}

const (
	defaultTimeout    = 10 * time.Second
	defaultBulkBuffer = 1 << 20
)

func (c *Config) ensureDefaults() {
	if c.HandshakeTimeout == 0 {
		c.HandshakeTimeout = defaultTimeout
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.BulkBuffer == 0 {
		c.BulkBuffer = defaultBulkBuffer
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Validate reports what cannot be meant.
func (c *Config) Validate() error {
	if c.HandshakeTimeout < 0 {
		return fmt.Errorf("tcp: handshake timeout of %v", c.HandshakeTimeout)
	}
	if c.Timeout != 0 && c.Timeout < time.Second {
		return fmt.Errorf("tcp: timeout of %v, want at least 1 s", c.Timeout)
	}
	if c.BulkBuffer > 0 && c.BulkBuffer < 16<<10 {
		return fmt.Errorf("tcp: bulk buffer of %d bytes, want at least 16 KiB", c.BulkBuffer)
	}
	if c.Pool != nil && c.Pool.BufferSize() > wire.MaxPayload {
		return fmt.Errorf("tcp: pool of buffers of %d bytes, no payload is above %d", c.Pool.BufferSize(), wire.MaxPayload)
	}
	if c.Server != nil && c.Server.ClientAuth != tls.RequireAndVerifyClientCert {
		return errors.New("tcp: the server's TLS configuration does not demand and verify the peer's certificate")
	}
	if t := c.Client; t != nil && t.InsecureSkipVerify && t.VerifyConnection == nil && t.VerifyPeerCertificate == nil {
		return errors.New("tcp: the client's TLS configuration does not verify the peer's certificate")
	}
	return nil
}

// serverTLS and clientTLS are what the handshakes run with: TLS 1.3 without
// session tickets, so that every connection shows its certificate, and with
// full records from the first byte.
func (c *Config) serverTLS() *tls.Config { return strict(c.Server) }
func (c *Config) clientTLS() *tls.Config { return strict(c.Client) }

func strict(in *tls.Config) *tls.Config {
	t := in.Clone()
	t.MinVersion = tls.VersionTLS13
	t.SessionTicketsDisabled = true
	t.ClientSessionCache = nil
	t.DynamicRecordSizingDisabled = true
	if get := t.GetConfigForClient; get != nil {
		t.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
			c, err := get(h)
			if err != nil || c == nil {
				return nil, err
			}
			if c.ClientAuth != tls.RequireAndVerifyClientCert {
				return nil, errors.New("tcp: the TLS configuration does not demand and verify the peer's certificate")
			}
			c = c.Clone()
			c.MinVersion = tls.VersionTLS13
			c.SessionTicketsDisabled = true
			c.DynamicRecordSizingDisabled = true
			return c, nil
		}
	}
	return t
}
