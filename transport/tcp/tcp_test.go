package tcp

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"math/big"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
	"github.com/pageferry/pageferry/transport/transporttest"
	"github.com/pageferry/pageferry/wire"
)

// authority signs certificates for tests.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key, cert}
}

// config is of a host called name that trusts a and was certified by a.
func (a *authority) config(t testing.TB, name string) Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	cert := []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	return Config{
		Server: &tls.Config{Certificates: cert, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert},
		Client: &tls.Config{Certificates: cert, RootCAs: pool, ServerName: "dest"},
	}
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// link is a listener and a dialer for it.
type link struct {
	t          testing.TB
	ctx        context.Context
	ln         *Listener
	d          *Dialer
	src, dst   Config
	fdsAtStart int
}

func fds(t testing.TB) int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func newLink(t testing.TB, src, dst Config) *link {
	t.Helper()
	l := &link{t: t, ctx: testContext(t), src: src, dst: dst}
	var err error
	if l.ln, err = Listen("127.0.0.1:0", dst); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.ln.Close(); err != nil {
			t.Error(err)
		}
	})
	if l.d, err = NewDialer(src); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *link) addr() string { return l.ln.Addr().String() }

// lane opens a lane with the keys that the two ends hold and returns both ends.
func (l *link) lane(id transport.LaneID, srcKey, dstKey []byte, poolA, poolB *transport.Pool) (a, b transport.Lane, errA, errB error) {
	type result struct {
		l   transport.Lane
		err error
	}
	c := make(chan result, 1)
	go func() {
		in, err := l.ln.Accept(l.ctx)
		if err != nil {
			c <- result{nil, err}
			return
		}
		cfg := l.dst
		cfg.Pool = poolB
		b, err := AcceptLane(l.ctx, in.Conn, id, dstKey, cfg)
		c <- result{b, err}
	}()
	cfg := l.src
	cfg.Pool = poolA
	d, err := NewDialer(cfg)
	if err != nil {
		return nil, nil, err, err
	}
	a, errA = d.DialLane(l.ctx, l.addr(), id, srcKey)
	r := <-c
	return a, r.l, errA, r.err
}

func sockOf(l transport.Lane) *sock {
	switch s := l.(*framed.Lane).Stream().(type) {
	case plainStream:
		return s.sock
	case *tlsStream:
		return s.sock
	}
	panic("no socket")
}

// blackhole makes whatever reaches the socket's end vanish, acknowledgements
// included: what a link does that has died in between.
func blackhole(t testing.TB, l transport.Lane) {
	drop := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: 0}}
	prog := unix.SockFprog{Len: 1, Filter: &drop[0]}
	if err := unix.SetsockoptSockFprog(sockOf(l).fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog); err != nil {
		t.Fatal(err)
	}
}

func maker(src, dst Config) transporttest.Maker {
	src.Timeout, dst.Timeout = time.Second, time.Second
	return func(t *testing.T, id transport.LaneID, poolA, poolB *transport.Pool) *transporttest.Pair {
		l := newLink(t, src, dst)
		key := NewKey()
		a, b, errA, errB := l.lane(id, key, key, poolA, poolB)
		if err := errors.Join(errA, errB); err != nil {
			t.Fatal(err)
		}
		return &transporttest.Pair{
			A: a, B: b,
			Raw: func(p []byte) error { return a.(*framed.Lane).Stream().Write([][]byte{p}) },
			Die: func() {
				s := sockOf(a)
				if err := unix.SetsockoptLinger(s.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
					t.Error(err)
				}
				a.Close()
			},
			Stall:      func() { blackhole(t, a); blackhole(t, b) },
			StallBound: 6 * time.Second,
		}
	}
}

func TestPlain(t *testing.T) {
	transporttest.Run(t, maker(Config{Insecure: true}, Config{Insecure: true}))
}

func TestTLS(t *testing.T) {
	a := newAuthority(t)
	transporttest.Run(t, maker(a.config(t, "source"), a.config(t, "dest")))
}

