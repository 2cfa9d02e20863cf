package rdma

import (
	"fmt"
	"io"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

func bufferAddr(b *transport.Buffer) uint64 { return uint64(sys.Address(b.Bytes()[:1:1])) }

// usePool registers p for the lane, unless it is.
func (l *Lane) usePool(p *transport.Pool) error {
	l.mu.Lock()
	known, ended := p == nil || l.keys[p] != nil, l.err != nil
	l.mu.Unlock()
	if known || ended {
		return nil
	}
	r, err := l.dev.use(p)
	if err != nil {
		return err
	}
	l.mu.Lock()
	if l.keys != nil && l.keys[p] == nil {
		l.keys[p] = r
		l.mu.Unlock()
		return nil
	}
	l.mu.Unlock()
	return l.dev.drop(p) // the lane has ended meanwhile
}

// Send writes frames as one batch. See transport.Lane. A frame beyond the limits
// of the wire is refused before anything of the batch is sent, and the lane stays
// usable; after any other error it is not.
func (l *Lane) Send(frames ...transport.Frame) error {
	n, err := l.send(frames)
	for i := range frames[n:] {
		frames[n+i].Payload.Release()
	}
	return err
}

// send returns how many of the frames' payloads are not the caller's any more.
func (l *Lane) send(frames []transport.Frame) (n int, err error) {
	for i := range frames {
		f := &frames[i]
		if len(f.Meta) > wire.MaxMeta || payloadLen(f) > wire.MaxPayload {
			return 0, fmt.Errorf("send on RDMA %s lane %d: %s frame of %d bytes of meta and %d of payload, the limits are %d and %d",
				l.id.Kind, l.id.Index, f.Type, len(f.Meta), payloadLen(f), wire.MaxMeta, wire.MaxPayload)
		}
		if payloadLen(f) > inlinePayload {
			if err := l.usePool(f.Payload.Pool()); err != nil {
				return 0, fmt.Errorf("send on RDMA %s lane %d: %w", l.id.Kind, l.id.Index, err)
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	w := writer{l: l}
	var head [wire.HeaderSize]byte
	for n < len(frames) {
		f := &frames[n]
		size := payloadLen(f)
		w.write(wire.AppendHeader(head[:0], wire.Header{Type: f.Type, Flags: f.Flags, PayloadLen: uint32(size), Seq: l.frameSeq}, f.Meta))
		w.write(f.Meta)
		if size > inlinePayload {
			if w.refer(f.Payload) {
				n++ // the lane's from here on
			}
		} else {
			if size > 0 && (w.b != nil || w.begin()) {
				w.in++
				w.write(f.Payload.Bytes())
			}
			if w.err == nil {
				f.Payload.Release()
				n++
			}
		}
		if w.err != nil {
			return n, l.failure("send", w.err)
		}
		l.frameSeq++
		l.stats.FramesSent++
	}
	if w.finish(); w.err != nil {
		return n, l.failure("send", w.err)
	}
	return n, nil
}

// writer puts bytes of the stream into chunks. l.mu is held by whoever uses it,
// and let go of while it waits; no chunk is half full then.
type writer struct {
	l   *Lane
	b   []byte // the slot that is being filled, or nil
	n   int    // bytes of data in it
	in  int    // payloads that begin there
	err error
}

// begin takes a slot and a credit for a chunk.
func (w *writer) begin() bool {
	return w.wait(func() bool { return w.l.credits > 0 && w.l.slotFree() }) && func() bool {
		w.l.credits--
		w.b, w.n, w.in = w.l.slot(), 0, 0
		return true
	}()
}

// wait waits for ready, after posting what there is.
func (w *writer) wait(ready func() bool) bool {
	l := w.l
	for w.err == nil {
		switch {
		case l.closed:
			w.err = transport.ErrClosed
		case l.err != nil:
			w.err = l.err
		case l.ended:
			w.err = io.EOF
		case ready():
			return true
		case l.progress() == 0:
			l.flush()
			if l.err == nil {
				l.block(l.sendCond)
			}
		}
	}
	return false
}

func (w *writer) write(p []byte) {
	for len(p) > 0 && w.err == nil {
		if w.b == nil && !w.begin() {
			return
		}
		k := copy(w.b[prefixSize+w.n:w.l.chunkSize], p)
		p = p[k:]
		if w.n += k; prefixSize+w.n == w.l.chunkSize {
			w.end(0, reference{})
		}
	}
}

// end posts the chunk that is being filled.
func (w *writer) end(flags uint16, r reference) {
	w.l.post(w.b, w.n, w.in, flags, r)
	w.b = nil
}

// refer puts a reference to b in place of its bytes. It returns whether b is the
// lane's from now on.
func (w *writer) refer(b *transport.Buffer) bool {
	l := w.l
	limit := l.maxRefs
	if p := b.Pool(); p == l.cfg.Pool {
		// If both ends lent all of the pool that they receive into, neither could
		// ever fetch what the other has.
		limit = min(limit, max(1, p.Buffers()/2-1))
	}
	full := len(l.refs) >= limit
	if w.b != nil && (full || prefixSize+w.n+referenceSize > l.chunkSize) {
		w.end(0, reference{})
	}
	if full && !w.wait(func() bool { return len(l.refs) < limit }) {
		return false
	}
	if w.err != nil || w.b == nil && !w.begin() {
		return false
	}
	l.refs = append(l.refs, b)
	w.end(flagReference, reference{bufferAddr(b), l.keys[b.Pool()].RKey, uint32(b.Len())})
	return true
}

// finish posts what is left.
func (w *writer) finish() {
	if w.b != nil {
		w.end(0, reference{})
	}
	w.l.flush()
	if w.err == nil {
		w.err = w.l.err
	}
}

func payloadLen(f *transport.Frame) int {
	if f.Payload == nil {
		return 0
	}
	return f.Payload.Len()
}
