package migrate

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
	"github.com/pageferry/pageferry/wire"
)

func everyMessage() []message {
	return []message{
		Hello{Version: 1, Features: []string{"x"}, Host: "a", Incarnation: Incarnation{1, 2}, PageSize: 4096, XFeatures: 7, XSize: 2696, Kernel: "6.18", Machine: "x86_64"},
		landedMsg{Pages: 7, PagesZero: 1, BytesWire: 1 << 40, Micros: 12, Stats: statsOnAir{PagesLanded: 9}},
		offerMsg{Migration: wireID{1}, Offer: Offer{Mode: ModeStop, Comm: "redis", Listeners: []string{"tcp 0.0.0.0:6379"}}},
		acceptMsg{Epoch: 1, Key: []byte("k")},
		refuseMsg{Reasons: []string{"no room"}},
		readyMsg{RebuildMicros: 12, Stats: statsOnAir{PagesTotal: 9}},
		commitMsg{}, runningMsg{PID: 4, CommitMicros: 5, ReleaseMicros: 6},
		progressMsg{Stats: statsOnAir{PagesResident: 1, FaultP50us: 1.5}},
		residentMsg{PID: 1}, doneMsg{}, settledMsg{}, abortMsg{Reason: "r"}, abortedMsg{Reason: "r"},
		resumeMsg{Migration: wireID{1}, Intent: intentCommit, Resolved: true, Reason: "r"},
		resumeAckMsg{Known: true, State: DestRunning, Epoch: 2, Key: []byte("k"), PID: 3},
		pingMsg{}, pongMsg{}, lostMsg{Reason: "r"}, retryMsg{Reason: "r"},
	}
}

// lanePair is two control lanes over the in-memory transport.
func lanePair(t *testing.T) (a, b *control, raw transport.Lane) {
	t.Helper()
	pool := func() *transport.Pool {
		p, err := transport.NewPool(4, maxPiece)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
		return p
	}
	id := transport.LaneID{Kind: transport.Control}
	la, lb := transporttest.NewPair(id, pool(), pool())
	a = newControl(la, transport.Peer{}, 10*time.Second, discard)
	b = newControl(lb, transport.Peer{}, 10*time.Second, discard)
	t.Cleanup(func() { a.close(); b.close() })
	return a, b, la
}

func TestMessages(t *testing.T) {
	a, b, _ := lanePair(t)
	for _, m := range everyMessage() {
		switch m.(type) {
		case pingMsg, pongMsg:
			continue // answered by the lane itself
		}
		if err := a.send(m); err != nil {
			t.Fatal(err)
		}
		r, err := b.recvIn(t.Context(), 5*time.Second, "message")
		if err != nil {
			t.Fatal(err)
		}
		if got := reflect.ValueOf(r.msg).Elem().Interface(); !reflect.DeepEqual(got, m) {
			t.Errorf("sent %+v\nreceived %+v", m, got)
		}
	}
	seen := map[kind]bool{kindState: true, kindMemory: true, kindLand: true}
	for _, m := range everyMessage() {
		seen[m.kind()] = true
	}
	for k := range kindNames {
		if !seen[k] || newMessage(k) == nil || newMessage(k).kind() != k {
			t.Errorf("message %v is not tested, or not made", k)
		}
	}
}

