package migrate

import (
	"fmt"

	"github.com/pageferry/pageferry/transport"
)

// ProtocolVersion is that of the messages below. Another is refused by HELLO.
const ProtocolVersion = 1

// kind is the type of a message on the control lane.
type kind uint8

const (
	kindHello     kind = 1  // both: who speaks, what its host is
	kindOffer     kind = 2  // source: what would come
	kindAccept    kind = 3  // destination: prepared; open your lanes with this key
	kindRefuse    kind = 4  // destination: no, and nothing was touched
	kindState     kind = 5  // source: frozen; image and memory map follow as blobs
	kindReady     kind = 6  // destination: rebuilt, held, journalled
	kindCommit    kind = 7  // source: held and journalled: it is yours
	kindRunning   kind = 8  // destination: journalled and released
	kindProgress  kind = 9  // destination: how far the pages are
	kindResident  kind = 10 // destination: it needs nothing of you any more
	kindDone      kind = 11 // source: copy killed; forget it
	kindSettled   kind = 12 // destination: forgotten
	kindAbort     kind = 13 // source: it runs here; give yours up
	kindAborted   kind = 14 // destination: given up, nothing left
	kindResume    kind = 15 // source: first message after HELLO on a later connection
	kindResumeAck kind = 16 // destination: where it stands, and the lanes' next epoch
	kindPing      kind = 17
	kindPong      kind = 18
	kindLost      kind = 19 // destination: it ran here and is no more
	kindRetry     kind = 20 // destination: cannot say now; ask again
	kindMemory    kind = 21 // source: the rest of the memory map follows as a blob
	kindLand      kind = 22 // source: still running; layout and pages to fetch follow as blobs
	kindLanded    kind = 23 // destination: they are in place
)

var kindNames = map[kind]string{
	kindHello: "hello", kindOffer: "offer", kindAccept: "accept", kindRefuse: "refuse", kindState: "state",
	kindReady: "ready", kindCommit: "commit", kindRunning: "running", kindProgress: "progress",
	kindResident: "resident", kindDone: "done", kindSettled: "settled", kindAbort: "abort", kindAborted: "aborted",
	kindResume: "resume", kindResumeAck: "resume-ack", kindPing: "ping", kindPong: "pong", kindLost: "lost",
	kindRetry: "retry", kindMemory: "memory", kindLand: "land", kindLanded: "landed",
}

