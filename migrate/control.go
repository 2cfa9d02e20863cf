package migrate

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"sync"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// ErrStalled: nothing was heard from the peer for Timeouts.Peer.
var ErrStalled = errors.New("migrate: the peer is silent")

// received is a message with the blobs that followed it.
type received struct {
	msg   message
	blobs [][]byte
	at    time.Time // when it was whole
}

// maxUnread is how many messages may wait for the state machine, which reads
// them all the time: a peer that sends more is no peer.
const maxUnread = 256

// control is one connection of the control lane. It owns the lane and three
// goroutines: one that reads and puts messages together, one that pings and
// answers pings (so that the reader never blocks in a Send), and whoever sends.
// Any frame that arrives is a sign of life; without one for the peer timeout
// the connection is closed.
type control struct {
	lane    transport.Lane
	peer    transport.Peer
	hello   Hello // of the other side
	log     *slog.Logger
	timeout time.Duration

	ctx    context.Context // done when the connection is; its cause says why
	cancel context.CancelCauseFunc
	in     chan received
	pong   chan struct{}
	dog    *time.Timer
	wg     sync.WaitGroup

	sendMu sync.Mutex // a lane has one sender at a time
	pool   *transport.Pool
}

// newControl takes ownership of lane.
func newControl(lane transport.Lane, peer transport.Peer, timeout time.Duration, log *slog.Logger) *control {
	c := &control{
		lane: lane, peer: peer, log: log, timeout: timeout,
		in: make(chan received, maxUnread), pong: make(chan struct{}, 1),
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.dog = time.AfterFunc(timeout, func() {
		c.fail(fmt.Errorf("%w for %v", ErrStalled, timeout))
	})
	c.wg.Add(2)
	go c.read()
	go c.ping()
	return c
}

// fail ends the connection; the first cause stays.
func (c *control) fail(err error) {
	c.cancel(err)
	c.lane.Close()
}

// close ends the connection and returns when its goroutines have ended.
func (c *control) close() {
	if c == nil {
		return
	}
	c.fail(transport.ErrClosed)
	c.dog.Stop()
	c.wg.Wait()
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if c.pool != nil {
		if err := c.pool.Close(); err != nil {
			c.log.Error("control lane kept buffers", "err", err)
		}
		c.pool = nil
	}
}

// err is why the connection ended, nil while it has not.
func (c *control) err() error { return context.Cause(c.ctx) }

func (c *control) read() {
	defer c.wg.Done()
	var as assembly
	for {
		f, err := c.lane.Recv()
		if err != nil {
			c.fail(err)
			return
		}
		c.dog.Reset(c.timeout)
		r, err := as.frame(f)
		f.Payload.Release()
		if err != nil {
			c.fail(err)
			return
		}
		switch r.msg.(type) {
		case nil:
		case *pingMsg:
			select {
			case c.pong <- struct{}{}:
			default: // one answer answers both
			}
		case *pongMsg:
		default:
			r.at = time.Now()
			select {
			case c.in <- r:
			default:
				c.fail(fmt.Errorf("%w: %d messages unread", ErrProtocol, maxUnread))
				return
			}
		}
	}
}

func (c *control) ping() {
	defer c.wg.Done()
	tick := time.NewTicker(c.timeout / 4)
	defer tick.Stop()
	for {
		var m message = pingMsg{}
		select {
		case <-tick.C:
		case <-c.pong:
			m = pongMsg{}
		case <-c.ctx.Done():
			return
		}
		if err := c.send(m); err != nil {
			return
		}
	}
}

// send writes a message, and the blobs that belong to it.
func (c *control) send(m message, blobs ...[]byte) error {
	meta, blobs, err := encodeMessage(m, blobs)
	if err != nil {
		return err
	}
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	frames := []transport.Frame{{Type: wire.TypeMessage, Meta: meta}}
	flush := func() error {
		err := c.lane.Send(frames...)
		frames = nil // the lane may still look at the old ones
		if err != nil {
			c.fail(err)
			if cause := c.err(); cause != nil {
				err = cause
			}
			return fmt.Errorf("send %v: %w", m.kind(), err)
		}
		return nil
	}
	for _, b := range blobs {
		for off := 0; off < len(b); off += blobPiece {
			piece := b[off:min(off+blobPiece, len(b))]
			buf, err := c.buffer(len(piece))
			if err != nil {
				return errors.Join(fmt.Errorf("send %v: %w", m.kind(), err), release(frames))
			}
			copy(buf.Bytes(), piece)
			pm, err := encMode.Marshal(pieceMeta{Offset: uint64(off), CRC: crc32.Checksum(piece, castagnoli)})
			if err != nil {
				buf.Release()
				return errors.Join(fmt.Errorf("send %v: %w", m.kind(), err), release(frames))
			}
			frames = append(frames, transport.Frame{Type: wire.TypeBlob, Meta: pm, Payload: buf})
			if len(frames) >= poolBuffers { // the pool's all
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if len(frames) == 0 {
		return nil
	}
	return flush()
}

const poolBuffers = 4

// buffer takes one from the pool, which is made for the first. Caller holds
// sendMu.
func (c *control) buffer(n int) (*transport.Buffer, error) {
	if c.pool == nil {
		var err error
		if c.pool, err = transport.NewPool(poolBuffers, blobPiece); err != nil {
			return nil, err
		}
	}
	if b := c.pool.Get(n, c.ctx.Done()); b != nil {
		return b, nil
	}
	return nil, c.err()
}

func release(fs []transport.Frame) error {
	for _, f := range fs {
		f.Payload.Release()
	}
	return nil
}

// recv waits for the next message. What arrived before the connection ended is
// still given out.
func (c *control) recv(ctx context.Context) (received, error) {
	select {
	case r := <-c.in:
		return r, nil
	default:
	}
	var err error
	select {
	case r := <-c.in:
		return r, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-c.ctx.Done():
		err = c.err()
	}
	select {
	case r := <-c.in:
		return r, nil
	default:
		return received{}, err
	}
}

// recvIn is recv with a limit of its own.
func (c *control) recvIn(ctx context.Context, d time.Duration, what string) (received, error) {
	ctx, stop := context.WithTimeoutCause(ctx, d, fmt.Errorf("%w: no %s in %v", ErrStalled, what, d))
	defer stop()
	return c.recv(ctx)
}

// greet sends ours and waits for theirs. Whoever answers sees a version that it
// does not speak and says so.
func (c *control) greet(ctx context.Context, ours Hello, limit time.Duration) error {
	if err := c.send(ours); err != nil {
		return err
	}
	return c.hear(ctx, ours, limit)
}

// hear waits for the other side's HELLO and checks it against ours.
func (c *control) hear(ctx context.Context, ours Hello, limit time.Duration) error {
	r, err := c.recvIn(ctx, limit, "hello")
	if err != nil {
		return err
	}
	switch m := r.msg.(type) {
	case *Hello:
		c.hello = *m
	case *refuseMsg:
		return &Refusal{Reasons: m.Reasons}
	default:
		return unexpected(m, "hello")
	}
	if c.hello.Version != ours.Version {
		return fmt.Errorf("%w: %s speaks %d, this host %d", ErrVersion, c.hello.Host, c.hello.Version, ours.Version)
	}
	return nil
}

func unexpected(m message, want string) error {
	return fmt.Errorf("%w: %v where %s was expected", ErrProtocol, m.kind(), want)
}

// assembly puts frames of the control lane together to messages.
type assembly struct {
	env   *envelope // whose blobs are arriving
	blobs [][]byte
	crc   uint32 // of the last blob, so far
}

// frame takes the next frame; the result's msg is nil while a message is not
// whole.
func (a *assembly) frame(f transport.Frame) (received, error) {
	switch f.Type {
	case wire.TypeMessage:
		env, err := decodeEnvelope(f.Meta)
		if err != nil {
			return received{}, err
		}
		if a.env != nil {
			if env.Kind != kindPing && env.Kind != kindPong {
				return received{}, fmt.Errorf("%w: %v in the middle of %v", ErrProtocol, env.Kind, a.env.Kind)
			}
			m, err := decodeMessage(env, nil)
			return received{msg: m}, err
		}
		env.Body = append([]byte(nil), env.Body...) // Meta is valid until the next Recv
		a.env, a.blobs = &env, nil
		a.next()
	case wire.TypeBlob:
		if err := a.piece(f); err != nil {
			return received{}, err
		}
	default:
		return received{}, fmt.Errorf("%w: frame of type %d on the control lane", ErrProtocol, f.Type)
	}
	if a.env == nil || len(a.blobs) < len(a.env.Blobs) || !a.whole() {
		return received{}, nil
	}
	env, blobs := *a.env, a.blobs
	a.env, a.blobs = nil, nil
	m, err := decodeMessage(env, blobs)
	return received{msg: m, blobs: blobs}, err
}

// next begins the blob after the last whole one; empty ones are whole at once.
func (a *assembly) next() {
	for len(a.blobs) < len(a.env.Blobs) {
		n := a.env.Blobs[len(a.blobs)].Bytes
		a.blobs = append(a.blobs, make([]byte, 0, min(n, maxAllocate)))
		a.crc = 0
		if n > 0 {
			return
		}
	}
}

// whole reports whether the last blob begun is.
func (a *assembly) whole() bool {
	i := len(a.blobs) - 1
	return i < 0 || uint64(len(a.blobs[i])) == a.env.Blobs[i].Bytes
}

func (a *assembly) piece(f transport.Frame) error {
	if a.env == nil || len(a.blobs) == 0 || f.Payload == nil {
		return fmt.Errorf("%w: a piece of nothing", ErrProtocol)
	}
	var pm pieceMeta
	if err := decMode.Unmarshal(f.Meta, &pm); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	i := len(a.blobs) - 1
	info, b := a.env.Blobs[i], f.Payload.Bytes()
	have := uint64(len(a.blobs[i]))
	if pm.Offset != have || len(b) == 0 || len(b) > maxPiece || uint64(len(b)) > info.Bytes-have {
		return fmt.Errorf("%w: piece of %d bytes at %d, have %d of %d", ErrProtocol, len(b), pm.Offset, have, info.Bytes)
	}
	if crc32.Checksum(b, castagnoli) != pm.CRC {
		return fmt.Errorf("%w: piece of %v at %d", transport.ErrDamaged, a.env.Kind, pm.Offset)
	}
	a.crc = crc32.Update(a.crc, castagnoli, b)
	a.blobs[i] = append(a.blobs[i], b...)
	if uint64(len(a.blobs[i])) < info.Bytes {
		return nil
	}
	if a.crc != info.CRC {
		return fmt.Errorf("%w: %v of %d bytes", transport.ErrDamaged, a.env.Kind, info.Bytes)
	}
	a.next()
	return nil
}
