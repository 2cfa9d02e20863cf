package migrate

import (
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/fxamacker/cbor/v2"
)

// Limits of what is read from a peer, in bytes.
const (
	maxMeta     = 64 << 10  // of one message without its blobs
	maxKey      = 256       // of a one-time lane key
	maxSpill    = 16 << 20  // of a message that travels as a blob
	maxImage    = 1 << 30   // of a process image
	maxMemory   = 256 << 20 // of a memory map
	maxPiece    = 1 << 20   // of one piece of a blob, as received
	blobPiece   = 256 << 10 // of one piece of a blob, as sent
	spillAt     = 48 << 10  // a body longer than that travels as a blob
	maxAllocate = 4 << 20   // set aside for a blob before any of it is here
)

var (
	// ErrProtocol: the peer said what it may not say.
	ErrProtocol = errors.New("migrate: protocol error")
	// ErrVersion: the peer speaks another version of the protocol.
	ErrVersion = errors.New("migrate: protocol version")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var (
	decMode cbor.DecMode
	encMode cbor.EncMode
)

func init() {
	var err error
	decMode, err = cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		MaxNestedLevels:   8,
		MaxArrayElements:  65536,
		MaxMapPairs:       256,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		UTF8:              cbor.UTF8RejectInvalid,
	}.DecMode()
	if err != nil {
		panic(err) // constant options
	}
	encMode, err = cbor.CoreDetEncOptions().EncMode()
	if err != nil {
		panic(err)
	}
}

// envelope is the Meta of a frame of wire.TypeMessage.
type envelope struct {
	_     struct{} `cbor:",toarray"`
	Kind  kind
	Body  cbor.RawMessage // null where the body is the first and only blob
	Blobs []blobInfo      // what follows in frames of wire.TypeBlob, in order
}

type blobInfo struct {
	_     struct{} `cbor:",toarray"`
	Bytes uint64
	CRC   uint32 // CRC32C of the whole
}

// pieceMeta is the Meta of a frame of wire.TypeBlob.
type pieceMeta struct {
	_      struct{} `cbor:",toarray"`
	Offset uint64
	CRC    uint32
}

var cborNull = cbor.RawMessage{0xf6}

// blobLimits returns the most bytes of each blob that a message of kind k is
// followed by.
func blobLimits(k kind) []uint64 {
	switch k {
	case kindState, kindLand:
		return []uint64{maxImage, maxMemory}
	case kindMemory:
		return []uint64{maxMemory}
	case kindOffer, kindRefuse:
		return []uint64{maxSpill} // only where the body is null
	}
	return nil
}

// encodeMessage returns the Meta for m, and the blobs that follow it.
func encodeMessage(m message, blobs [][]byte) ([]byte, [][]byte, error) {
	body, err := encMode.Marshal(m)
	if err != nil {
		return nil, nil, fmt.Errorf("migrate: encode %v: %w", m.kind(), err)
	}
	if len(body) > spillAt && len(blobs) == 0 && len(blobLimits(m.kind())) == 1 {
		blobs, body = [][]byte{body}, cborNull
	}
	env := envelope{Kind: m.kind(), Body: body}
	limits := blobLimits(m.kind())
	if len(blobs) > len(limits) {
		return nil, nil, fmt.Errorf("migrate: %v carries no blobs", m.kind())
	}
	for i, b := range blobs {
		if uint64(len(b)) > limits[i] {
			return nil, nil, fmt.Errorf("migrate: %v of %d bytes, at most %d", m.kind(), len(b), limits[i])
		}
		env.Blobs = append(env.Blobs, blobInfo{Bytes: uint64(len(b)), CRC: crc32.Checksum(b, castagnoli)})
	}
	meta, err := encMode.Marshal(env)
	if err != nil {
		return nil, nil, fmt.Errorf("migrate: encode %v: %w", m.kind(), err)
	}
	if len(meta) > maxMeta {
		return nil, nil, fmt.Errorf("migrate: message %v of %d bytes, at most %d", m.kind(), len(meta), maxMeta)
	}
	return meta, blobs, nil
}

// decodeEnvelope reads the Meta of a message frame and checks what it announces.
func decodeEnvelope(meta []byte) (envelope, error) {
	var env envelope
	if len(meta) > maxMeta {
		return env, fmt.Errorf("%w: message of %d bytes", ErrProtocol, len(meta))
	}
	if err := decMode.Unmarshal(meta, &env); err != nil {
		return env, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if newMessage(env.Kind) == nil {
		return env, fmt.Errorf("%w: unknown message %v", ErrProtocol, env.Kind)
	}
	limits, want := blobLimits(env.Kind), 0
	switch {
	case env.Kind == kindState, env.Kind == kindLand:
		want = 2
	case env.Kind == kindMemory, env.spilled():
		want = 1
	}
	if len(env.Blobs) != want || want > len(limits) {
		return env, fmt.Errorf("%w: %v with %d blobs", ErrProtocol, env.Kind, len(env.Blobs))
	}
	for i, b := range env.Blobs {
		if b.Bytes > limits[i] {
			return env, fmt.Errorf("%w: %v announces %d bytes, at most %d", ErrProtocol, env.Kind, b.Bytes, limits[i])
		}
	}
	return env, nil
}

func (e *envelope) spilled() bool { return len(e.Body) == 1 && e.Body[0] == cborNull[0] }

// decodeMessage reads the body of an envelope whose blobs have arrived.
func decodeMessage(env envelope, blobs [][]byte) (message, error) {
	body := []byte(env.Body)
	if env.spilled() {
		if len(blobs) != 1 {
			return nil, fmt.Errorf("%w: %v without a body", ErrProtocol, env.Kind)
		}
		body = blobs[0]
	}
	m := newMessage(env.Kind)
	if err := decMode.Unmarshal(body, m); err != nil {
		return nil, fmt.Errorf("%w: %v: %w", ErrProtocol, env.Kind, err)
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	return m, nil
}
