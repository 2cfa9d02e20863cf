package rdma

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// What an end offers to be read goes over the companion lane, which nobody else can
// write to, in messages of this form, little-endian:
//
//	0  "PGFM"
//	4  u32  more: 1 where another message of the same offer follows
//	8  for each: u32 space, u32 key, u64 first byte, u64 end
const (
	offeredHead = 8
	offeredSize = 24
	// mostOffered bounds what an end keeps of a peer's offer.
	mostOffered = 1 << 20
)

var offeredMagic = [4]byte{'P', 'G', 'F', 'M'}

// Offer tells the peer what it may read with ReadRemote. See transport.RemoteOfferer.
func (l *Lane) Offer(rs []transport.Remote) error {
	if len(rs) > mostOffered {
		return fmt.Errorf("offer on RDMA %s lane %d: %d ranges, a peer takes %d", l.id.Kind, l.id.Index, len(rs), mostOffered)
	}
	const each = (wire.MaxMeta - offeredHead) / offeredSize
	for {
		n := min(len(rs), each)
		if err := l.over.Send(transport.Frame{Type: wire.TypeMessage, Meta: appendOffered(nil, rs[:n], n < len(rs))}); err != nil {
			return fmt.Errorf("offer on RDMA %s lane %d: %w", l.id.Kind, l.id.Index, err)
		}
		if rs = rs[n:]; len(rs) == 0 {
			return nil
		}
	}
}

// Offered is what the peer offered, when all of it has come.
func (l *Lane) Offered() *transport.Remotes { return l.offered.Load() }

// offers receives on the companion lane until that ends, and returns why.
func (l *Lane) offers() error {
	var all []transport.Remote
	for {
		f, err := l.over.Recv()
		if err != nil {
			return err
		}
		f.Payload.Release()
		if f.Type != wire.TypeMessage {
			return fmt.Errorf("%w: %s on the companion of an RDMA lane", transport.ErrDamaged, f.Type)
		}
		var more bool
		if all, more, err = parseOffered(all, f.Meta); err != nil {
			return err
		}
		if more {
			continue
		}
		set, err := transport.NewRemotes(all)
		if err != nil {
			return err
		}
		if !l.offered.CompareAndSwap(nil, set) {
			return fmt.Errorf("%w: a second offer of memory", transport.ErrDamaged)
		}
		all = nil
	}
}

func appendOffered(b []byte, rs []transport.Remote, more bool) []byte {
	b = append(b, offeredMagic[:]...)
	m := uint32(0)
	if more {
		m = 1
	}
	b = binary.LittleEndian.AppendUint32(b, m)
	for _, r := range rs {
		b = binary.LittleEndian.AppendUint32(b, uint32(r.Space))
		b = binary.LittleEndian.AppendUint32(b, r.Key)
		b = binary.LittleEndian.AppendUint64(b, uint64(r.Range.Start))
		b = binary.LittleEndian.AppendUint64(b, uint64(r.Range.End))
	}
	return b
}

// parseOffered appends what is in a message.
func parseOffered(all []transport.Remote, b []byte) (_ []transport.Remote, more bool, err error) {
	if len(b) < offeredHead || [4]byte(b[:4]) != offeredMagic || (len(b)-offeredHead)%offeredSize != 0 || binary.LittleEndian.Uint32(b[4:]) > 1 {
		return nil, false, fmt.Errorf("%w: no offer of memory in %d bytes", transport.ErrDamaged, len(b))
	}
	more = binary.LittleEndian.Uint32(b[4:]) == 1
	for b = b[offeredHead:]; len(b) > 0; b = b[offeredSize:] {
		all = append(all, transport.Remote{
			Space: page.Space(binary.LittleEndian.Uint32(b)), Key: binary.LittleEndian.Uint32(b[4:]),
			Range: page.Range{Start: page.Addr(binary.LittleEndian.Uint64(b[8:])), End: page.Addr(binary.LittleEndian.Uint64(b[16:]))},
		})
	}
	if len(all) > mostOffered {
		return nil, false, fmt.Errorf("%w: more than %d ranges of memory offered", transport.ErrDamaged, mostOffered)
	}
	return all, more, nil
}