func (k kind) String() string {
	if n, ok := kindNames[k]; ok {
		return n
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// message is one of the types below.
type message interface {
	kind() kind
	check() error
}

// Hello is the first message of either side on every control connection.
type Hello struct {
	Version     uint        `cbor:"1,keyasint"`
	Features    []string    `cbor:"2,keyasint,omitempty"`
	Host        string      `cbor:"3,keyasint"`
	Incarnation Incarnation `cbor:"4,keyasint"`
	PageSize    int         `cbor:"5,keyasint"` // bytes
	XFeatures   uint64      `cbor:"6,keyasint"` // XCR0
	XSize       uint32      `cbor:"7,keyasint"` // bytes
	Kernel      string      `cbor:"8,keyasint"`
	Machine     string      `cbor:"9,keyasint"`
}

type offerMsg struct {
	Migration wireID `cbor:"1,keyasint"`
	Offer     Offer  `cbor:"2,keyasint"`
}

type acceptMsg struct {
	Epoch uint32 `cbor:"1,keyasint"`
	Key   []byte `cbor:"2,keyasint"`
}

type refuseMsg struct {
	Reasons []string `cbor:"1,keyasint"`
}

// stateMsg announces two blobs: the image and what is known of the memory map.
type stateMsg struct{}

// memoryMsg announces one: the rest of it. It follows every STATE.
type memoryMsg struct{}

// landMsg announces two blobs: the layout, empty where it has not changed, and
// the sets of a Batch.
type landMsg struct {
	Round uint `cbor:"1,keyasint"` // for people
}

type landedMsg struct {
	Pages     uint64     `cbor:"1,keyasint"`
	PagesZero uint64     `cbor:"2,keyasint"`
	BytesWire uint64     `cbor:"3,keyasint"`
	Micros    uint64     `cbor:"4,keyasint"`
	Stats     statsOnAir `cbor:"5,keyasint"`
}

type readyMsg struct {
	RebuildMicros uint64     `cbor:"1,keyasint"`
	Stats         statsOnAir `cbor:"2,keyasint"`
}

type commitMsg struct{}

type runningMsg struct {
	PID           int    `cbor:"1,keyasint"`
	CommitMicros  uint64 `cbor:"2,keyasint"` // to journal
	ReleaseMicros uint64 `cbor:"3,keyasint"`
}

type progressMsg struct {
	Stats statsOnAir `cbor:"1,keyasint"`
}

type residentMsg struct {
	PID   int        `cbor:"1,keyasint"`
	Stats statsOnAir `cbor:"2,keyasint"`
}

type doneMsg struct{}

type settledMsg struct{}

type abortMsg struct {
	Reason string `cbor:"1,keyasint"`
}

type abortedMsg struct {
	Reason string `cbor:"1,keyasint"`
}

// intent is what a source that resumes means to do, as its journal has it.
type intent uint8

const (
	intentAsk      intent = 1 // held, not committed: I abort unless you were resolved to go on
	intentCommit   intent = 2 // committed: it is yours
	intentAbort    intent = 3 // it runs here
	intentDone     intent = 4 // copy killed, forget it
	intentsPastEnd intent = 5
)

type resumeMsg struct {
	Migration wireID `cbor:"1,keyasint"`
	Intent    intent `cbor:"2,keyasint"`
	Resolved  bool   `cbor:"3,keyasint"` // a person decided: obey
	Reason    string `cbor:"4,keyasint"`
}

type resumeAckMsg struct {
	Known    bool       `cbor:"1,keyasint"`
	State    DestState  `cbor:"2,keyasint"`
	Resolved bool       `cbor:"3,keyasint"`
	Epoch    uint32     `cbor:"4,keyasint"` // 0: no lanes are wanted
	Key      []byte     `cbor:"5,keyasint"`
	PID      int        `cbor:"6,keyasint"`
	Reason   string     `cbor:"7,keyasint"`
	Stats    statsOnAir `cbor:"8,keyasint"`
}

type pingMsg struct{}

type pongMsg struct{}

type lostMsg struct {
	Reason string `cbor:"1,keyasint"`
}

type retryMsg struct {
	Reason string `cbor:"1,keyasint"`
}

// statsOnAir is ArrivalStats.
type statsOnAir struct {
	PagesTotal    uint64  `cbor:"1,keyasint"`
	PagesResident uint64  `cbor:"2,keyasint"`
	PagesZero     uint64  `cbor:"3,keyasint"`
	PagesFaulted  uint64  `cbor:"4,keyasint"`
	PagesDouble   uint64  `cbor:"5,keyasint"`
	BytesWire     uint64  `cbor:"6,keyasint"`
	FaultP50us    float64 `cbor:"7,keyasint"`
	FaultP99us    float64 `cbor:"8,keyasint"`
	FaultMaxus    float64 `cbor:"9,keyasint"`
	PagesLanded   uint64  `cbor:"10,keyasint"`
	PagesOneSided uint64  `cbor:"11,keyasint,omitempty"`
}

// wireID is a MigrationID with its length checked.
type wireID transport.MigrationID

func (w wireID) MarshalBinary() ([]byte, error) { return w[:], nil }

func (w *wireID) UnmarshalBinary(b []byte) error {
	if len(b) != len(w) {
		return fmt.Errorf("migrate: migration id of %d bytes, want %d", len(b), len(w))
	}
	copy(w[:], b)
	return nil
}

func (Hello) kind() kind        { return kindHello }
func (offerMsg) kind() kind     { return kindOffer }
func (acceptMsg) kind() kind    { return kindAccept }
func (refuseMsg) kind() kind    { return kindRefuse }
func (stateMsg) kind() kind     { return kindState }
func (memoryMsg) kind() kind    { return kindMemory }
func (landMsg) kind() kind      { return kindLand }
func (landedMsg) kind() kind    { return kindLanded }
func (readyMsg) kind() kind     { return kindReady }
func (commitMsg) kind() kind    { return kindCommit }
func (runningMsg) kind() kind   { return kindRunning }
func (progressMsg) kind() kind  { return kindProgress }
func (residentMsg) kind() kind  { return kindResident }
func (doneMsg) kind() kind      { return kindDone }
func (settledMsg) kind() kind   { return kindSettled }
func (abortMsg) kind() kind     { return kindAbort }
func (abortedMsg) kind() kind   { return kindAborted }
func (resumeMsg) kind() kind    { return kindResume }
func (resumeAckMsg) kind() kind { return kindResumeAck }
func (pingMsg) kind() kind      { return kindPing }
func (pongMsg) kind() kind      { return kindPong }
func (lostMsg) kind() kind      { return kindLost }
func (retryMsg) kind() kind     { return kindRetry }

// check of a HELLO leaves the version to whoever answers it: the peer is to be
// told, not cut off.
func (m Hello) check() error { return nil }

func (m offerMsg) check() error {
	if m.Migration == (wireID{}) {
		return fmt.Errorf("%w: offer without an id", ErrProtocol)
	}
	if !m.Offer.Mode.Known() {
		return fmt.Errorf("%w: mode %q", ErrProtocol, m.Offer.Mode)
	}
	return nil
}

func (m acceptMsg) check() error {
	if len(m.Key) > maxKey {
		return fmt.Errorf("%w: key of %d bytes", ErrProtocol, len(m.Key))
	}
	return nil
}

func (m refuseMsg) check() error {
	if len(m.Reasons) == 0 {
		return fmt.Errorf("%w: refusal without a reason", ErrProtocol)
	}
	return nil
}

func (m resumeMsg) check() error {
	if m.Intent == 0 || m.Intent >= intentsPastEnd {
		return fmt.Errorf("%w: intent %d", ErrProtocol, m.Intent)
	}
	return nil
}

func (m resumeAckMsg) check() error {
	if m.State >= destStates {
		return fmt.Errorf("%w: state %d of a destination", ErrProtocol, m.State)
	}
	if len(m.Key) > maxKey {
		return fmt.Errorf("%w: key of %d bytes", ErrProtocol, len(m.Key))
	}
	return nil
}

func (m runningMsg) check() error {
	if m.PID < 0 {
		return fmt.Errorf("%w: pid %d", ErrProtocol, m.PID)
	}
	return nil
}

func (stateMsg) check() error    { return nil }
func (memoryMsg) check() error   { return nil }
func (landMsg) check() error     { return nil }
func (landedMsg) check() error   { return nil }
func (readyMsg) check() error    { return nil }
func (commitMsg) check() error   { return nil }
func (progressMsg) check() error { return nil }
func (residentMsg) check() error { return nil }
func (doneMsg) check() error     { return nil }
func (settledMsg) check() error  { return nil }
func (abortMsg) check() error    { return nil }
func (abortedMsg) check() error  { return nil }
func (pingMsg) check() error     { return nil }
func (pongMsg) check() error     { return nil }
func (lostMsg) check() error     { return nil }
func (retryMsg) check() error    { return nil }

// newMessage returns a pointer to the zero message of kind k, or nil.
func newMessage(k kind) message {
	switch k {
	case kindHello:
		return new(Hello)
	case kindOffer:
		return new(offerMsg)
	case kindAccept:
		return new(acceptMsg)
	case kindRefuse:
		return new(refuseMsg)
	case kindState:
		return new(stateMsg)
	case kindMemory:
		return new(memoryMsg)
	case kindLand:
		return new(landMsg)
	case kindLanded:
		return new(landedMsg)
	case kindReady:
		return new(readyMsg)
	case kindCommit:
		return new(commitMsg)
	case kindRunning:
		return new(runningMsg)
	case kindProgress:
		return new(progressMsg)
	case kindResident:
		return new(residentMsg)
	case kindDone:
		return new(doneMsg)
	case kindSettled:
		return new(settledMsg)
	case kindAbort:
		return new(abortMsg)
	case kindAborted:
		return new(abortedMsg)
	case kindResume:
		return new(resumeMsg)
	case kindResumeAck:
		return new(resumeAckMsg)
	case kindPing:
		return new(pingMsg)
	case kindPong:
		return new(pongMsg)
	case kindLost:
		return new(lostMsg)
	case kindRetry:
		return new(retryMsg)
	}
	return nil
}
