package tcp

import (
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// from opens a raw connection to addr with the source address ip.
func from(t *testing.T, ip, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}, Timeout: 10 * time.Second}
	c, err := d.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// One bad host does not keep others from getting through, whatever it does.
func TestBadClients(t *testing.T) {
	a := newAuthority(t)
	dst := a.config(t, "dest")
	dst.HandshakeTimeout = 20 * time.Second // nothing here may depend on it
	l := newLink(t, a.config(t, "source"), dst)
	pre := appendPreamble(nil, preamble{version: wire.Version, id: transport.LaneID{Kind: transport.Control}})
	for i := range 200 {
		c := from(t, "127.0.0.66", l.addr())
		switch i % 6 {
		case 0: // says nothing
		case 1:
			c.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
		case 2:
			c.Write(pre[:30]) // and no more
		case 3:
			c.Write(append(pre, 22, 3, 1)) // begins TLS and no more
		case 4:
			c.Write(append(pre, make([]byte, 4000)...))
		case 5:
			reset(c)
		}
	}
	before := runtime.NumGoroutine()
	errs := make(chan error, 1)
	go func() {
		in, err := l.ln.Accept(l.ctx)
		if err == nil {
			in.Control.Close()
		}
		errs <- err
	}()
	ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
	defer cancel()
	ctl, _, err := l.d.DialControl(ctx, l.addr())
	if err != nil {
		t.Fatalf("with %d goroutines at work on bad clients: %v", before, err)
	}
	ctl.Close()
	if err := <-errs; err != nil {
		t.Error(err)
	}
	l.ln.mu.Lock()
	n := l.ln.total
	l.ln.mu.Unlock()
	if n > maxPendingHost+1 {
		t.Errorf("%d connections of one host are waited for", n)
	}
	start := time.Now()
	if err := l.ln.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("closing took %v with bad clients connected", d)
	}
}

func reset(c net.Conn) {
	c.(*net.TCPConn).SetLinger(0)
	c.Close()
}

// The silent are dropped when their time is over.
func TestPreambleDeadline(t *testing.T) {
	a := newAuthority(t)
	dst := a.config(t, "dest")
	dst.HandshakeTimeout = 100 * time.Millisecond
	l := newLink(t, a.config(t, "source"), dst)
	pre := appendPreamble(nil, preamble{version: wire.Version, id: transport.LaneID{Kind: transport.Control}})
	for name, say := range map[string][]byte{"nothing": nil, "half a preamble": pre[:20], "no TLS": pre} {
		c := from(t, "127.0.0.1", l.addr())
		c.SetDeadline(time.Now().Add(10 * time.Second))
		c.Write(say)
		if _, err := io.ReadAll(c); err != nil && !isReset(err) {
			t.Errorf("who says %s is not dropped: %v", name, err)
		}
	}
}

func isReset(err error) bool {
	var ne net.Error
	return !errors.As(err, &ne) || !ne.Timeout()
}

// A server that never answers does not hold a dialer for longer than it allows.
func TestDialDeadline(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0") // completes connections, accepts none
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d, err := NewDialer(Config{Insecure: true, HandshakeTimeout: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = d.DialControl(testContext(t), ln.Addr().String())
	wantErr(t, "control", err, transport.ErrPeer)
	wantErr(t, "control", err, context.DeadlineExceeded)
	ctx, cancel := context.WithCancel(testContext(t))
	time.AfterFunc(20*time.Millisecond, cancel)
	d.cfg.HandshakeTimeout = time.Minute
	_, err = d.DialLane(ctx, ln.Addr().String(), urgentID, NewKey())
	wantErr(t, "lane", err, context.Canceled)
	ln.Close()
	_, _, err = d.DialControl(testContext(t), ln.Addr().String())
	wantErr(t, "nobody there", err, transport.ErrPeer)
}

// A peer whose window stays shut is lost after Timeout: a sender is not held
// for ever by a program that stands still.
func TestShutWindow(t *testing.T) {
	cfg := Config{Insecure: true, Timeout: time.Second}
	l := newLink(t, cfg, cfg)
	key := NewKey()
	id := urgentID
	id.Kind = transport.Bulk
	a, b, errA, errB := l.lane(id, key, key, nil, nil)
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	errs := make(chan error, 1)
	go func() {
		for {
			if err := a.Send(transport.Frame{Type: wire.TypePing, Meta: make([]byte, wire.MaxMeta)}); err != nil {
				errs <- err
				return
			}
		}
	}()
	select {
	case err := <-errs:
		wantErr(t, "send", err, transport.ErrPeer)
	case <-time.After(15 * time.Second):
		t.Error("the sender waits for a window that stays shut")
	}
}

func TestConfig(t *testing.T) {
	a := newAuthority(t)
	for name, c := range map[string]Config{
		"nothing":        {},
		"no demand":      func() Config { c := a.config(t, "x"); c.Server.ClientAuth = 0; return c }(),
		"no check":       func() Config { c := a.config(t, "x"); c.Client.InsecureSkipVerify = true; return c }(),
		"short timeout":  {Insecure: true, Timeout: time.Millisecond},
		"small buffer":   {Insecure: true, BulkBuffer: 1000},
		"negative limit": {Insecure: true, HandshakeTimeout: -1},
	} {
		if _, err := NewDialer(c); err == nil {
			t.Errorf("%s: dialer made", name)
		}
		if l, err := Listen("127.0.0.1:0", c); err == nil {
			l.Close()
			t.Errorf("%s: listener made", name)
		}
	}
}

func FuzzPreamble(f *testing.F) {
	f.Add(appendPreamble(nil, preamble{version: wire.Version, id: urgentID}))
	f.Add(appendPreamble(nil, preamble{version: 7, plain: true}))
	f.Add(appendGreeting(nil, StatusKey))
	f.Fuzz(func(t *testing.T, b []byte) {
		_ = parseGreeting(b)
		p, err := parsePreamble(b)
		if err != nil {
			if !errors.Is(err, errPreamble) {
				t.Fatal(err)
			}
			return
		}
		if p.version == wire.Version && string(appendPreamble(nil, p)) != string(b) {
			t.Fatalf("%x read as %+v", b, p)
		}
	})
}
