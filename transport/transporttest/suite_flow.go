package transporttest

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// testOrder sends frames of all sizes in batches of all sizes both ways at once
// and compares every one.
func testOrder(r *rig) {
	const frames = 200
	seed := rand.Uint64()
	r.t.Logf("seed %d", seed)
	ref, err := transport.NewPool(1, wire.MaxPayload)
	if err != nil {
		r.t.Fatal(err)
	}
	ref2, err := transport.NewPool(1, wire.MaxPayload)
	if err != nil {
		r.t.Fatal(err)
	}
	errs := make(chan error, 4)
	send := func(l transport.Lane, p *transport.Pool, seed uint64) {
		g := rand.New(rand.NewPCG(seed, 1<<40))
		for i := 0; i < frames; {
			var batch []transport.Frame
			for n := 1 + g.IntN(4); n > 0 && i < frames; n, i = n-1, i+1 {
				f, err := r.frame(p, seed, i)
				if err != nil {
					errs <- err
					return
				}
				batch = append(batch, f)
			}
			if err := l.Send(batch...); err != nil {
				errs <- fmt.Errorf("send up to frame %d: %w", i, err)
				return
			}
		}
		errs <- nil
	}
	recv := func(l transport.Lane, ref *transport.Pool, seed uint64) {
		for i := range frames {
			f, err := l.Recv()
			if err != nil {
				errs <- fmt.Errorf("receive frame %d: %w", i, err)
				return
			}
			want, err := r.frame(ref, seed, i)
			if err == nil {
				err = same(f, want)
			}
			f.Payload.Release()
			want.Payload.Release()
			if err != nil {
				errs <- fmt.Errorf("frame %d: %w", i, err)
				return
			}
		}
		errs <- nil
	}
	go send(r.A, r.poolA, seed)
	go recv(r.B, ref, seed)
	go send(r.B, r.poolB, seed+1)
	go recv(r.A, ref2, seed+1)
	for range 4 {
		if err := within(r, limit, "exchange", func() error { return <-errs }); err != nil {
			r.A.Close()
			r.B.Close()
			r.t.Fatal(err)
		}
	}
	for _, p := range []*transport.Pool{ref, ref2} {
		if err := p.Close(); err != nil {
			r.t.Error(err)
		}
	}
}

// testSizes sends the largest and the smallest frames that there are, and one
// batch of more frames than any gather list holds.
func testSizes(r *rig) {
	big := r.poolA.Get(wire.MaxPayload, nil)
	fill(big.Bytes(), 9)
	one := r.poolA.Get(1, nil)
	one.Bytes()[0] = 42
	meta := make([]byte, wire.MaxMeta)
	fill(meta, 3)
	frames := []transport.Frame{
		{Type: wire.TypeBlob, Meta: meta, Payload: big},
		{Type: wire.TypePing},
		{Type: wire.TypePages, Payload: one},
	}
	const many = 3000
	for range many {
		frames = append(frames, transport.Frame{Type: wire.TypePong, Meta: []byte("pong")})
	}
	sent := make(chan error, 1)
	go func() { sent <- r.A.Send(frames...) }()
	within(r, limit, "receiving", func() error {
		f, err := r.B.Recv()
		if err != nil || string(f.Meta) != string(meta) || f.Payload.Len() != wire.MaxPayload {
			r.t.Errorf("largest frame: %v", err)
		}
		want := make([]byte, wire.MaxPayload)
		fill(want, 9)
		if f.Payload != nil && string(f.Payload.Bytes()) != string(want) {
			r.t.Error("largest payload differs")
		}
		f.Payload.Release()
		f, err = r.B.Recv()
		if err != nil || f.Type != wire.TypePing || len(f.Meta) != 0 || f.Payload != nil {
			r.t.Errorf("smallest frame: %+v, %v", f, err)
		}
		f, err = r.B.Recv()
		if err != nil || f.Payload == nil || f.Payload.Len() != 1 || f.Payload.Bytes()[0] != 42 {
			r.t.Errorf("payload of one byte: %+v, %v", f, err)
		}
		f.Payload.Release()
		for i := range many {
			if f, err = r.B.Recv(); err != nil || string(f.Meta) != "pong" {
				r.t.Errorf("frame %d of the batch: %+v, %v", i, f, err)
				break
			}
		}
		return nil
	})
	if err := within(r, limit, "sending", func() error { return <-sent }); err != nil {
		r.t.Error(err)
	}
}

// testOwnership: payloads return to the sender's pool without anyone's doing,
// after success and after failure, and a received one stays what it was until
// it is released.
func testOwnership(r *rig) {
	for i := range 4 {
		b := r.poolA.Get(4096, nil)
		fill(b.Bytes(), uint64(i))
		if err := r.A.Send(transport.Frame{Type: wire.TypePages, Payload: b}); err != nil {
			r.t.Fatal(err)
		}
	}
	var got []*transport.Buffer
	for range 4 {
		f, err := r.B.Recv()
		if err != nil {
			r.t.Fatal(err)
		}
		got = append(got, f.Payload)
	}
	if !eventually(func() bool { return r.poolA.Outstanding() == 0 }) {
		r.t.Errorf("the transport keeps %d buffers that it has sent", r.poolA.Outstanding())
	}
	if n := r.poolB.Outstanding(); n != 4 {
		r.t.Errorf("%d buffers out at the receiver, 4 were received", n)
	}
	want := make([]byte, 4096)
	for i, b := range got {
		fill(want, uint64(i))
		if string(b.Bytes()) != string(want) {
			r.t.Errorf("payload %d changed after it was received", i)
		}
		b.Release()
	}
	r.A.Close()
	err := r.A.Send(
		transport.Frame{Type: wire.TypePages, Payload: r.poolA.Get(4096, nil)},
		transport.Frame{Type: wire.TypePages, Payload: r.poolA.Get(1, nil)})
	wantErr(r.t, "send after close", err, transport.ErrClosed)
	if n := r.poolA.Outstanding(); n != 0 {
		r.t.Errorf("a failed send kept %d buffers", n)
	}
}

