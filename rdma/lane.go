package rdma

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/rdma/verbs"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Lane is a transport.Lane and a transport.RemoteReader over two queue pairs.
type Lane struct {
	id         transport.LaneID
	dev        *Device
	cfg        Config
	over       transport.Lane // the companion
	offered    atomic.Pointer[transport.Remotes]
	done       chan struct{} // closed when the lane has ended, for whatever reason
	engineDone chan struct{}
	watchDone  chan struct{}
	closeOnce  sync.Once
	started    bool // the goroutines run

	ring     []byte // receive slots, then send slots
	ringAddr uint64
	ringMR   *verbs.Region
	cq       *verbs.CQ
	qp       *verbs.QP // of SENDs
	// readQP has the READs. Behind a READ that waits until the device may start it
	// all of its queue waits. And rxe takes the answers to requests of the two kinds for
	// each other's when packets are lost (up to Linux 6.12 at least).
	readQP *verbs.QP

	mu sync.Mutex
	// recvCond wakes Recv and ReadRemote, sendCond Send and Close.
	recvCond, sendCond *sync.Cond
	err                error // why the lane ended; the queue pair is not used any more
	closed             bool  // by this end
	ended              bool  // the peer said goodbye
	stats              transport.Stats
	keys               map[*transport.Pool]*verbs.Region // pools in use
	wc                 [64]verbs.Completion
	sends, asks, recvs []verbs.WorkRequest // to be posted; asks are READs

	// See engine.
	kick    chan struct{}
	polled  bool // somebody polled since the engine looked
	blocked int  // how many sleep
	ticking bool // the engine did not arm

	// Sending. Chunks are counted from 0; slot n%sendSlots has chunk n.
	chunkSize      int // bytes that the peer takes at a time
	posted, sent   uint64
	credits        int
	refs           []*transport.Buffer // that the peer has not fetched, oldest first
	maxRefs        int
	frameSeq       uint64
	owedCredits    int // slots of data chunks that were reposted and not told
	owedPulls      int // references that were fetched and not told
	goodbyeSent    bool
	goodbyeArrived bool

	// Receiving.
	items []item
	// pulls has the payloads that no buffer was found for, oldest first: references
	// in items, and nil for one in the stream. Buffers are taken in that order: one
	// that waits behind a payload without could never be given back.
	pulls     []*pull
	reads     [allReads]*pull
	freeReads []int
	recvSpin  spin // Recv's
	readSpin  spin // ReadRemote's

	// Recv's own.
	recvSeq uint64
	recvErr error
	buf     []byte
}

// item is what is left of a chunk that was received.
type item struct {
	slot int
	data []byte
	ref  *pull
}

// pull is a READ: of a payload that a reference stands for, or of ReadRemote.
type pull struct {
	ref     reference
	buf     *transport.Buffer
	posted  bool
	fetched bool
	remote  bool // of ReadRemote
}

// ID is the lane's identity.
func (l *Lane) ID() transport.LaneID { return l.id }

// Stats is a snapshot. Bytes are those of the chunks and payloads, without the
// headers of packets.
func (l *Lane) Stats() transport.Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// fail ends the lane, for the first reason that is given. The engine takes it apart.
func (l *Lane) fail(err error) {
	if l.err != nil {
		return
	}
	l.err = err
	close(l.done)
	l.recvCond.Broadcast()
	l.sendCond.Broadcast()
	l.cq.StopWaiting()
}

// Close says goodbye after what was sent, if the peer takes it within Linger, and
// gives everything back. Calls in progress return ErrClosed at once.
func (l *Lane) Close() error {
	l.closeOnce.Do(func() {
		l.mu.Lock()
		l.closed = true
		l.recvCond.Broadcast()
		l.sendCond.Broadcast()
		l.linger()
		l.fail(transport.ErrClosed)
		l.mu.Unlock()
		<-l.engineDone
		<-l.watchDone
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, it := range l.items {
			if it.ref != nil {
				it.ref.buf.Release()
			}
		}
		l.items = nil
		_ = unix.Munmap(l.ring) // cannot fail: it is ours
		l.ring = nil
	})
	return nil
}

// linger waits until the peer has fetched what was sent, says goodbye, and waits
// for that to arrive.
func (l *Lane) linger() {
	late := false
	t := time.AfterFunc(l.cfg.Linger, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		late = true
		l.sendCond.Broadcast()
	})
	defer t.Stop()
	for len(l.refs) > 0 && l.err == nil && !l.ended && !late {
		l.block(l.sendCond)
	}
	l.flush()
	for !l.goodbyeArrived && l.err == nil && !l.ended && !late {
		if !l.goodbyeSent && l.slotFree() {
			l.goodbyeSent = true
			l.post(l.slot(), 0, 0, flagGoodbye, reference{})
			l.flush()
			continue
		}
		l.block(l.sendCond)
	}
}

// grace is how long READs may still be answered when the companion lane has ended.
const grace = 50 * time.Millisecond

// watch ends the lane with the companion lane.
func (l *Lane) watch() {
	defer close(l.watchDone)
	err := l.offers()
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.progress() > 0 { // what came before the end
	}
	// A READ that the peer's device refused ends the peer's lane, too. Give the
	// refusal, which says more, time to arrive.
	for end := time.Now().Add(grace); !l.ended && l.err == nil && len(l.freeReads) < allReads && time.Now().Before(end); {
		l.mu.Unlock()
		time.Sleep(time.Millisecond)
		l.mu.Lock()
		l.progress()
	}
	switch {
	case l.ended:
		err = fmt.Errorf("%w: closed by the peer", transport.ErrPeer)
	case !errors.Is(err, transport.ErrPeer) && !errors.Is(err, transport.ErrDamaged):
		err = fmt.Errorf("%w: %w", transport.ErrPeer, err)
	}
	l.fail(err)
}

// discard gives back what newLane made. Nobody uses the queue pair any more.
func (l *Lane) discard() {
	for _, qp := range []*verbs.QP{l.qp, l.readQP} {
		if qp != nil {
			_ = qp.Close() // fails only if the device is gone, which is all that is asked for
		}
	}
	if l.cq != nil {
		_ = l.cq.Close()
	}
	l.mu.Lock()
	refs, keys := l.refs, l.keys
	l.refs, l.keys = nil, nil
	for i, p := range l.reads {
		if p != nil && !p.remote { // ReadRemote's is its caller's
			p.buf.Release()
			p.buf = nil
		}
		l.reads[i] = nil
	}
	l.recvCond.Broadcast()
	l.sendCond.Broadcast()
	l.mu.Unlock()
	for _, b := range refs {
		b.Release()
	}
	if l.ringMR != nil {
		_ = l.ringMR.Close()
	}
	for p := range keys {
		_ = l.dev.drop(p)
	}
	l.dev.leave(l)
	if !l.started && l.ring != nil { // else Recv may still read it: Close unmaps it
		_ = unix.Munmap(l.ring)
		l.ring = nil
	}
}

// failure is the error that a caller sees.
func (l *Lane) failure(op string, err error) error {
	switch {
	case l.closed:
		err = transport.ErrClosed
	case errors.Is(err, wire.ErrMalformed):
		err = fmt.Errorf("%w: %w", transport.ErrDamaged, err)
	case errors.Is(err, io.EOF):
		err = fmt.Errorf("%w: closed by the peer", transport.ErrPeer)
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = fmt.Errorf("%w: closed by the peer in the middle of a frame", transport.ErrPeer)
	}
	return fmt.Errorf("%s on RDMA %s lane %d: %w", op, l.id.Kind, l.id.Index, err)
}
