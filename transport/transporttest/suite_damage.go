package transporttest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// raw is the encoding of a frame.
func raw(seq uint64, meta []byte, payload int) []byte {
	b := wire.AppendHeader(nil, wire.Header{Type: wire.TypePages, PayloadLen: uint32(payload), Seq: seq}, meta)
	return append(append(b, meta...), make([]byte, payload)...)
}

// runDamaged hands B what no sender of ours would send, each kind of it on a
// pair of its own.
func runDamaged(t *testing.T, mk Maker) {
	good := raw(0, []byte("meta"), 4096)
	edit := func(at int, v byte) []byte {
		b := bytes.Clone(good)
		b[at] = v
		return b
	}
	for name, c := range map[string]struct {
		good int // frames that arrive before the damage
		b    []byte
	}{
		"magic":             {0, edit(0, 'X')},
		"version":           {0, edit(4, wire.Version+1)},
		"type":              {0, edit(5, 9)},
		"reserved":          {0, edit(25, 1)},
		"checksum":          {0, edit(31, good[31]+1)},
		"meta":              {0, edit(wire.HeaderSize, 'M')},
		"oversized meta":    {0, edit(11, 1)},
		"oversized payload": {0, edit(15, 1)},
		"no room":           {0, raw(0, nil, wire.MaxPayload)[:wire.HeaderSize]}, // the pool has smaller buffers
		"garbage":           {0, bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 100)},
		"truncated meta":    {0, append(raw(0, bytes.Repeat([]byte("m"), 100), 0)[:80], good...)},
		"truncated payload": {1, append(bytes.Clone(good[:len(good)-50]), bytes.Repeat(raw(1, nil, 0), 3)...)},
		"replayed":          {1, append(bytes.Clone(good), good...)},
		"lost":              {1, append(bytes.Clone(good), raw(2, nil, 0)...)},
		"wrong order":       {0, append(raw(1, nil, 0), raw(0, nil, 0)...)},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, mk, wire.MaxPayload/2, func(r *rig) {
				if r.Raw == nil {
					return
				}
				if err := r.Raw(c.b); err != nil {
					t.Fatal(err)
				}
				for i := range c.good {
					if err := within(r, limit, "receive", func() error { return recvErr(r.B) }); err != nil {
						t.Fatalf("frame %d, which is good: %v", i, err)
					}
				}
				for range 2 {
					wantErr(t, "receive", within(r, limit, "receive", func() error { return recvErr(r.B) }), transport.ErrDamaged)
				}
				if err := within(r, limit, "send", func() error { return sendUntilErr(r.B) }); err == nil {
					t.Error("a damaged lane still sends")
				}
				wantErr(t, "the sender's receive", within(r, limit, "receive", func() error { return recvErr(r.A) }), transport.ErrPeer)
			})
		})
	}
}

// testFlippedBit flips one random bit of a header or meta among many frames:
// every frame before arrives, and neither that one nor any after it does.
func testFlippedBit(r *rig) {
	if r.Raw == nil {
		return
	}
	seed := rand.Uint64()
	r.t.Logf("seed %d", seed)
	g := rand.New(rand.NewPCG(seed, 0))
	const frames = 20
	hit := g.IntN(frames)
	var all []byte
	for i := range frames {
		meta := make([]byte, g.IntN(3000))
		fill(meta, uint64(i))
		b := raw(uint64(i), meta, g.IntN(3)*4096)
		if i == hit {
			bit := g.IntN((wire.HeaderSize + len(meta)) * 8)
			r.t.Logf("bit %d of frame %d", bit, hit)
			b[bit/8] ^= 1 << (bit % 8)
		}
		all = append(all, b...)
	}
	if err := r.Raw(all); err != nil {
		r.t.Fatal(err)
	}
	for i := range hit {
		if err := within(r, limit, "receive", func() error { return recvErr(r.B) }); err != nil {
			r.t.Fatalf("frame %d, which is good: %v", i, err)
		}
	}
	r.A.Close() // a length made larger waits for bytes that never come
	err := within(r, limit, "receive", func() error { return recvErr(r.B) })
	if !errors.Is(err, transport.ErrDamaged) && !errors.Is(err, transport.ErrPeer) {
		r.t.Errorf("damaged frame: %v", err)
	}
}
