package framed

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Stream is an ordered, reliable stream of bytes. One goroutine reads, another
// writes, any closes. Every error but io.EOF wraps transport.ErrPeer,
// ErrDamaged or ErrAuth.
type Stream interface {
	// Read waits for at least one byte, as an io.Reader.
	Read(p []byte) (int, error)
	// ReadFull fills p. It returns io.EOF when the stream ends before.
	ReadFull(p []byte) error
	// Write sends all of bufs, in order, and may change the slices in bufs,
	// not what they hold.
	Write(bufs [][]byte) error
	// Close wakes the calls in progress and makes later ones fail. Idempotent.
	Close() error
	// Counters are the bytes that crossed the wire so far.
	Counters() (sent, received uint64)
}

const (
	// readAhead holds an urgent answer of one page with room to spare, and is
	// small enough that moving it into a payload costs next to nothing.
	readAhead = 8 << 10
	// smallMeta and less is copied next to its header; more is gathered.
	smallMeta = 2 << 10
)

// Lane is frames on a Stream. See transport.Lane.
type Lane struct {
	id     transport.LaneID
	stream Stream
	pool   *transport.Pool

	closeOnce sync.Once
	done      chan struct{} // closed by Close

	framesSent, framesReceived atomic.Uint64

	// Send's own.
	sendSeq uint64
	sendErr error
	scratch []byte
	bufs    [][]byte

	// Recv's own: buf[r:w] is read and not yet given out.
	recvSeq uint64
	recvErr error
	buf     []byte
	r, w    int
}

// New returns a lane over stream. Payloads are received into buffers of pool;
// with a nil pool a frame that has a payload is damaged.
func New(id transport.LaneID, stream Stream, pool *transport.Pool) *Lane {
	return &Lane{id: id, stream: stream, pool: pool, done: make(chan struct{}), buf: make([]byte, readAhead)}
}

// ID is the lane's identity.
func (l *Lane) ID() transport.LaneID { return l.id }

// Stream is what the lane runs on; whoever writes to it damages the lane.
func (l *Lane) Stream() Stream { return l.stream }

// DeliveryRate is what the path carries for this lane, in bytes per second, where
// the stream knows it (its DeliveryRate says), else 0.
func (l *Lane) DeliveryRate() float64 {
	if r, ok := l.stream.(interface{ DeliveryRate() float64 }); ok {
		return r.DeliveryRate()
	}
	return 0
}

// Remote is the address of the other end's host, where the stream knows it (its
// Remote says), else the zero Addr.
func (l *Lane) Remote() netip.Addr {
	if r, ok := l.stream.(interface{ Remote() netip.Addr }); ok {
		return r.Remote()
	}
	return netip.Addr{}
}

// OnWire is what n bytes of a batch become on the network, where the stream knows
// it (its OnWire says), else n.
func (l *Lane) OnWire(n int) int {
	if w, ok := l.stream.(interface{ OnWire(int) int }); ok {
		return w.OnWire(n)
	}
	return n
}

// Close ends the lane. Calls in progress return ErrClosed.
func (l *Lane) Close() error {
	l.closeOnce.Do(func() { close(l.done) })
	return l.stream.Close()
}

// Stats is a snapshot of the lane's counters.
func (l *Lane) Stats() transport.Stats {
	s, r := l.stream.Counters()
	return transport.Stats{
		BytesSent: s, BytesReceived: r,
		FramesSent: l.framesSent.Load(), FramesReceived: l.framesReceived.Load(),
	}
}

func (l *Lane) closed() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// failure is the error that the caller sees for err.
func (l *Lane) failure(op string, err error) error {
	switch {
	case l.closed():
		return fmt.Errorf("%s on %s lane %d: %w", op, l.id.Kind, l.id.Index, transport.ErrClosed)
	case errors.Is(err, wire.ErrMalformed):
		err = fmt.Errorf("%w: %w", transport.ErrDamaged, err)
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("%w: closed by the peer", transport.ErrPeer)
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("%w: closed by the peer in the middle of a frame", transport.ErrPeer)
	}
	return fmt.Errorf("%s on %s lane %d: %w", op, l.id.Kind, l.id.Index, err)
}
