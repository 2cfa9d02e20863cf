package pager

import (
	"errors"
	"time"

	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
)

// settings is what a new pager is told: Config without what is the client's.
type settings struct {
	ID           transport.MigrationID `cbor:"1,keyasint"`
	Dir          string                `cbor:"2,keyasint"`
	KeeperCgroup string                `cbor:"3,keyasint,omitempty"`
	TLS          *TLS                  `cbor:"4,keyasint,omitempty"`
	Window       int                   `cbor:"5,keyasint"`
	Chunk        int                   `cbor:"6,keyasint"`
	BulkLanes    int                   `cbor:"7,keyasint"`
	StallTimeout time.Duration         `cbor:"8,keyasint"`
	// OldKeeper is the keeper of the pager in whose place this one comes; 0
	// for a new migration.
	OldKeeper int           `cbor:"9,keyasint,omitempty"`
	HeadStart time.Duration `cbor:"10,keyasint,omitempty"`
	IdleSleep bool          `cbor:"11,keyasint,omitempty"`
	ShowDir   string        `cbor:"12,keyasint,omitempty"`
	Before    []former      `cbor:"13,keyasint,omitempty"`
}

// who is the answer to opHello and opWho, and what the state file holds.
type who struct {
	ID          transport.MigrationID `cbor:"1,keyasint"`
	PID         int                   `cbor:"2,keyasint"`
	Start       uint64                `cbor:"3,keyasint"` // of PID, in clock ticks after boot
	Keeper      int                   `cbor:"4,keyasint"`
	KeeperStart uint64                `cbor:"5,keyasint"`
	// Before are those in whose place it comes and that may not be gone yet, the last one first.
	Before []former `cbor:"6,keyasint,omitempty"`
}

// former is a pager that was killed, and its keeper.
type former struct {
	PID         int    `cbor:"1,keyasint"`
	Start       uint64 `cbor:"2,keyasint"`
	Keeper      int    `cbor:"3,keyasint"`
	KeeperStart uint64 `cbor:"4,keyasint"`
}

func (w who) former() former { return former{w.PID, w.Start, w.Keeper, w.KeeperStart} }

type laneMsg struct {
	Lane transport.LaneID `cbor:"1,keyasint"`
	Key  []byte           `cbor:"2,keyasint"`
	// For a lane that may go on over RDMA: how, or why not.
	Path   *rdma.Path `cbor:"3,keyasint,omitempty"`
	NoPath string     `cbor:"4,keyasint,omitempty"`
}

type epochMsg struct {
	Epoch uint32 `cbor:"1,keyasint"`
}

type fileMsg struct {
	Space page.Space  `cbor:"1,keyasint"`
	Index []FileRange `cbor:"2,keyasint"`
	Sums  []uint32    `cbor:"3,keyasint,omitempty"`
}

type adoptMsg struct {
	Space   page.Space `cbor:"1,keyasint"`
	PID     int        `cbor:"2,keyasint"`
	UFFD    bool       `cbor:"3,keyasint"` // descriptors come in this order
	Mem     bool       `cbor:"4,keyasint"`
	Regions []Region   `cbor:"5,keyasint"`
	Lazy    page.Set   `cbor:"6,keyasint"`
	Eager   page.Set   `cbor:"7,keyasint"`
	Hot     page.Set   `cbor:"8,keyasint"`
	Veil    bool       `cbor:"9,keyasint,omitempty"` // its descriptor is the last
	Views   []View     `cbor:"10,keyasint,omitempty"`
	Group   string     `cbor:"11,keyasint,omitempty"`
	Shown   bool       `cbor:"13,keyasint,omitempty"`
	Kept    page.Set   `cbor:"12,keyasint"`
}

// readMsg asks for a part of a file.
type readMsg struct {
	File   int   `cbor:"1,keyasint"`
	Offset int64 `cbor:"2,keyasint"`
	Bytes  int   `cbor:"3,keyasint"`
}

// shownReply is the answer to opShown.
type shownReply struct {
	Dev   uint64 `cbor:"1,keyasint"`
	Show  Show   `cbor:"2,keyasint"`
	Views []View `cbor:"3,keyasint"`
	Image uint64 `cbor:"4,keyasint"`
}

// veiledMsg asks what is known of the veiled memory of process PID.
type veiledMsg struct {
	PID int `cbor:"2,keyasint"`
	// Grain is of what blocks, of so many bytes, all counts as missing where a page is.
	Grain uint64 `cbor:"4,keyasint,omitempty"`
	// Has asks for all pages that the source has.
	Has bool `cbor:"5,keyasint,omitempty"`
}

// replacedMsg says that nobody sees these pages of the source by the image any more.
type replacedMsg struct {
	Ranges []page.Range `cbor:"1,keyasint"`
}

// unveilMsg says that shadows are about to take the place of what is seen of them in
// process PID, which stands still: Shadows[i] has the pages of Ranges[i].
type unveilMsg struct {
	PID     int          `cbor:"1,keyasint"`
	At      []page.Range `cbor:"4,keyasint"` // where it sees them
	Ranges  []page.Range `cbor:"2,keyasint"`
	Shadows []page.Addr  `cbor:"3,keyasint"`
	// Again: it did not come to that.
	Again bool `cbor:"5,keyasint,omitempty"`
	// Early: what is there is not asked for.
	Early bool `cbor:"6,keyasint,omitempty"`
	// Certain: what is seen is let go of as well.
	Certain bool `cbor:"7,keyasint,omitempty"`
}

// veilReply is the answer to both.
type veilReply struct {
	Missing page.Set `cbor:"1,keyasint"`
	GivenUp page.Set `cbor:"2,keyasint"`           // to unveilMsg
	Has     page.Set `cbor:"5,keyasint"`           // to veiledMsg
	Own     page.Set `cbor:"3,keyasint"`           // addresses of the process
	Busy    bool     `cbor:"4,keyasint,omitempty"` // nothing was done: it gives up memory just now
}

type eventMsg struct {
	Kind  EventKind        `cbor:"1,keyasint"`
	Stats Stats            `cbor:"2,keyasint"`
	Lane  transport.LaneID `cbor:"3,keyasint"`
	Err   string           `cbor:"4,keyasint,omitempty"`
	Code  string           `cbor:"5,keyasint,omitempty"`
}

// Sentinels cross the control connection by name.
var codes = map[string]error{
	"gone": ErrGone, "lost": ErrLost, "peer": transport.ErrPeer, "closed": transport.ErrClosed,
	"source": stream.ErrGone, "damaged": transport.ErrDamaged, "auth": transport.ErrAuth,
}

func codeOf(err error) string {
	for name, s := range codes {
		if errors.Is(err, s) {
			return name
		}
	}
	return ""
}

// remoteError is an error of the pager, as the client sees it.
type remoteError struct {
	text string
	is   error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.is }

func errorOf(text, code string) error {
	if text == "" {
		return nil
	}
	return &remoteError{text, codes[code]}
}
