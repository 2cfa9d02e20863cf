package rdma

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Recv waits for the next frame. See transport.Lane. After a damaged frame the
// lane is closed in both directions: nothing after it can be trusted.
func (l *Lane) Recv() (transport.Frame, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.recvErr == nil && !l.closed {
		f, err := l.recv()
		if err == nil {
			l.stats.FramesReceived++
			return f, nil
		}
		f.Payload.Release()
		l.recvErr = err
		if errors.Is(err, transport.ErrDamaged) || errors.Is(err, wire.ErrMalformed) {
			l.fail(err)
		}
	}
	return transport.Frame{}, l.failure("receive", l.recvErr)
}

func (l *Lane) recv() (f transport.Frame, err error) {
	l.buf = l.buf[:0]
	if err := l.fill(wire.HeaderSize); err != nil {
		return f, err
	}
	h, err := wire.ParseHeader(l.buf)
	if err != nil {
		return f, err
	}
	if err := l.fill(wire.HeaderSize + int(h.MetaLen)); err != nil {
		return f, midFrame(err)
	}
	if err := wire.CheckMeta(l.buf, l.buf[wire.HeaderSize:]); err != nil {
		return f, err
	}
	if h.Seq != l.recvSeq {
		return f, fmt.Errorf("%w: frame %d came where frame %d was due", transport.ErrDamaged, h.Seq, l.recvSeq)
	}
	l.recvSeq++
	if h.PayloadLen > 0 {
		if f.Payload, err = l.payload(int(h.PayloadLen)); err != nil {
			return f, midFrame(err)
		}
	}
	f.Type, f.Flags, f.Meta = h.Type, h.Flags, l.buf[wire.HeaderSize:len(l.buf):len(l.buf)]
	return f, nil
}

