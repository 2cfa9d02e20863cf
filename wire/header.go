package wire

import (
	"encoding/binary"
	"hash/crc32"
)

// HeaderSize is the length of an encoded Header in bytes.
const HeaderSize = 32

// Magic begins every frame: "PGF" and a byte that no text has.
const Magic uint32 = 'P' | 'G'<<8 | 'F'<<16 | 0xF1<<24

// Header goes before the meta and the payload of every frame.
//
//	 0  u32  Magic
//	 4  u8   Version
//	 5  u8   Type
//	 6  u16  Flags
//	 8  u32  MetaLen
//	12  u32  PayloadLen
//	16  u64  Seq
//	24  u32  zero
//	28  u32  CRC32C over bytes 0 to 27 and the meta
type Header struct {
	Type       Type
	Flags      uint16
	MetaLen    uint32
	PayloadLen uint32
	// Seq counts the frames of one direction of one lane from 0. A frame that
	// was lost, repeated or put into another order is found by it.
	Seq uint64
}

// AppendHeader appends the header of a frame whose meta is meta. MetaLen is
// taken from meta, whatever h says. The lengths must be within the limits.
func AppendHeader(dst []byte, h Header, meta []byte) []byte {
	at := len(dst)
	dst = binary.LittleEndian.AppendUint32(dst, Magic)
	dst = append(dst, Version, byte(h.Type))
	dst = binary.LittleEndian.AppendUint16(dst, h.Flags)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(meta)))
	dst = binary.LittleEndian.AppendUint32(dst, h.PayloadLen)
	dst = binary.LittleEndian.AppendUint64(dst, h.Seq)
	dst = binary.LittleEndian.AppendUint32(dst, 0)
	return binary.LittleEndian.AppendUint32(dst, checksum(dst[at:], meta))
}

func checksum(header, meta []byte) uint32 {
	return crc32.Update(crc32.Checksum(header[:HeaderSize-4], castagnoli), castagnoli, meta)
}

// ParseHeader reads a header from the first HeaderSize bytes of b and checks all
// of it but the checksum, for which the meta is needed: see CheckMeta.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, malformed("header of %d bytes", len(b))
	}
	if m := binary.LittleEndian.Uint32(b); m != Magic {
		return Header{}, malformed("no frame begins with %#x", m)
	}
	if b[4] != Version {
		return Header{}, malformed("frame of version %d, this end speaks %d", b[4], Version)
	}
	h := Header{
		Type:       Type(b[5]),
		Flags:      binary.LittleEndian.Uint16(b[6:]),
		MetaLen:    binary.LittleEndian.Uint32(b[8:]),
		PayloadLen: binary.LittleEndian.Uint32(b[12:]),
		Seq:        binary.LittleEndian.Uint64(b[16:]),
	}
	if h.MetaLen > MaxMeta || h.PayloadLen > MaxPayload {
		return Header{}, malformed("frame with %d bytes of meta and %d of payload, the limits are %d and %d",
			h.MetaLen, h.PayloadLen, MaxMeta, MaxPayload)
	}
	if z := binary.LittleEndian.Uint32(b[24:]); z != 0 {
		return Header{}, malformed("reserved field of the header is %#x", z)
	}
	return h, nil
}

// CheckMeta verifies the checksum in the header encoded in raw over it and meta.
// Nothing of the header or meta may be used before.
func CheckMeta(raw, meta []byte) error {
	if len(raw) < HeaderSize {
		return malformed("header of %d bytes", len(raw))
	}
	if got, want := checksum(raw, meta), binary.LittleEndian.Uint32(raw[HeaderSize-4:]); got != want {
		return malformed("checksum of header and meta is %08x, should be %08x", got, want)
	}
	return nil
}
