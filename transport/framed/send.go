package framed

import (
	"fmt"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// Send writes frames as one batch. See transport.Lane. A frame beyond the
// limits of the wire is refused before anything of the batch is written, and
// the lane stays usable; after any other error it is not.
func (l *Lane) Send(frames ...transport.Frame) error {
	err := l.send(frames)
	for i := range frames {
		frames[i].Payload.Release()
	}
	return err
}

func (l *Lane) send(frames []transport.Frame) error {
	if l.sendErr != nil || l.closed() {
		return l.failure("send", l.sendErr)
	}
	need := 0
	for i := range frames {
		f := &frames[i]
		if len(f.Meta) > wire.MaxMeta || payloadLen(f) > wire.MaxPayload {
			return fmt.Errorf("send on %s lane %d: %s frame of %d bytes of meta and %d of payload, the limits are %d and %d",
				l.id.Kind, l.id.Index, f.Type, len(f.Meta), payloadLen(f), wire.MaxMeta, wire.MaxPayload)
		}
		need += wire.HeaderSize
		if len(f.Meta) <= smallMeta {
			need += len(f.Meta)
		}
	}
	if cap(l.scratch) < need { // must not move once bufs points into it
		l.scratch = make([]byte, 0, need)
	}
	l.gather(frames)
	err := l.stream.Write(l.bufs)
	clear(l.bufs[:cap(l.bufs)]) // keep no payload or meta alive
	if err != nil {
		l.sendErr = err
		return l.failure("send", err)
	}
	l.framesSent.Add(uint64(len(frames)))
	return nil
}

// gather fills bufs with the encoding of frames: headers and small metas from
// scratch, in pieces as large as they come, everything else from where it is.
func (l *Lane) gather(frames []transport.Frame) {
	scratch, bufs, from := l.scratch[:0], l.bufs[:0], 0
	flush := func() {
		if len(scratch) > from {
			bufs = append(bufs, scratch[from:len(scratch):len(scratch)])
			from = len(scratch)
		}
	}
	for i := range frames {
		f := &frames[i]
		scratch = wire.AppendHeader(scratch, wire.Header{
			Type: f.Type, Flags: f.Flags, PayloadLen: uint32(payloadLen(f)), Seq: l.sendSeq,
		}, f.Meta)
		l.sendSeq++
		if len(f.Meta) <= smallMeta {
			scratch = append(scratch, f.Meta...)
		} else {
			flush()
			bufs = append(bufs, f.Meta)
		}
		if payloadLen(f) > 0 {
			flush()
			bufs = append(bufs, f.Payload.Bytes())
		}
	}
	flush()
	l.scratch, l.bufs = scratch, bufs
}

func payloadLen(f *transport.Frame) int {
	if f.Payload == nil {
		return 0
	}
	return f.Payload.Len()
}
