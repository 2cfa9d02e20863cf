package rdma

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/transport"
)

// A chunk is one SEND: a prefix, then the next bytes of the stream, then perhaps
// a reference, which stands for the bytes of the stream that come after those.
//
//	 0  u16  flags
//	 2  u16  credits: data chunks of the other direction whose slots are free again
//	 4  u16  pulled: references of the other direction that were fetched, oldest first
//	 6  u16  inline: payloads that begin in the data
//	 8  u32  length of the data
//	12  u32  zero
//	16  data, then the reference if flagReference: u64 address, u32 key, u32 length
//
// A chunk with data or a reference needs a credit. One without only returns
// credits, or says goodbye; slots for those are kept apart, as there is a bound
// on how many can be on their way: one for each reference that is not fetched, two for
// credits, which are returned when half of them are owed, and the goodbye.
const (
	prefixSize    = 16
	referenceSize = 16

	flagReference uint16 = 1
	flagGoodbye   uint16 = 2 // the last chunk: the sender closed the lane
)

type chunk struct {
	flags, credits, pulled, inline uint16
	data                           []byte
	ref                            reference
}

// reference is a payload in the sender's memory.
type reference struct {
	addr uint64
	key  uint32
	len  uint32 // bytes
}

func putPrefix(b []byte, c chunk, dataLen int) {
	binary.LittleEndian.PutUint16(b[0:], c.flags)
	binary.LittleEndian.PutUint16(b[2:], c.credits)
	binary.LittleEndian.PutUint16(b[4:], c.pulled)
	binary.LittleEndian.PutUint16(b[6:], c.inline)
	binary.LittleEndian.PutUint32(b[8:], uint32(dataLen))
	binary.LittleEndian.PutUint32(b[12:], 0)
}

func appendReference(b []byte, r reference) []byte {
	b = binary.LittleEndian.AppendUint64(b, r.addr)
	b = binary.LittleEndian.AppendUint32(b, r.key)
	return binary.LittleEndian.AppendUint32(b, r.len)
}

// parseChunk reads a chunk that shares the memory of b.
func parseChunk(b []byte) (c chunk, err error) {
	if len(b) < prefixSize {
		return c, fmt.Errorf("%w: chunk of %d bytes", transport.ErrDamaged, len(b))
	}
	c.flags, c.credits = binary.LittleEndian.Uint16(b), binary.LittleEndian.Uint16(b[2:])
	c.pulled, c.inline = binary.LittleEndian.Uint16(b[4:]), binary.LittleEndian.Uint16(b[6:])
	n := uint64(binary.LittleEndian.Uint32(b[8:]))
	want := prefixSize + n
	if c.flags&flagReference != 0 {
		want += referenceSize
	}
	if c.flags&^(flagReference|flagGoodbye) != 0 || want != uint64(len(b)) || uint64(c.inline) > n {
		return c, fmt.Errorf("%w: chunk of %d bytes with flags %#x, %d of data and %d payloads in it", transport.ErrDamaged, len(b), c.flags, n, c.inline)
	}
	c.data = b[prefixSize : prefixSize+n]
	if c.flags&flagReference != 0 {
		r := b[prefixSize+n:]
		c.ref = reference{binary.LittleEndian.Uint64(r), binary.LittleEndian.Uint32(r[8:]), binary.LittleEndian.Uint32(r[12:])}
	}
	return c, nil
}

// offerVersion is the only version of offers and chunks that this code speaks.
const offerVersion = 2

var offerMagic = [4]byte{'P', 'G', 'F', 'R'}

// offer is what each end tells the other over the companion lane, little-endian.
// A Reason after it means that this end cannot, and the companion is all there is.
type offer struct {
	Magic     [4]byte
	Version   uint8
	Kind      uint8
	Index     uint8
	Refused   uint8
	Migration [16]byte
	Epoch     uint32
	GID       [16]byte
	QPN, PSN  uint32 // of the queue pair of SENDs
	// ReadQPN and ReadPSN are of the queue pair of READs.
	ReadQPN, ReadPSN uint32
	MTU              uint32 // bytes
	ReadDepth        uint32 // READs that this end answers at a time
	SlotSize         uint32 // bytes of the largest chunk that this end takes
	Credits          uint32 // data chunks that this end has room for
	Refs             uint32 // references that this end takes at a time
}

// ErrRefused: the peer cannot make an RDMA lane. The companion lane is still good.
var ErrRefused = errors.New("rdma: refused by the peer")

func (o *offer) encode(reason string) []byte {
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, o) // a Buffer takes all
	b.WriteString(reason)
	return b.Bytes()
}

// parseOffer reads and checks the offer for lane id.
func parseOffer(b []byte, id transport.LaneID) (o offer, err error) {
	n := binary.Size(o)
	if len(b) >= 5 && [4]byte(b[:4]) == offerMagic && b[4] != offerVersion {
		return o, fmt.Errorf("%w: it speaks version %d of RDMA lanes, this end %d", ErrRefused, b[4], offerVersion)
	}
	if len(b) < n || [4]byte(b[:4]) != offerMagic {
		return o, fmt.Errorf("%w: no offer of an RDMA lane in %d bytes", transport.ErrDamaged, len(b))
	}
	_ = binary.Read(bytes.NewReader(b), binary.LittleEndian, &o) // b is long enough
	switch {
	case o.Refused != 0:
		return o, fmt.Errorf("%w: %.500q", ErrRefused, b[n:])
	case o.Migration != id.Migration || o.Epoch != id.Epoch || o.Kind != uint8(id.Kind) || o.Index != id.Index:
		return o, fmt.Errorf("%w: the offer is for another lane", transport.ErrAuth)
	case o.SlotSize < 256 || o.SlotSize > 1<<20 || o.Credits < 4 || o.Credits > 1<<12 || o.Refs < 1 || o.Refs > 1<<12,
		o.MTU < 256 || o.MTU > maxPacketMTU, max(o.QPN, o.PSN, o.ReadQPN, o.ReadPSN) >= 1<<24:
		return o, fmt.Errorf("%w: offer out of bounds: %+v", transport.ErrDamaged, o)
	}
	return o, nil
}
