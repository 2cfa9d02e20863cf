package transporttest

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// echo answers every connection with what it sends.
func echo(t *testing.T) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	return ln.Addr().String()
}

// through sends content to an echo behind a proxy and returns what comes back
// until the end or, if it is positive, for as long as wait.
func through(t *testing.T, content []byte, wait time.Duration, faults ...Fault) (got []byte, err error, p *Proxy) {
	p, err = NewProxy(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	p.SetPlan(func(n int, first []byte) []Fault {
		if n != 0 || !bytes.HasPrefix(content, first) {
			t.Errorf("connection %d begins with %q", n, first)
		}
		return faults
	})
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		c.Write(content)
		c.(*net.TCPConn).CloseWrite()
	}()
	if wait <= 0 {
		wait = 10 * time.Second
	}
	c.SetReadDeadline(time.Now().Add(wait))
	got, err = io.ReadAll(c)
	return got, err, p
}

func TestProxy(t *testing.T) {
	content := make([]byte, 200_000)
	fill(content, 1)
	flipped := bytes.Clone(content)
	flipped[70_000] ^= 0x10
	for name, c := range map[string]struct {
		faults []Fault
		want   []byte
	}{
		"none":        {nil, content},
		"flip":        {[]Fault{{Dir: ToServer, At: 70_000, Do: Flip, Mask: 0x10}}, flipped},
		"flip answer": {[]Fault{{Dir: ToClient, At: 70_000, Do: Flip, Mask: 0x10}}, flipped},
		"drop":        {[]Fault{{Dir: ToServer, At: 5, Do: Drop, N: 100_000}}, append(bytes.Clone(content[:5]), content[100_005:]...)},
		"delay":       {[]Fault{{Dir: ToServer, At: 5, Do: Delay, Wait: time.Millisecond}}, content},
		"end":         {[]Fault{{Dir: ToClient, At: 60_000, Do: End}}, content[:60_000]},
	} {
		t.Run(name, func(t *testing.T) {
			got, err, p := through(t, content, 0, c.faults...)
			if name == "end" { // may arrive as a reset: bytes in flight were refused
				if !bytes.HasPrefix(c.want, got) {
					t.Errorf("%d bytes came back", len(got))
				}
				return
			}
			if err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("%d bytes came back instead of %d: %v", len(got), len(c.want), err)
			}
			if n := p.Conns()[0].Bytes(ToClient); n != int64(len(got)) {
				t.Errorf("the proxy counts %d bytes of %d", n, len(got))
			}
		})
	}
}

func TestProxyCut(t *testing.T) {
	content := make([]byte, 200_000)
	got, err, p := through(t, content, 0, Fault{Dir: ToServer, At: 100_000, Do: Cut})
	if err == nil || len(got) > 100_000 {
		t.Errorf("%d bytes came back after a cut: %v", len(got), err)
	}
	p.Reject(true)
	c, err := net.Dial("tcp", p.Addr())
	if err == nil {
		c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err = c.Read(make([]byte, 1)); err == nil {
			t.Error("a rejected connection carries data")
		}
		c.Close()
	}
	if n := len(p.Conns()); n != 1 {
		t.Errorf("%d connections", n)
	}
}

func TestProxyStall(t *testing.T) {
	content := make([]byte, 200_000)
	got, err, _ := through(t, content, 200*time.Millisecond, Fault{Dir: ToServer, At: 100_000, Do: Stall})
	if ne, ok := err.(net.Error); !ok || !ne.Timeout() || len(got) != 100_000 {
		t.Errorf("%d bytes came through a stall at 100000: %v", len(got), err)
	}
}

func TestProxyOnCommand(t *testing.T) {
	p, err := NewProxy(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	b := make([]byte, 4)
	ping := func(wait time.Duration) error {
		c.SetDeadline(time.Now().Add(wait))
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, b)
		return err
	}
	if err := ping(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	p.StallAll()
	if err := ping(50 * time.Millisecond); err == nil {
		t.Error("bytes pass a stalled proxy")
	}
	p.ResumeAll()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(c, b); err != nil {
		t.Errorf("after the stall: %v", err)
	}
	p.CutAll()
	if err := ping(10 * time.Second); err == nil {
		t.Error("bytes pass a cut")
	}
}
