package tcp

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/framed"
	"github.com/pageferry/pageferry/transport/transporttest"
	"github.com/pageferry/pageferry/wire"
)

var urgentID = transport.LaneID{Migration: transport.MigrationID{9}, Epoch: 1, Kind: transport.Urgent}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

func TestWrongKey(t *testing.T) {
	a := newAuthority(t)
	plain := Config{Insecure: true}
	for name, c := range map[string][2]Config{
		"plain": {plain, plain},
		"TLS":   {a.config(t, "source"), a.config(t, "dest")},
	} {
		t.Run(name, func(t *testing.T) {
			before := fds(t)
			l := newLink(t, c[0], c[1])
			_, _, errA, errB := l.lane(urgentID, NewKey(), NewKey(), nil, nil)
			wantErr(t, "dialer", errA, transport.ErrAuth)
			wantErr(t, "acceptor", errB, transport.ErrAuth)
			var r *RefusedError
			if !errors.As(errA, &r) || r.Status != StatusKey {
				t.Errorf("dialer was told %v", errA)
			}
			if n := fds(t); n > before+2 { // the listener and the poller's
				t.Errorf("%d descriptors before, %d after", before, n)
			}
		})
	}
	l := newLink(t, plain, plain)
	for _, k := range [][]byte{nil, make([]byte, KeySize-1)} {
		if _, err := l.d.DialLane(l.ctx, l.addr(), urgentID, k); err == nil {
			t.Errorf("a key of %d bytes was taken", len(k))
		}
	}
	if _, err := l.d.DialLane(l.ctx, l.addr(), transport.LaneID{Kind: transport.Control}, NewKey()); err == nil {
		t.Error("a control lane was dialed as a page lane")
	}
}

// An acceptor that knows nothing cannot pass for the right one either.
func TestFalseAcceptor(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		io.ReadFull(c, make([]byte, PreambleSize))
		c.Write(appendGreeting(nil, StatusOK))
		c.Write(make([]byte, nonceSize))
		answer := make([]byte, nonceSize+32)
		io.ReadFull(c, answer)
		c.Write(append(appendGreeting(nil, StatusOK), answer[nonceSize:]...)) // its own proof, reflected
		io.Copy(io.Discard, c)
	}()
	d, err := NewDialer(Config{Insecure: true})
	if err != nil {
		t.Fatal(err)
	}
	_, err = d.DialLane(testContext(t), ln.Addr().String(), urgentID, NewKey())
	wantErr(t, "dial", err, transport.ErrAuth)
}

// What a dialer with the right key once said is worth nothing the second time.
func TestReplayedProof(t *testing.T) {
	plain := Config{Insecure: true}
	l := newLink(t, plain, plain)
	key := NewKey()
	said := make(chan []byte, 1)
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer front.Close()
	go func() { // records what passes to the listener
		in, err := front.Accept()
		if err != nil {
			return
		}
		defer in.Close()
		out, err := net.Dial("tcp", l.addr())
		if err != nil {
			return
		}
		defer out.Close()
		go io.Copy(in, out)
		var rec bytes.Buffer
		io.Copy(out, io.TeeReader(in, &rec))
		said <- rec.Bytes()
	}()
	accept := func() error {
		in, err := l.ln.Accept(l.ctx)
		if err != nil {
			return err
		}
		b, err := AcceptLane(l.ctx, in.Conn, urgentID, key, plain)
		if err == nil {
			b.Close()
		}
		return err
	}
	first := make(chan error, 1)
	go func() { first <- accept() }()
	a, err := l.d.DialLane(l.ctx, front.Addr().String(), urgentID, key)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", l.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write(<-said); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "replay", accept(), transport.ErrAuth)
}

// A connection for one lane cannot be taken for another, though the key is the same.
func TestOtherLane(t *testing.T) {
	plain := Config{Insecure: true}
	l := newLink(t, plain, plain)
	key := NewKey()
	errs := make(chan error, 1)
	go func() {
		in, err := l.ln.Accept(l.ctx)
		if err == nil {
			if in.ID != urgentID {
				t.Errorf("lane %+v came as %+v", urgentID, in.ID)
			}
			other := in.ID
			other.Epoch++
			_, err = AcceptLane(l.ctx, in.Conn, other, key, plain)
		}
		errs <- err
	}()
	_, err := l.d.DialLane(l.ctx, l.addr(), urgentID, key)
	wantErr(t, "dialer", err, transport.ErrPeer)
	wantErr(t, "acceptor", <-errs, transport.ErrAuth)
}

func TestCertificates(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	dest := a.config(t, "dest")
	noCert := a.config(t, "source")
	noCert.Client = noCert.Client.Clone()
	noCert.Client.Certificates = nil
	blind := other.config(t, "source") // believes anyone, and shows a stranger's certificate
	blind.Client.RootCAs = dest.Client.RootCAs
	for name, src := range map[string]Config{
		"other authority": other.config(t, "source"),
		"no certificate":  noCert,
		"stranger":        blind,
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, src, dest)
			_, _, err := l.d.DialControl(l.ctx, l.addr())
			wantErr(t, "control", err, transport.ErrAuth)
			key := NewKey() // knowing the key does not help
			_, _, errA, errB := l.lane(urgentID, key, key, nil, nil)
			wantErr(t, "dialer of a lane", errA, transport.ErrAuth)
			wantErr(t, "acceptor of a lane", errB, transport.ErrAuth)
		})
	}
	wrongName := a.config(t, "source")
	wrongName.Client.ServerName = "elsewhere"
	l := newLink(t, wrongName, dest)
	_, _, err := l.d.DialControl(l.ctx, l.addr())
	wantErr(t, "wrong name", err, transport.ErrAuth)
}

