package framed

import (
	"errors"
	"fmt"
	"io"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Recv waits for the next frame. See transport.Lane. After a damaged frame the
// stream is closed in both directions: nothing after it can be trusted.
func (l *Lane) Recv() (transport.Frame, error) {
	if l.recvErr == nil && !l.closed() {
		f, err := l.recv()
		if err == nil {
			l.framesReceived.Add(1)
			return f, nil
		}
		l.recvErr = err
		if errors.Is(err, transport.ErrDamaged) || errors.Is(err, wire.ErrMalformed) {
			_ = l.stream.Close()
		}
	}
	return transport.Frame{}, l.failure("receive", l.recvErr)
}

func (l *Lane) recv() (f transport.Frame, err error) {
	raw, err := l.peek(wire.HeaderSize)
	if err != nil {
		return f, err
	}
	h, err := wire.ParseHeader(raw)
	if err != nil {
		return f, err
	}
	n := wire.HeaderSize + int(h.MetaLen)
	if raw, err = l.peek(n); err != nil {
		return f, err
	}
	if err := wire.CheckMeta(raw, raw[wire.HeaderSize:]); err != nil {
		return f, err
	}
	if h.Seq != l.recvSeq {
		return f, fmt.Errorf("%w: frame %d came where frame %d was due", transport.ErrDamaged, h.Seq, l.recvSeq)
	}
	l.recvSeq++
	l.r += n
	f = transport.Frame{Type: h.Type, Flags: h.Flags, Meta: raw[wire.HeaderSize:n:n]}
	if h.PayloadLen > 0 {
		f.Payload, err = l.payload(int(h.PayloadLen))
	}
	return f, err
}

// payload reads n bytes into a buffer of the pool, waiting for a free one: that
// is what holds up a sender that is faster than the receiver.
func (l *Lane) payload(n int) (*transport.Buffer, error) {
	if l.pool == nil || n > l.pool.BufferSize() {
		room := 0
		if l.pool != nil {
			room = l.pool.BufferSize()
		}
		return nil, fmt.Errorf("%w: payload of %d bytes on a lane that takes %d", transport.ErrDamaged, n, room)
	}
	b := l.pool.Get(n, l.done)
	if b == nil {
		return nil, transport.ErrClosed
	}
	p := b.Bytes()
	k := copy(p, l.buf[l.r:l.w])
	l.r += k
	if k < n {
		if err := l.stream.ReadFull(p[k:]); err != nil {
			b.Release()
			return nil, midFrame(err)
		}
	}
	return b, nil
}

// peek returns the next n bytes without taking them. They stay where they are
// until the next peek.
func (l *Lane) peek(n int) ([]byte, error) {
	for l.w-l.r < n {
		if l.r > 0 {
			l.w = copy(l.buf, l.buf[l.r:l.w])
			l.r = 0
		}
		if n > len(l.buf) {
			l.buf = append(l.buf, make([]byte, n+readAhead-len(l.buf))...)
		}
		k, err := l.stream.Read(l.buf[l.w:])
		l.w += k
		if err != nil && l.w-l.r < n {
			if l.w > l.r {
				err = midFrame(err)
			}
			return nil, err
		}
	}
	return l.buf[l.r : l.r+n : l.r+n], nil
}

func midFrame(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