func midFrame(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// fill appends bytes of the stream to buf until it has n.
func (l *Lane) fill(n int) error {
	for len(l.buf) < n {
		it, err := l.next()
		if err != nil {
			if len(l.buf) > 0 {
				err = midFrame(err)
			}
			return err
		}
		if len(it.data) == 0 {
			return fmt.Errorf("%w: a payload where the rest of a header or meta was due", transport.ErrDamaged)
		}
		k := min(n-len(l.buf), len(it.data))
		l.buf = append(l.buf, it.data[:k]...)
		it.data = it.data[k:]
		l.consumed()
	}
	return nil
}

// next waits for the item that the stream goes on with.
func (l *Lane) next() (*item, error) {
	err := l.sleep(&l.recvSpin, func() bool { return len(l.items) > 0 || l.ended })
	switch {
	case err != nil:
		return nil, err
	case len(l.items) == 0: // the goodbye comes last
		return nil, io.EOF
	}
	return &l.items[0], nil
}

// consumed drops the first item if nothing is left of it, which frees its slot.
func (l *Lane) consumed() {
	it := l.items[0]
	if len(it.data) > 0 || it.ref != nil {
		return
	}
	l.items = l.items[:copy(l.items, l.items[1:])]
	if l.err != nil {
		return
	}
	l.repost(it.slot)
	if l.owedCredits++; l.owedCredits >= dataSlots/2 {
		l.flush()
	}
}

// pollSlice is how long somebody polls before others get at the lane. There is no
// runtime.Gosched in between: it wakes idle processors, which soft-RoCE needs itself.
const pollSlice = 50 * time.Microsecond

// sleep waits for ready, polling for a while before it sleeps. It returns nil, or
// why that can never be.
func (l *Lane) sleep(s *spin, ready func() bool) error {
	var since time.Time
	slept := false
	defer func() {
		if slept {
			s.waited(time.Since(since))
		}
	}()
	for {
		switch {
		case l.closed:
			return transport.ErrClosed
		case ready():
			return nil
		case l.err != nil:
			return l.err
		case l.progress() > 0 || l.err != nil:
			continue
		}
		if since.IsZero() {
			since = time.Now()
		}
		if !slept && time.Since(since) < s.now {
			l.polled = true
			l.progressWithin(min(pollSlice, s.now))
			l.mu.Unlock()
			l.mu.Lock()
			continue
		}
		slept = true
		l.block(l.recvCond)
	}
}

// payload returns the next n bytes of the stream in a buffer of the pool, waiting
// for a free one: that is what holds up a sender that is faster than the receiver.
func (l *Lane) payload(n int) (*transport.Buffer, error) {
	if l.cfg.Pool == nil || n > l.cfg.Pool.BufferSize() {
		return nil, fmt.Errorf("%w: payload of %d bytes, there is no room for it", transport.ErrDamaged, n)
	}
	it, err := l.next()
	if err != nil {
		return nil, err
	}
	if len(it.data) > 0 {
		return l.copied(n)
	}
	if int(it.ref.ref.len) != n {
		return nil, fmt.Errorf("%w: payload of %d bytes, %d were announced", transport.ErrDamaged, it.ref.ref.len, n)
	}
	return l.fetched(it.ref, n)
}

// buffer waits for a buffer of the pool.
func (l *Lane) buffer(n int) (*transport.Buffer, error) {
	b := l.cfg.Pool.Get(n, never)
	if b != nil {
		return b, nil
	}
	l.mu.Unlock()
	b = l.cfg.Pool.Get(n, l.done)
	l.mu.Lock()
	if b == nil {
		return nil, l.err
	}
	return b, nil
}

// copied takes a payload that came in the stream itself.
func (l *Lane) copied(n int) (*transport.Buffer, error) {
	if len(l.pulls) == 0 || l.pulls[0] != nil { // all before it have their buffers
		return nil, fmt.Errorf("%w: a payload of %d bytes in a chunk that has none", transport.ErrDamaged, n)
	}
	b, err := l.buffer(n)
	if err != nil {
		return nil, err
	}
	l.served()
	l.flush() // for those behind it
	for p := b.Bytes(); len(p) > 0; {
		it, err := l.next()
		if err == nil && len(it.data) == 0 {
			err = fmt.Errorf("%w: a payload within a payload", transport.ErrDamaged)
		}
		if err != nil {
			b.Release()
			return nil, err
		}
		k := copy(p, it.data)
		p, it.data = p[k:], it.data[k:]
		l.consumed()
	}
	return b, nil
}

// fetched waits for the READ of the first item's payload.
func (l *Lane) fetched(p *pull, n int) (*transport.Buffer, error) {
	if err := l.sleep(&l.recvSpin, func() bool { return p.posted || len(l.freeReads) > 0 }); err != nil {
		return nil, err
	}
	if !p.posted {
		b, err := l.buffer(n)
		if err != nil {
			return nil, err
		}
		switch {
		case p.posted || l.err != nil: // meanwhile
			b.Release()
		case len(l.freeReads) == 0: // ReadRemote was quicker: try again
			b.Release()
			return l.fetched(p, n)
		default:
			l.fetch(b) // p, as all before it were
			l.flush()
		}
	}
	if err := l.sleep(&l.recvSpin, func() bool { return p.fetched }); err != nil {
		return nil, err
	}
	b := p.buf
	p.buf, l.items[0].ref = nil, nil
	l.consumed()
	l.flush() // a place for the next
	return b, nil
}

// ReadRemote reads into.Len() bytes at remote, an address in the peer's memory that
// it registered under key, into a buffer whose pool then stays in use by the lane. ctx
// is only looked at before the READ is posted: until it is over the device may
// write to the buffer. A key, address or length that the peer did not register ends the lane with
// an error that wraps ErrRemoteMemory. Safe for concurrent use.
func (l *Lane) ReadRemote(ctx context.Context, key uint32, remote uint64, into *transport.Buffer) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if into.Len() == 0 {
		return nil
	}
	if err := l.usePool(into.Pool()); err != nil {
		return fmt.Errorf("read on RDMA %s lane %d: %w", l.id.Kind, l.id.Index, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.sleep(&l.readSpin, func() bool { return len(l.freeReads) > 0 && l.err == nil })
	if err != nil {
		return l.failure("read", err)
	}
	p := &pull{ref: reference{remote, key, uint32(into.Len())}, remote: true}
	l.read(p, into)
	l.flush()
	for {
		err = l.sleep(&l.readSpin, func() bool { return p.fetched })
		if err == nil || l.keys == nil { // fetched, or the queue pair is gone and with it the READ
			break
		}
		l.recvCond.Wait()
	}
	if err != nil {
		return l.failure("read", err)
	}
	return nil
}
