package transporttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Pair is two connected lanes, fresh for one test.
type Pair struct {
	A, B transport.Lane
	// Raw puts bytes into the stream that B receives from A, in A's place and
	// below its framing. Nil where the transport has no such thing.
	Raw func(b []byte) error
	// Die ends A as the death of its process would.
	Die func()
	// Stall makes whatever either end sends from now on vanish, and StallBound
	// is how long the ends may take to find out. Nil where the transport
	// cannot lose anything.
	Stall      func()
	StallBound time.Duration
}

// Maker makes a pair whose ends receive into the pools given. It registers the
// end of what it started with t.Cleanup; the suite closes the lanes itself.
type Maker func(t *testing.T, id transport.LaneID, poolA, poolB *transport.Pool) *Pair

// limit is what a step may take before the suite calls it a hang.
var limit = 20 * time.Second

// Patience makes that longer, on a machine that is slow. Call it before Run.
func Patience(d time.Duration) { limit = d }

// rig is a pair with its pools; the suite's tests run on it.
type rig struct {
	*Pair
	t            *testing.T
	poolA, poolB *transport.Pool
}

// Run runs the conformance suite over pairs from mk.
func Run(t *testing.T, mk Maker) {
	for _, c := range []struct {
		name string
		f    func(*rig)
	}{
		{"Order", testOrder},
		{"Sizes", testSizes},
		{"Ownership", testOwnership},
		{"TooLarge", testTooLarge},
		{"Stats", testStats},
		{"SlowPeer", testSlowPeer},
		{"SmallBeforeLarge", testSmallBeforeLarge},
		{"PoolExhausted", testPoolExhausted},
		{"CloseWakesRecv", testCloseWakesRecv},
		{"CloseWakesSend", testCloseWakesSend},
		{"CloseWakesPool", testCloseWakesPool},
		{"CloseRace", testCloseRace},
		{"OrderlyEnd", testOrderlyEnd},
		{"PeerDeath", testPeerDeath},
		{"PeerDeathInFrame", testPeerDeathInFrame},
		{"Stall", testStall},
		{"FlippedBit", testFlippedBit},
	} {
		t.Run(c.name, func(t *testing.T) { run(t, mk, wire.MaxPayload, c.f) })
	}
	t.Run("Damaged", func(t *testing.T) { runDamaged(t, mk) })
}

// buffers is how many each pool has.
const buffers = 8

// run makes a pair with buffers of size bytes, runs f on it and checks that
// nothing of it is left.
func run(t *testing.T, mk Maker, size int, f func(*rig)) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() { // after those of mk
		if !eventually(func() bool { return runtime.NumGoroutine() <= before }) {
			buf := make([]byte, 1<<20)
			t.Errorf("%d goroutines before, %d after:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
		}
	})
	r := &rig{t: t}
	var err error
	if r.poolA, err = transport.NewPool(buffers, size); err != nil {
		t.Fatal(err)
	}
	if r.poolB, err = transport.NewPool(buffers, size); err != nil {
		t.Fatal(err)
	}
	id := transport.LaneID{Migration: transport.MigrationID{1, 2, 3}, Epoch: 4, Kind: transport.Bulk, Index: 5}
	r.Pair = mk(t, id, r.poolA, r.poolB)
	for _, l := range []transport.Lane{r.A, r.B} {
		if l.ID() != id {
			t.Errorf("lane is %+v, want %+v", l.ID(), id)
		}
	}
	defer func() {
		r.A.Close()
		r.B.Close()
		for _, p := range []*transport.Pool{r.poolA, r.poolB} {
			if !eventually(func() bool { return p.Outstanding() == 0 }) {
				t.Errorf("%d buffers were not given back", p.Outstanding())
			} else if err := p.Close(); err != nil {
				t.Error(err)
			}
		}
	}()
	f(r)
}

// eventually waits for cond, for a while.
func eventually(cond func() bool) bool {
	for end := time.Now().Add(limit / 2); time.Now().Before(end); runtime.Gosched() {
		if cond() {
			return true
		}
		time.Sleep(time.Millisecond)
	}
	return cond()
}

// within fails the test when f does not return in d.
func within[T any](r *rig, d time.Duration, what string, f func() T) T {
	r.t.Helper()
	c := make(chan T, 1)
	go func() { c <- f() }()
	select {
	case v := <-c:
		return v
	case <-time.After(d):
		buf := make([]byte, 1<<20)
		r.t.Fatalf("%s hangs:\n%s", what, buf[:runtime.Stack(buf, true)])
		panic("unreachable")
	}
}

func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: got %v, want %v", what, err, want)
	}
}

// frame is the i-th of a stream that both ends can compute from seed.
func (r *rig) frame(p *transport.Pool, seed uint64, i int) (transport.Frame, error) {
	g := rand.New(rand.NewPCG(seed, uint64(i)))
	sizes := []int{0, 1, 16, 40, 300, 2047, 2048, 2049, 9000, wire.MaxMeta}
	meta := make([]byte, sizes[g.IntN(len(sizes))])
	for j := range meta {
		meta[j] = byte(i + j)
	}
	f := transport.Frame{Type: wire.Type(g.IntN(256)), Flags: uint16(g.Uint32()), Meta: meta}
	payloads := []int{0, 0, 0, 1, 4096, 8192 - 32, 65536, 1 << 18, p.BufferSize()}
	if n := payloads[g.IntN(len(payloads))]; n > 0 {
		if f.Payload = p.Get(n, r.t.Context().Done()); f.Payload == nil {
			return f, errors.New("no buffer until the end of the test")
		}
		fill(f.Payload.Bytes(), uint64(i))
	}
	return f, nil
}

func fill(b []byte, seed uint64) {
	x := seed*0x9e3779b97f4a7c15 + 1
	for len(b) >= 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b, x)
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(x) + byte(i)
	}
}

func same(a, b transport.Frame) error {
	if a.Type != b.Type || a.Flags != b.Flags || string(a.Meta) != string(b.Meta) {
		return fmt.Errorf("%v %#x with %d bytes of meta became %v %#x with %d", b.Type, b.Flags, len(b.Meta), a.Type, a.Flags, len(a.Meta))
	}
	if (a.Payload == nil) != (b.Payload == nil) {
		return fmt.Errorf("payload %v became %v", b.Payload != nil, a.Payload != nil)
	}
	if a.Payload != nil {
		x, y := a.Payload.Bytes(), b.Payload.Bytes()
		if len(x) != len(y) || crc32.ChecksumIEEE(x) != crc32.ChecksumIEEE(y) {
			return fmt.Errorf("payload of %d bytes became another of %d", len(y), len(x))
		}
	}
	return nil
}
