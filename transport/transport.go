package transport

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/wire"
)

// Kind is what a lane is for.
type Kind uint8

const (
	Control Kind = iota + 1 // messages of the handover; always authenticated
	Urgent                  // demand faults and their answers, nothing else
	Bulk                    // the background stream; several per migration
)

func (k Kind) String() string {
	switch k {
	case Control:
		return "control"
	case Urgent:
		return "urgent"
	case Bulk:
		return "bulk"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// MigrationID names a migration on both hosts.
type MigrationID [16]byte

func (id MigrationID) String() string { return fmt.Sprintf("%x", id[:]) }

// ParseMigrationID reads what String wrote.
func ParseMigrationID(s string) (id MigrationID, err error) {
	raw, err := hex.DecodeString(s)
	if err != nil || len(raw) != len(id) {
		return id, fmt.Errorf("transport: %q is no migration id", s)
	}
	copy(id[:], raw)
	return id, nil
}

// LaneID says which lane of which migration a connection is. Epoch counts the
// times the lanes were set up anew: an older epoch is refused.
type LaneID struct {
	Migration MigrationID
	Epoch     uint32
	Kind      Kind
	Index     uint8
	// RDMA: the dialer wants to go on over RDMA queue pairs (package rdma), and both
	// ends tell each other whether they can before anything else.
	RDMA bool
}

// Frame is one unit on a lane. Meta is small and always checksummed by the
// lane; Payload is bulk data in registered memory, whose checksums (one per
// page) are in Meta and are the receiver's to verify.
type Frame struct {
	Type    wire.Type
	Flags   uint16
	Meta    []byte  // on Recv: valid until the next Recv on the lane
	Payload *Buffer // nil where there is none; its length is Payload.Len()
}

// Lane is an ordered, reliable stream of frames between the two hosts.
//
// Send may be called by one goroutine at a time, Recv by another at the same
// time; Close by any, at any time, and more than once: it ends both with
// ErrClosed.
type Lane interface {
	ID() LaneID
	// Send hands frames over, in order, as one batch. It takes ownership of
	// the payloads, which go back to their pool when the transport is done
	// with them, also when Send fails. It blocks while the peer is slower.
	Send(frames ...Frame) error
	// Recv waits for the next frame. The payload, from the lane's own pool, is
	// the caller's to Release.
	Recv() (Frame, error)
	Close() error
	Stats() Stats
}

// RemoteReader is the optional one-sided read of registered remote memory. A
// transport that lacks it is served by Want and Pages frames.
type RemoteReader interface {
	// ReadRemote fills into with what lies at remote of the memory that key is for.
	ReadRemote(ctx context.Context, key uint32, remote uint64, into *Buffer) error
	// Offered is what the peer has said can be read, so far; nil for nothing.
	Offered() *Remotes
}

// RemoteOfferer is what the other end of a RemoteReader may be.
type RemoteOfferer interface {
	// Offer tells the peer, once, what it may read from now on. The memory stays
	// registered until the lane has ended at this end; what is not there any more
	// ends the peer's lane.
	Offer(rs []Remote) error
}

// Stats counts what crossed a lane, in bytes of the wire below TLS and TCP.
type Stats struct {
	BytesSent, BytesReceived   uint64
	FramesSent, FramesReceived uint64
}

// Peer is who is at the other end of an authenticated connection.
type Peer struct {
	Name    string // the certificate's name, or "" on a plain connection
	Address string
}

var (
	// ErrClosed: this end closed the lane.
	ErrClosed = errors.New("transport: lane closed")
	// ErrPeer: the other end closed the lane or the connection broke.
	ErrPeer = errors.New("transport: connection lost")
	// ErrDamaged: a frame failed its checksum, length or version check. The
	// lane is unusable from then on.
	ErrDamaged = errors.New("transport: damaged frame")
	// ErrAuth: the peer could not prove who it is.
	ErrAuth = errors.New("transport: peer not authenticated")
)
