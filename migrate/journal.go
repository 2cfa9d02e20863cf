package migrate

import (
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/transport"
)

// Incarnation names one journal store, from the first start of a daemon on it
// until it is lost. A migration that is unknown under the incarnation that took
// it was aborted there; under another it is in doubt.
type Incarnation [16]byte

func (i Incarnation) String() string { return hex.EncodeToString(i[:]) }

// IsZero reports whether none was ever learnt.
func (i Incarnation) IsZero() bool { return i == Incarnation{} }

func (i Incarnation) MarshalBinary() ([]byte, error) { return i[:], nil }

func (i *Incarnation) UnmarshalBinary(b []byte) error {
	if len(b) != len(i) {
		return fmt.Errorf("migrate: incarnation of %d bytes, want %d", len(b), len(i))
	}
	copy(i[:], b)
	return nil
}

// Role is the side of a migration that a journal belongs to.
type Role string

const (
	RoleSource      Role = "source"
	RoleDestination Role = "destination"
)

// Record is one entry of a journal. Every record says all that there is to
// know, so that the last one that is whole suffices.
type Record struct {
	Migration transport.MigrationID `cbor:"1,keyasint"`
	Role      Role                  `cbor:"2,keyasint"`
	// State is the name of a SourceState or DestState.
	State   string    `cbor:"3,keyasint"`
	Time    time.Time `cbor:"4,keyasint"`
	Started time.Time `cbor:"5,keyasint"`
	Mode    Mode      `cbor:"6,keyasint"`
	// Peer is who the other side proved to be; only it may speak of this
	// migration again.
	PeerName        string      `cbor:"7,keyasint,omitempty"`
	PeerAddress     string      `cbor:"8,keyasint,omitempty"`
	PeerIncarnation Incarnation `cbor:"9,keyasint"`
	SourcePID       int         `cbor:"10,keyasint"`
	DestPID         int         `cbor:"11,keyasint,omitempty"`
	Comm            string      `cbor:"12,keyasint,omitempty"`
	// Resolved: a person decided, not the protocol. The other side obeys.
	Resolved bool `cbor:"13,keyasint,omitempty"`
	// PeerGone: the source was resolved away; no word of it is waited for.
	PeerGone bool   `cbor:"14,keyasint,omitempty"`
	Reason   string `cbor:"15,keyasint,omitempty"`
	// Hint is what Process or Arrival said of itself (see Describer), for the
	// daemon that finds it again.
	Hint []byte `cbor:"16,keyasint,omitempty"`
}

// Limits of a record's parts, in bytes, so that one that fitted at the start of
// a migration fits at its commit.
const (
	MaxReason = 512
	MaxName   = 256
	MaxHint   = 2048
)

// describe takes the hint of who, and keeps all parts of r within their limits.
// A hint too long is an error where the journal begins; later the one before
// it stays, because no commit may fail for it.
func (r *Record) describe(who any, first bool) error {
	r.Reason = clip(r.Reason, MaxReason)
	r.PeerName = clip(r.PeerName, MaxName)
	r.PeerAddress = clip(r.PeerAddress, MaxName)
	r.Comm = clip(r.Comm, 64)
	d, ok := who.(Describer)
	if !ok {
		return nil
	}
	h := d.Describe()
	switch {
	case len(h) <= MaxHint:
		r.Hint = h
	case first:
		return fmt.Errorf("migrate: hint of %d bytes, at most %d", len(h), MaxHint)
	}
	return nil
}

// Describer is what a Process or Arrival may also be: Describe returns at most
// MaxHint bytes by which a restarted daemon finds it again (pids, start times,
// cgroup paths). It is asked at every record.
type Describer interface{ Describe() []byte }

// Journal is the record of one migration at one side.
type Journal interface {
	// Append returns when the record is durable. After an error it is not
	// known whether it is; a later record takes precedence in any case. It
	// never fails for want of space.
	Append(Record) error
	// Last is the newest record that is whole.
	Last() (Record, error)
	// Remove ends the journal, durably, and closes it. After an error it is
	// still open, and may or may not be found again.
	Remove() error
	// Close lets go of handles only.
	Close() error
}

// Journals is the store of them, on one host.
type Journals interface {
	Incarnation() Incarnation
	// Create makes a journal with all the space that it will ever need, and
	// its first record. ErrNoSpace, ErrExists.
	Create(first Record) (Journal, error)
	// Open finds one, or ErrNoJournal.
	Open(id transport.MigrationID, role Role) (Journal, error)
	// List returns the last record of every journal. A damaged one is part of
	// the error and leaves the others in the list.
	List() ([]Record, error)
}

var (
	ErrNoJournal = errors.New("migrate: no such migration in the journal")
	ErrExists    = errors.New("migrate: a migration of that name is in the journal")
	ErrNoSpace   = errors.New("migrate: no space for the journal")
)

func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && s[n]&0xc0 == 0x80 { // not inside a character
		n--
	}
	return s[:n]
}
