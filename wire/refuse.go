package wire

import (
	"encoding/binary"
	"strings"
	"unicode/utf8"
)

// RefuseCode says why pages cannot be had.
type RefuseCode uint16

const (
	RefuseGone  RefuseCode = 1 // the source's copy is lost for good
	RefuseRange RefuseCode = 2 // the request is not within the process's memory
	RefuseRead  RefuseCode = 3 // reading failed; asking again may help
)

func (c RefuseCode) String() string {
	switch c {
	case RefuseGone:
		return "process gone"
	case RefuseRange:
		return "no such memory"
	case RefuseRead:
		return "read failed"
	}
	return "unknown"
}

// Refuse answers a Want whose remaining pages cannot be given.
//
//	 0  u64  ID of the Want
//	 8  u16  Code
//	10  u16  length of the text
//	12  text, UTF-8
type Refuse struct {
	ID   uint64
	Code RefuseCode
	Text string // for people; at most MaxRefuseText bytes
}

const (
	refuseHead = 12
	// MaxRefuseText bounds the text of a Refuse, in bytes.
	MaxRefuseText = 1024
)

// AppendRefuse appends the encoding of r, its text cut to what is allowed.
func AppendRefuse(dst []byte, r Refuse) []byte {
	text := strings.ToValidUTF8(r.Text, "?")
	if len(text) > MaxRefuseText {
		cut := MaxRefuseText
		for !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut]
	}
	dst = binary.LittleEndian.AppendUint64(dst, r.ID)
	dst = binary.LittleEndian.AppendUint16(dst, uint16(r.Code))
	dst = binary.LittleEndian.AppendUint16(dst, uint16(len(text)))
	return append(dst, text...)
}

// ParseRefuse reads a Refuse from b. An unknown code is the caller's to judge.
func ParseRefuse(b []byte) (Refuse, error) {
	if len(b) < refuseHead {
		return Refuse{}, malformed("refuse of %d bytes", len(b))
	}
	n := int(binary.LittleEndian.Uint16(b[10:]))
	text := b[refuseHead:]
	if n > MaxRefuseText || n != len(text) {
		return Refuse{}, malformed("refuse with a text of %d bytes in %d", n, len(text))
	}
	if !utf8.Valid(text) {
		return Refuse{}, malformed("refuse with a text that is not UTF-8")
	}
	return Refuse{
		ID:   binary.LittleEndian.Uint64(b),
		Code: RefuseCode(binary.LittleEndian.Uint16(b[8:])),
		Text: string(text),
	}, nil
}