// Plain and TLS ends meet: never anything but TLS unless both want it.
func TestPlainNeedsBoth(t *testing.T) {
	a := newAuthority(t)
	tls := func(name string, plainPages bool) Config {
		c := a.config(t, name)
		c.PlainPages = plainPages
		return c
	}
	insecure := Config{Insecure: true}
	for name, c := range map[string]struct {
		src, dst      Config
		control, lane Status
		plain         bool
	}{
		"both plain":          {tls("source", true), tls("dest", true), StatusOK, StatusOK, true},
		"source alone":        {tls("source", true), tls("dest", false), StatusOK, StatusNoPlain, false},
		"destination alone":   {tls("source", false), tls("dest", true), StatusOK, StatusOK, false},
		"insecure to secure":  {insecure, tls("dest", false), StatusNoPlain, StatusNoPlain, false},
		"insecure to plain":   {insecure, tls("dest", true), StatusNoPlain, StatusOK, true},
		"secure to insecure":  {tls("source", false), insecure, StatusNoTLS, StatusNoTLS, false},
		"insecure everywhere": {insecure, insecure, StatusOK, StatusOK, true},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLink(t, c.src, c.dst)
			ctx, cancel := context.WithCancel(l.ctx)
			type accepted struct {
				lane transport.Lane
				err  error
			}
			key := NewKey()
			got := make(chan accepted, 2)
			go func() {
				defer close(got)
				for {
					in, err := l.ln.Accept(ctx)
					if err != nil {
						return
					}
					if in.Control != nil {
						got <- accepted{in.Control, nil}
						continue
					}
					b, err := AcceptLane(ctx, in.Conn, urgentID, key, c.dst)
					got <- accepted{b, err}
				}
			}()
			check := func(what string, want Status, lane transport.Lane, err error) {
				t.Helper()
				var r *RefusedError
				switch {
				case want == StatusOK && err != nil:
					t.Errorf("%s: %v", what, err)
				case want == StatusOK:
					if g := <-got; g.err != nil {
						t.Errorf("%s, acceptor: %v", what, g.err)
					} else {
						g.lane.Close()
					}
					lane.Close()
				case !errors.As(err, &r) || r.Status != want || !errors.Is(err, transport.ErrAuth):
					t.Errorf("%s: got %v, want status %d", what, err, want)
				}
			}
			ctl, _, err := l.d.DialControl(ctx, l.addr())
			check("control", c.control, ctl, err)
			lane, err := l.d.DialLane(ctx, l.addr(), urgentID, key)
			if err == nil {
				if _, plain := laneStream(lane).(plainStream); plain != c.plain {
					t.Errorf("plain lane: %v", plain)
				}
			}
			check("lane", c.lane, lane, err)
			cancel()
			for range got {
			}
		})
	}
}

func TestRefuseAndVersion(t *testing.T) {
	plain := Config{Insecure: true}
	l := newLink(t, plain, plain)
	go func() {
		in, err := l.ln.Accept(l.ctx)
		if err == nil {
			in.Refuse(StatusMigration)
		}
	}()
	_, err := l.d.DialLane(l.ctx, l.addr(), urgentID, NewKey())
	var r *RefusedError
	if !errors.As(err, &r) || r.Status != StatusMigration || !errors.Is(err, transport.ErrPeer) {
		t.Errorf("refused lane: %v", err)
	}

	c, err := net.Dial("tcp", l.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write(appendPreamble(nil, preamble{version: wire.Version + 1, plain: true, id: urgentID})); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := parseGreeting(answer); !errors.As(err, &r) || r.Status != StatusVersion || r.Version != wire.Version {
		t.Errorf("to another version the listener says %v", err)
	}
}

// Bits flipped under TLS are seen as damage, bits flipped in the handshake as
// a failure of it.
func TestTamperedTLS(t *testing.T) {
	a := newAuthority(t)
	l := newLink(t, a.config(t, "source"), a.config(t, "dest"))
	p, err := transporttest.NewProxy(l.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	flipAt := func(at uint64) {
		p.SetPlan(func(int, []byte) []transporttest.Fault {
			return []transporttest.Fault{{Dir: transporttest.ToServer, At: int64(at), Do: transporttest.Flip}}
		})
	}
	// The handshake's length toward the server tells where frames begin.
	ctl, _, err := l.d.DialControl(l.ctx, l.addr())
	if err != nil {
		t.Fatal(err)
	}
	hs := ctl.Stats().BytesSent
	ctl.Close()
	if in, err := l.ln.Accept(l.ctx); err != nil {
		t.Fatal(err)
	} else {
		in.Control.Close()
	}

	flipAt(hs - 20)
	_, _, err = l.d.DialControl(l.ctx, p.Addr())
	if err == nil || !errors.Is(err, transport.ErrAuth) {
		t.Errorf("tampered handshake: %v", err)
	}

	flipAt(hs + 5000)
	ctl, _, err = l.d.DialControl(l.ctx, p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.Close()
	in, err := l.ln.Accept(l.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Control.Close()
	go func() {
		for ctl.Send(transport.Frame{Type: wire.TypeMessage, Meta: make([]byte, 1000)}) == nil {
		}
	}()
	for err == nil {
		_, err = in.Control.Recv()
	}
	wantErr(t, "tampered frame", err, transport.ErrDamaged)
	_, err = ctl.Recv()
	wantErr(t, "its sender", err, transport.ErrPeer)
}

func laneStream(l transport.Lane) framed.Stream { return l.(*framed.Lane).Stream() }