func TestControl(t *testing.T) {
	a := newAuthority(t)
	for name, c := range map[string]struct {
		src, dst           Config
		wantAtDst, wantAtA string
	}{
		"TLS":      {a.config(t, "source"), a.config(t, "dest"), "source", "dest"},
		"insecure": {Config{Insecure: true}, Config{Insecure: true}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			before := fds(t)
			pool, err := transport.NewPool(2, wire.MaxPayload)
			if err != nil {
				t.Fatal(err)
			}
			dst := c.dst
			dst.Pool = pool
			l := newLink(t, c.src, dst)
			a, peer, err := l.d.DialControl(l.ctx, l.addr())
			if err != nil {
				t.Fatal(err)
			}
			in, err := l.ln.Accept(l.ctx)
			if err != nil {
				t.Fatal(err)
			}
			if peer.Name != c.wantAtA || in.Peer.Name != c.wantAtDst || in.Conn != nil {
				t.Errorf("dialer sees %+v, listener %+v", peer, in.Peer)
			}
			if h, _, err := net.SplitHostPort(in.Peer.Address); err != nil || h != "127.0.0.1" || peer.Address != l.addr() {
				t.Errorf("addresses %q and %q", in.Peer.Address, peer.Address)
			}
			send, err := transport.NewPool(1, wire.MaxPayload)
			if err != nil {
				t.Fatal(err)
			}
			errs := make(chan error, 1)
			go func() {
				errs <- a.Send(transport.Frame{Type: wire.TypeBlob, Meta: make([]byte, wire.MaxMeta), Payload: send.Get(wire.MaxPayload, nil)})
			}()
			f, err := in.Control.Recv()
			if err != nil || len(f.Meta) != wire.MaxMeta || f.Payload.Len() != wire.MaxPayload {
				t.Errorf("blob: %v", err)
			}
			f.Payload.Release()
			if err := <-errs; err != nil {
				t.Error(err)
			}
			a.Close()
			in.Control.Close()
			l.ln.Close()
			for _, p := range []*transport.Pool{pool, send} {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
			}
			if after := fds(t); after > before+1 { // the poller's own may appear
				t.Errorf("%d descriptors before, %d after", before, after)
			}
		})
	}
}

// TestOnWire: what a lane says of its bytes on the network has the headers of
// its packets, and under TLS of its records, in it.
func TestOnWire(t *testing.T) {
	a := newAuthority(t)
	for name, c := range map[string]struct {
		src, dst Config
		extra    int
	}{
		"plain": {Config{Insecure: true}, Config{Insecure: true}, 0},
		"tls":   {a.config(t, "source"), a.config(t, "dest"), 22},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, c.src, c.dst)
			key := NewKey()
			x, y, e1, e2 := l.lane(transport.LaneID{Kind: transport.Bulk}, key, key, nil, nil)
			if err := errors.Join(e1, e2); err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			defer y.Close()
			segment, err := unix.GetsockoptInt(sockOf(x).fd, unix.IPPROTO_TCP, unix.TCP_MAXSEG)
			if err != nil || segment < 30000 {
				t.Fatalf("segments of %d on loopback, %v", segment, err)
			}
			lane := x.(*framed.Lane)
			for n, want := range map[int]int{
				100:         100 + 66 + 2*c.extra,
				40000:       40000 + 66*(1+40000/segment) + 4*c.extra,
				3 * segment: 3*segment + 3*66 + (3*segment/16384+2)*c.extra,
			} {
				// The records' headers may need one packet more.
				if got := lane.OnWire(n); got != want && (c.extra == 0 || got != want+66) {
					t.Errorf("%d bytes are %d on the wire, want %d", n, got, want)
				}
			}
			lane.Close()
			if got := lane.OnWire(1448); got != 1448+66+2*c.extra && got != 1448+66*2+2*c.extra {
				t.Errorf("closed, 1448 bytes are %d", got)
			}
		})
	}
}
