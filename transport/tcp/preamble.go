package tcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// PreambleSize is the length in bytes of what every connection begins with.
const PreambleSize = 48

// preamble says what a connection is. Nothing in it is authenticated; the
// handshake that follows covers it.
//
//	 0  "PGFY"
//	 4  u16  version
//	 6  u8   kind
//	 7  u8   flags; bit 0: no TLS; bit 1: RDMA is offered
//	 8  16 bytes, migration
//	24  u32  epoch
//	28  u8   index
//	29  15 bytes, zero
//	44  u32  CRC32C over bytes 0 to 43
type preamble struct {
	version uint16
	plain   bool
	id      transport.LaneID
}

const (
	flagPlain = 1
	flagRDMA  = 2
)

var (
	magic      = [4]byte{'P', 'G', 'F', 'Y'}
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errPreamble = errors.New("tcp: not a pageferry connection")
)

func appendPreamble(dst []byte, p preamble) []byte {
	at := len(dst)
	dst = append(dst, magic[:]...)
	dst = binary.LittleEndian.AppendUint16(dst, p.version)
	var flags byte
	if p.plain {
		flags |= flagPlain
	}
	if p.id.RDMA {
		flags |= flagRDMA
	}
	dst = append(dst, byte(p.id.Kind), flags)
	dst = append(dst, p.id.Migration[:]...)
	dst = binary.LittleEndian.AppendUint32(dst, p.id.Epoch)
	dst = append(dst, p.id.Index)
	dst = append(dst, make([]byte, 15)...)
	return binary.LittleEndian.AppendUint32(dst, crc32.Checksum(dst[at:], castagnoli))
}

// parsePreamble reads a preamble. Of one of another version only the version is
// to be trusted: the layout up to it is the same in all.
func parsePreamble(b []byte) (p preamble, err error) {
	if len(b) != PreambleSize || [4]byte(b[:4]) != magic {
		return p, errPreamble
	}
	p.version = binary.LittleEndian.Uint16(b[4:])
	if p.version != wire.Version {
		return p, nil
	}
	if crc32.Checksum(b[:PreambleSize-4], castagnoli) != binary.LittleEndian.Uint32(b[PreambleSize-4:]) {
		return p, fmt.Errorf("%w: checksum of the preamble", errPreamble)
	}
	p.id.Kind = transport.Kind(b[6])
	if p.id.Kind < transport.Control || p.id.Kind > transport.Bulk {
		return p, fmt.Errorf("%w: lane of kind %d", errPreamble, b[6])
	}
	if b[7]&^(flagPlain|flagRDMA) != 0 || b[7]&flagRDMA != 0 && p.id.Kind == transport.Control {
		return p, fmt.Errorf("%w: flags %#x", errPreamble, b[7])
	}
	p.plain = b[7]&flagPlain != 0
	p.id.RDMA = b[7]&flagRDMA != 0
	copy(p.id.Migration[:], b[8:])
	p.id.Epoch = binary.LittleEndian.Uint32(b[24:])
	p.id.Index = b[28]
	if [15]byte(b[29:44]) != [15]byte{} {
		return p, fmt.Errorf("%w: reserved bytes of the preamble", errPreamble)
	}
	return p, nil
}

// Status is an end's answer to a preamble or to the proof of a key.
type Status uint16

const (
	StatusOK        Status = 0
	StatusVersion   Status = 1 // another protocol version
	StatusNoPlain   Status = 2 // TLS is demanded
	StatusNoTLS     Status = 3 // no certificate is configured to offer TLS with
	StatusMigration Status = 4 // no such migration is arriving here
	StatusEpoch     Status = 5 // the lane is of an epoch that has passed
	StatusKey       Status = 6 // the one-time key was not proven
	StatusBusy      Status = 7 // too much under way
)

func (s Status) String() string {
	switch s {
	case StatusOK:
		return "accepted"
	case StatusVersion:
		return "it speaks another version of the protocol"
	case StatusNoPlain:
		return "it demands TLS; set plain page lanes on both hosts or on neither"
	case StatusNoTLS:
		return "it has no certificate to offer TLS with"
	case StatusMigration:
		return "no such migration is arriving there"
	case StatusEpoch:
		return "the lane belongs to a connection that has been replaced"
	case StatusKey:
		return "the lane's one-time key was not proven"
	case StatusBusy:
		return "it is busy"
	}
	return fmt.Sprintf("status %d", uint16(s))
}

// RefusedError is the answer of a peer that is there and does not want the
// connection. errors.Is finds transport.ErrAuth in it where the cause is a lack
// of proof, else transport.ErrPeer.
type RefusedError struct {
	Status  Status
	Version uint16 // what the peer speaks
}

func (e *RefusedError) Error() string {
	if e.Status == StatusVersion {
		return fmt.Sprintf("refused by the peer: it speaks version %d of the protocol, this end %d", e.Version, wire.Version)
	}
	return "refused by the peer: " + e.Status.String()
}

// Is places the error among transport's.
func (e *RefusedError) Is(target error) bool {
	switch e.Status {
	case StatusNoPlain, StatusNoTLS, StatusKey:
		return target == transport.ErrAuth
	}
	return target == transport.ErrPeer
}

// greetingSize is the length of an encoded status.
const greetingSize = 8

// A greeting is a status with the version of who sends it:
//
//	0  "PGFY"   4  u16 version   6  u16 status
func appendGreeting(dst []byte, s Status) []byte {
	dst = append(dst, magic[:]...)
	dst = binary.LittleEndian.AppendUint16(dst, wire.Version)
	return binary.LittleEndian.AppendUint16(dst, uint16(s))
}

func parseGreeting(b []byte) error {
	if len(b) != greetingSize || [4]byte(b[:4]) != magic {
		return fmt.Errorf("%w: %w", transport.ErrDamaged, errPreamble)
	}
	if s := Status(binary.LittleEndian.Uint16(b[6:])); s != StatusOK {
		return &RefusedError{Status: s, Version: binary.LittleEndian.Uint16(b[4:])}
	}
	if v := binary.LittleEndian.Uint16(b[4:]); v != wire.Version {
		return &RefusedError{Status: StatusVersion, Version: v}
	}
	return nil
}