// testTooLarge: what cannot be a frame is refused whole, and the lane goes on.
func testTooLarge(r *rig) {
	err := r.A.Send(
		transport.Frame{Type: wire.TypePing},
		transport.Frame{Type: wire.TypeMessage, Meta: make([]byte, wire.MaxMeta+1), Payload: r.poolA.Get(10, nil)})
	if err == nil {
		r.t.Error("meta above the limit was sent")
	}
	if n := r.poolA.Outstanding(); n != 0 {
		r.t.Errorf("a refused send kept %d buffers", n)
	}
	if err := r.A.Send(transport.Frame{Type: wire.TypePong}); err != nil {
		r.t.Fatal(err)
	}
	if f, err := r.B.Recv(); err != nil || f.Type != wire.TypePong {
		r.t.Errorf("after a refused batch: %+v, %v", f, err)
	}
}

func testStats(r *rig) {
	for range 3 {
		if err := r.A.Send(transport.Frame{Type: wire.TypePages, Meta: make([]byte, 100), Payload: r.poolA.Get(8192, nil)}); err != nil {
			r.t.Fatal(err)
		}
		f, err := r.B.Recv()
		if err != nil {
			r.t.Fatal(err)
		}
		f.Payload.Release()
	}
	a, b := r.A.Stats(), r.B.Stats()
	if a.FramesSent != 3 || b.FramesReceived != 3 || a.FramesReceived != 0 || b.FramesSent != 0 {
		r.t.Errorf("frames: %+v, %+v", a, b)
	}
	if a.BytesSent < 3*(8192+100+wire.HeaderSize) || a.BytesSent != b.BytesReceived {
		r.t.Errorf("bytes: %+v, %+v", a, b)
	}
}

// testSlowPeer: a receiver that takes nothing holds the sender up after a
// bounded number of bytes, and nothing is lost when it begins to.
func testSlowPeer(r *rig) {
	const size, frames, bound = 256 << 10, 256, 48 << 20
	var sent atomic.Int64
	errs := make(chan error, 1)
	go func() {
		for i := range frames {
			b := r.poolA.Get(size, nil)
			fill(b.Bytes(), uint64(i))
			if err := r.A.Send(transport.Frame{Type: wire.TypePages, Payload: b}); err != nil {
				errs <- err
				return
			}
			sent.Add(1)
		}
		errs <- nil
	}()
	for last, since := int64(-1), time.Now(); time.Since(since) < 300*time.Millisecond; time.Sleep(5 * time.Millisecond) {
		if n := sent.Load(); n != last {
			last, since = n, time.Now()
		}
	}
	if n := sent.Load() * size; n > bound {
		r.t.Errorf("%d bytes were taken from the sender before anyone received", n)
	}
	want := make([]byte, size)
	within(r, limit, "draining", func() error {
		for i := range frames {
			f, err := r.B.Recv()
			if err != nil {
				r.t.Errorf("frame %d: %v", i, err)
				r.A.Close()
				break
			}
			fill(want, uint64(i))
			if string(f.Payload.Bytes()) != string(want) {
				r.t.Errorf("frame %d differs", i)
			}
			f.Payload.Release()
		}
		return nil
	})
	if err := within(r, limit, "sending", func() error { return <-errs }); err != nil {
		r.t.Error(err)
	}
}

// testSmallBeforeLarge: buffers go to payloads in the order in which these come,
// even if later ones are here before somebody receives.
func testSmallBeforeLarge(r *rig) {
	sizes := []int{1, 256 << 10, 1, 4096, 256 << 10}
	errs := make(chan error, 1)
	go func() {
		for i := range 4 * buffers {
			b := r.poolA.Get(sizes[i%len(sizes)], r.t.Context().Done())
			fill(b.Bytes(), uint64(i))
			if err := r.A.Send(transport.Frame{Type: wire.TypePages, Payload: b}); err != nil {
				errs <- err
				return
			}
		}
		errs <- nil
	}()
	time.Sleep(100 * time.Millisecond)
	err := within(r, limit, "receiving", func() error {
		want := make([]byte, 256<<10)
		for i := range 4 * buffers {
			f, err := r.B.Recv()
			if err != nil {
				return fmt.Errorf("frame %d: %w", i, err)
			}
			want := want[:sizes[i%len(sizes)]]
			fill(want, uint64(i))
			if string(f.Payload.Bytes()) != string(want) {
				r.t.Errorf("frame %d differs", i)
			}
			f.Payload.Release()
		}
		return <-errs
	})
	if err != nil {
		r.t.Error(err)
	}
}

// testPoolExhausted: Recv waits for a buffer instead of taking more memory.
func testPoolExhausted(r *rig) {
	var held []*transport.Buffer
	for range buffers {
		held = append(held, r.poolB.Get(1, nil))
	}
	if err := r.A.Send(transport.Frame{Type: wire.TypePages, Payload: r.poolA.Get(4096, nil)}); err != nil {
		r.t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() {
		f, err := r.B.Recv()
		f.Payload.Release()
		got <- err
	}()
	select {
	case err := <-got:
		r.t.Errorf("received a payload without a buffer to hold it: %v", err)
	case <-time.After(50 * time.Millisecond):
		held[0].Release()
		held = held[1:]
		if err := within(r, limit, "receive", func() error { return <-got }); err != nil {
			r.t.Error(err)
		}
	}
	for _, b := range held {
		b.Release()
	}
}
