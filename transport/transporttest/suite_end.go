package transporttest

import (
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

func recvErr(l transport.Lane) error {
	f, err := l.Recv()
	f.Payload.Release()
	return err
}

// recvUntilErr receives and discards.
func recvUntilErr(l transport.Lane) error {
	for {
		if err := recvErr(l); err != nil {
			return err
		}
	}
}

// sendUntilErr sends until it fails.
func sendUntilErr(l transport.Lane) error {
	for {
		if err := l.Send(transport.Frame{Type: wire.TypePing, Meta: make([]byte, 1000)}); err != nil {
			return err
		}
	}
}

func testCloseWakesRecv(r *rig) {
	errs := make(chan error, 1)
	go func() { errs <- recvErr(r.A) }()
	time.Sleep(20 * time.Millisecond) // most often it waits by now; it must be woken either way
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { r.A.Close() })
	}
	wg.Wait()
	wantErr(r.t, "receive", within(r, limit, "receive", func() error { return <-errs }), transport.ErrClosed)
	wantErr(r.t, "receive again", recvErr(r.A), transport.ErrClosed)
	wantErr(r.t, "send", r.A.Send(transport.Frame{Type: wire.TypePing}), transport.ErrClosed)
	wantErr(r.t, "the peer's receive", within(r, limit, "the peer's receive", func() error { return recvErr(r.B) }), transport.ErrPeer)
}

func testCloseWakesSend(r *rig) {
	errs := make(chan error, 1)
	go func() {
		for {
			if err := r.A.Send(transport.Frame{Type: wire.TypePages, Payload: r.poolA.Get(1<<18, nil)}); err != nil {
				errs <- err
				return
			}
		}
	}()
	for last := uint64(1); r.A.Stats().FramesSent != last; time.Sleep(50 * time.Millisecond) {
		last = r.A.Stats().FramesSent
	}
	r.A.Close()
	wantErr(r.t, "send", within(r, limit, "send", func() error { return <-errs }), transport.ErrClosed)
}

func testCloseWakesPool(r *rig) {
	var held []*transport.Buffer
	for range buffers {
		held = append(held, r.poolB.Get(1, nil))
	}
	if err := r.A.Send(transport.Frame{Type: wire.TypePages, Payload: r.poolA.Get(4096, nil)}); err != nil {
		r.t.Fatal(err)
	}
	errs := make(chan error, 1)
	go func() { errs <- recvErr(r.B) }()
	time.Sleep(20 * time.Millisecond)
	r.B.Close()
	wantErr(r.t, "receive", within(r, limit, "receive", func() error { return <-errs }), transport.ErrClosed)
	for _, b := range held {
		b.Release()
	}
}

// testCloseRace closes one end or both while frames fly in both directions.
func testCloseRace(r *rig) {
	seed := rand.Uint64()
	r.t.Logf("seed %d", seed)
	g := rand.New(rand.NewPCG(seed, 0))
	var wg sync.WaitGroup
	for _, e := range []struct {
		l transport.Lane
		p *transport.Pool
	}{{r.A, r.poolA}, {r.B, r.poolB}} {
		wg.Go(func() {
			for i := 0; ; i++ {
				f := transport.Frame{Type: wire.TypePages, Meta: []byte("meta")}
				if i%3 == 0 {
					f.Payload = e.p.Get(4096*(1+i%4), nil)
				}
				if err := e.l.Send(f); err != nil {
					if !errors.Is(err, transport.ErrClosed) && !errors.Is(err, transport.ErrPeer) {
						r.t.Errorf("send: %v", err)
					}
					return
				}
			}
		})
		wg.Go(func() {
			if err := recvUntilErr(e.l); !errors.Is(err, transport.ErrClosed) && !errors.Is(err, transport.ErrPeer) {
				r.t.Errorf("receive: %v", err)
			}
		})
	}
	time.Sleep(time.Duration(g.IntN(20_000)) * time.Microsecond)
	r.A.Close()
	if g.IntN(2) == 0 {
		r.B.Close()
	}
	within(r, limit, "the end", func() error { wg.Wait(); return nil })
}

// testOrderlyEnd: what was sent before Close arrives, then the end is seen.
func testOrderlyEnd(r *rig) {
	for i := range 10 {
		if err := r.A.Send(transport.Frame{Type: wire.TypeMessage, Meta: []byte{byte(i)}}); err != nil {
			r.t.Fatal(err)
		}
	}
	r.A.Close()
	for i := range 10 {
		f, err := r.B.Recv()
		if err != nil || len(f.Meta) != 1 || f.Meta[0] != byte(i) {
			r.t.Fatalf("frame %d: %+v, %v", i, f, err)
		}
	}
	for range 2 {
		wantErr(r.t, "receive", within(r, limit, "receive", func() error { return recvErr(r.B) }), transport.ErrPeer)
	}
	wantErr(r.t, "send", within(r, limit, "send", func() error { return sendUntilErr(r.B) }), transport.ErrPeer)
}

func testPeerDeath(r *rig) {
	errs := make(chan error, 2)
	go func() { errs <- recvUntilErr(r.B) }()
	go func() { errs <- sendUntilErr(r.B) }()
	time.Sleep(10 * time.Millisecond)
	r.Die()
	for range 2 {
		wantErr(r.t, "after the peer's death", within(r, limit, "noticing", func() error { return <-errs }), transport.ErrPeer)
	}
}

// testPeerDeathInFrame: the death of a peer that had sent half a frame is a
// lost connection, and the half payload goes back to the pool.
func testPeerDeathInFrame(r *rig) {
	if r.Raw == nil {
		return
	}
	meta := []byte("half a frame")
	b := append(wire.AppendHeader(nil, wire.Header{Type: wire.TypePages, PayloadLen: 1 << 20}, meta), meta...)
	if err := r.Raw(append(b, make([]byte, 20_000)...)); err != nil {
		r.t.Fatal(err)
	}
	r.A.Close()
	wantErr(r.t, "receive", within(r, limit, "receive", func() error { return recvErr(r.B) }), transport.ErrPeer)
}

// testStall: an end that only waits and an end that sends both find out.
func testStall(r *rig) {
	if r.Stall == nil {
		return
	}
	if err := r.A.Send(transport.Frame{Type: wire.TypePing}); err != nil {
		r.t.Fatal(err)
	}
	if err := recvErr(r.B); err != nil {
		r.t.Fatal(err)
	}
	errs := make(chan error, 2)
	r.Stall()
	go func() { errs <- sendUntilErr(r.A) }()
	go func() { errs <- recvErr(r.B) }()
	for range 2 {
		wantErr(r.t, "on a stalled link", within(r, r.StallBound, "noticing the stall", func() error { return <-errs }), transport.ErrPeer)
	}
}
