package wire

import (
	"errors"
	"fmt"
	"hash/crc32"
)

// Type is the kind of a frame.
type Type uint8

const (
	TypeMessage Type = 1 // control lane: a CBOR message of the handover in Meta
	TypeBlob    Type = 2 // control lane: a piece of a large message in Payload
	TypeWant    Type = 3 // destination asks for page ranges: Meta is Want
	TypePages   Type = 4 // source answers: Meta is Pages, Payload their content
	TypeRefuse  Type = 5 // source cannot give the pages asked for: Meta is Refuse
	TypePing    Type = 6 // keep-alive; Meta is echoed in TypePong
	TypePong    Type = 7
)

func (t Type) String() string {
	switch t {
	case TypeMessage:
		return "message"
	case TypeBlob:
		return "blob"
	case TypeWant:
		return "want"
	case TypePages:
		return "pages"
	case TypeRefuse:
		return "refuse"
	case TypePing:
		return "ping"
	case TypePong:
		return "pong"
	}
	return fmt.Sprintf("type(%d)", uint8(t))
}

// Version is the only version of frames and preambles that this code speaks.
const Version = 1

// Limits, in bytes. A frame beyond them is malformed, whatever it holds.
const (
	MaxMeta    = 64 << 10
	MaxPayload = 1 << 20
)

// FlagLast on a Pages frame says that the request is answered in full. No other
// flag has a meaning in this version, and a sender sets none.
const FlagLast uint16 = 1

// ErrMalformed is wrapped by every error of a Parse function.
var ErrMalformed = errors.New("wire: malformed")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrMalformed}, args...)...)
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)