// TestState sends an image and a memory map in pieces, pings in between.
func TestState(t *testing.T) {
	a, b, _ := lanePair(t)
	for _, n := range []int{0, 1, blobPiece, 3<<20 + 17} {
		image := make([]byte, n)
		for i := range image {
			image[i] = byte(i * 7)
		}
		mem, err := encodeMemory([]Memory{{Space: 0, Lazy: page.NewSet(page.Range{Start: 0x1000, End: 0x9000})}})
		if err != nil {
			t.Fatal(err)
		}
		sent := make(chan error, 1)
		go func() { sent <- errors.Join(a.send(stateMsg{}, image, mem), a.send(memoryMsg{}, mem)) }()
		r, err := b.recvIn(t.Context(), 20*time.Second, "state")
		if err != nil {
			t.Fatal(err)
		}
		rest, err := b.recvIn(t.Context(), 20*time.Second, "memory")
		if err != nil {
			t.Fatal(err)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
		if _, ok := rest.msg.(*memoryMsg); !ok || len(rest.blobs) != 1 || !bytes.Equal(rest.blobs[0], mem) {
			t.Errorf("the rest of the map arrived as %v", rest)
		}
		if !bytes.Equal(r.blobs[0], image) || !bytes.Equal(r.blobs[1], mem) {
			t.Errorf("image of %d bytes arrived as %d", n, len(r.blobs[0]))
		}
	}
}

// TestLargeOffer is larger than a message may be, and travels all the same.
func TestLargeOffer(t *testing.T) {
	a, b, _ := lanePair(t)
	o := offerMsg{Migration: wireID{1}, Offer: Offer{Mode: ModeStop}}
	for range 5000 {
		o.Offer.Files = append(o.Offer.Files, "/var/lib/something/"+strings.Repeat("x", 30))
	}
	if err := a.send(o); err != nil {
		t.Fatal(err)
	}
	r, err := b.recvIn(t.Context(), 5*time.Second, "offer")
	if err != nil {
		t.Fatal(err)
	}
	if got := r.msg.(*offerMsg); len(got.Offer.Files) != 5000 {
		t.Errorf("%d files", len(got.Offer.Files))
	}
	if err := a.send(abortMsg{Reason: strings.Repeat("x", maxMeta)}); err == nil {
		t.Error("a message of more than its limit was sent")
	}
}

// TestBadFrames: what is not allowed ends the connection with ErrProtocol or
// ErrDamaged, and reaches nobody.
func TestBadFrames(t *testing.T) {
	meta := func(v any) []byte {
		b, err := encMode.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	envOf := func(k kind, body any, blobs ...blobInfo) []byte {
		return meta(envelope{Kind: k, Body: meta(body), Blobs: blobs})
	}
	pool, err := transport.NewPool(4, maxPiece)
	if err != nil {
		t.Fatal(err)
	}
	payload := func(n int) *transport.Buffer { return pool.Get(n, nil) }
	type fs = []transport.Frame
	for name, frames := range map[string]fs{
		"unknown kind":      {{Type: wire.TypeMessage, Meta: envOf(99, struct{}{})}},
		"no CBOR":           {{Type: wire.TypeMessage, Meta: []byte("hello")}},
		"empty":             {{Type: wire.TypeMessage}},
		"trailing":          {{Type: wire.TypeMessage, Meta: append(envOf(kindDone, struct{}{}), 0)}},
		"unknown field":     {{Type: wire.TypeMessage, Meta: envOf(kindAbort, map[int]string{1: "r", 9: "x"})}},
		"page frame":        {{Type: wire.TypeWant}},
		"piece of nothing":  {{Type: wire.TypeBlob, Meta: meta(pieceMeta{}), Payload: payload(8)}},
		"short id":          {{Type: wire.TypeMessage, Meta: envOf(kindResume, map[int]any{1: []byte{1}, 2: 1, 3: false, 4: ""})}},
		"bad intent":        {{Type: wire.TypeMessage, Meta: envOf(kindResume, map[int]any{1: make([]byte, 16), 2: 77, 3: false, 4: ""})}},
		"bad state":         {{Type: wire.TypeMessage, Meta: envOf(kindResumeAck, map[int]any{2: 99})}},
		"unasked blobs":     {{Type: wire.TypeMessage, Meta: envOf(kindDone, struct{}{}, blobInfo{Bytes: 4})}},
		"memory of no blob": {{Type: wire.TypeMessage, Meta: envOf(kindMemory, struct{}{})}},
		"state of one blob": {{Type: wire.TypeMessage, Meta: envOf(kindState, struct{}{}, blobInfo{Bytes: 4})}},
		"image too large":   {{Type: wire.TypeMessage, Meta: envOf(kindState, struct{}{}, blobInfo{Bytes: maxImage + 1}, blobInfo{})}},
		"wrong piece sum": {{Type: wire.TypeMessage, Meta: envOf(kindState, struct{}{}, blobInfo{Bytes: 4}, blobInfo{})},
			{Type: wire.TypeBlob, Meta: meta(pieceMeta{CRC: 1}), Payload: payload(4)}},
		"wrong total sum": {{Type: wire.TypeMessage, Meta: envOf(kindState, struct{}{}, blobInfo{Bytes: 4, CRC: 1}, blobInfo{})},
			{Type: wire.TypeBlob, Meta: meta(pieceMeta{CRC: 0x48674bc7}), Payload: payload(4)}},
		"piece beyond the end": {{Type: wire.TypeMessage, Meta: envOf(kindState, struct{}{}, blobInfo{Bytes: 4}, blobInfo{})},
			{Type: wire.TypeBlob, Meta: meta(pieceMeta{}), Payload: payload(5)}},
		"message in a message": {{Type: wire.TypeMessage, Meta: envOf(kindState, struct{}{}, blobInfo{Bytes: 4}, blobInfo{})},
			{Type: wire.TypeMessage, Meta: envOf(kindDone, struct{}{})}},
	} {
		t.Run(name, func(t *testing.T) {
			var as assembly
			var last error
			for _, f := range frames {
				r, err := as.frame(f)
				f.Payload.Release()
				if r.msg != nil && err == nil {
					t.Errorf("%+v got through", r.msg)
				}
				last = err
			}
			if !errors.Is(last, ErrProtocol) && !errors.Is(last, transport.ErrDamaged) {
				t.Errorf("error %v", last)
			}
		})
	}
	if err := pool.Close(); err != nil {
		t.Error(err)
	}
}

// TestFlood: a peer that talks without being asked is cut off, not buffered.
func TestFlood(t *testing.T) {
	a, b, _ := lanePair(t)
	for range maxUnread + 8 {
		if err := a.send(doneMsg{}); err != nil {
			break
		}
	}
	select {
	case <-b.ctx.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("not cut off")
	}
	if err := b.err(); !errors.Is(err, ErrProtocol) {
		t.Error(err)
	}
}

func FuzzFrames(f *testing.F) {
	for _, m := range everyMessage() {
		meta, _, err := encodeMessage(m, nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(meta, []byte{}, []byte{})
	}
	meta, _, err := encodeMessage(stateMsg{}, [][]byte{[]byte("abcd"), {1, 0}})
	if err != nil {
		f.Fatal(err)
	}
	piece, err := encMode.Marshal(pieceMeta{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(meta, piece, []byte("abcd"))
	pool, err := transport.NewPool(1, maxPiece)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, meta, piece, payload []byte) {
		var as assembly
		r, err := as.frame(transport.Frame{Type: wire.TypeMessage, Meta: meta})
		if err == nil && r.msg != nil {
			again, blobs, err := encodeMessage(r.msg, r.blobs)
			if err != nil {
				return // larger in our form than in the peer's
			}
			env, err := decodeEnvelope(again)
			if err != nil {
				t.Fatalf("%+v cannot be read again: %v", r.msg, err)
			}
			if _, err := decodeMessage(env, blobs); err != nil {
				t.Fatalf("%+v cannot be read again: %v", r.msg, err)
			}
		}
		if err != nil || len(payload) == 0 || len(payload) > maxPiece {
			return
		}
		b := pool.Get(len(payload), nil)
		copy(b.Bytes(), payload)
		_, _ = as.frame(transport.Frame{Type: wire.TypeBlob, Meta: piece, Payload: b})
		b.Release()
	})
}

func TestMemoryMap(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for range 200 {
		var ms []Memory
		for space := range rng.IntN(3) {
			m := Memory{Space: page.Space(space)}
			for _, s := range m.sets() {
				for range rng.IntN(50) {
					start := page.Num(rng.Uint64N(1 << 35)).Addr()
					s.Add(page.Range{Start: start, End: start + page.Addr(1+rng.IntN(100))*page.Size})
				}
			}
			ms = append(ms, m)
		}
		b, err := encodeMemory(ms)
		if err != nil {
			t.Fatal(err)
		}
		got, err := decodeMemory(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(ms) {
			t.Fatalf("%d spaces, want %d", len(got), len(ms))
		}
		for i := range ms {
			if !reflect.DeepEqual(got[i], ms[i]) {
				t.Fatalf("got %+v\nwant %+v", got[i], ms[i])
			}
		}
		for cut := range len(b) {
			if _, err := decodeMemory(b[:cut]); err == nil {
				t.Fatalf("cut at %d of %d and taken", cut, len(b))
			}
		}
	}
	if _, err := encodeMemory([]Memory{{Lazy: page.NewSet(page.Range{Start: 1, End: 5000})}}); err == nil {
		t.Error("a range that is not whole pages was encoded")
	}
}

func FuzzMemoryMap(f *testing.F) {
	b, err := encodeMemory([]Memory{{Lazy: page.NewSet(page.Range{Start: 0x1000, End: 0x3000}), Hot: page.NewSet(page.Range{Start: 0x1000, End: 0x2000})}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		ms, err := decodeMemory(b)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		again, err := encodeMemory(ms)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeMemory(again)
		if err != nil || !reflect.DeepEqual(ms, back) {
			t.Fatalf("%v, %v\n%v", ms, err, back)
		}
	})
}
