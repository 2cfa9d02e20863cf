package verbs

import (
	"errors"
	"fmt"
	"structs"
	"sync"
	"syscall"
)

// ErrNoLibrary: libibverbs is not installed, or the binary was built without cgo.
var ErrNoLibrary = errors.New("verbs: libibverbs is not there")

// Op is what a work request does.
type Op uint16

const (
	OpSend Op = 0
	OpRead Op = 1 // RDMA READ: fetch Len bytes at Remote, of key RKey, to Addr
)

// Signaled is the flag of a work request whose success is reported, too.
// A failure always is.
const Signaled uint16 = 1

// WorkRequest is one element of a chain; struct pf_wr of shim.h.
type WorkRequest struct {
	_            structs.HostLayout
	ID           uint64
	Addr, Remote uint64
	Len          uint32 // bytes
	LKey, RKey   uint32
	Op           Op
	Flags        uint16
}

// Completion is the end of a work request; struct pf_wc. If Status is not
// Success only ID and Status have a meaning.
type Completion struct {
	_      structs.HostLayout
	ID     uint64
	Status Status
	Op     uint32
	Len    uint32 // bytes received
	Vendor uint32
}

// Status is enum ibv_wc_status of <infiniband/verbs.h>.
type Status uint32

const (
	Success              Status = 0
	ProtectionError      Status = 4
	Flushed              Status = 5 // ended because of an error before it
	RemoteInvalidRequest Status = 9
	RemoteAccessError    Status = 10 // the peer has no such key, address or length
	RetryExceeded        Status = 12 // the peer does not answer
)

// Limits are what a device and its port can do; struct pf_limits.
type Limits struct {
	_            structs.HostLayout
	GID          [16]byte
	GUID         uint64
	MaxWR        uint32 // work requests of a queue pair
	MaxCQE       uint32 // entries of a completion queue
	ReadDepth    uint32 // READs that a queue pair answers at a time
	ReadInitiate uint32 // READs that a queue pair has under way at a time
	PortState    uint32
	MTU          uint32 // active, bytes
	MaxMessage   uint32 // bytes
	MaxRegions   uint32 // of all programs together
}

// PortActive is Limits.PortState of a port that carries data.
const PortActive = 4

// Peer is what a queue pair is connected to and how; struct pf_peer.
type Peer struct {
	_              structs.HostLayout
	GID            [16]byte
	QPN, PSN       uint32 // the peer's
	MyPSN, MTU     uint32
	Port, GIDIndex uint32 // ours
	// ReadInitiate and ReadDepth bound the READs under way that we ask for and
	// that we answer.
	ReadInitiate, ReadDepth uint32
	Timeout                 uint32 // 4.096 us * 2^Timeout until a packet is repeated
	Retries                 uint32 // at most 7
}

// Access flags of a region: enum ibv_access_flags.
const (
	LocalWrite uint32 = 1
	RemoteRead uint32 = 4
)

// Event is enum ibv_event_type, something that happened to a device.
type Event uint32

const (
	EventDeviceFatal Event = 8
	EventPortActive  Event = 9
	EventPortDown    Event = 10
)

// binding is libibverbs; handles are addresses in C. Numbers that it returns as
// error are errnos.
type binding interface {
	open(name string) (ctx, pd uintptr, asyncFD int, err syscall.Errno)
	close(ctx, pd uintptr) syscall.Errno
	kernel(ctx, pd uintptr) (fd int, pdHandle uint32)
	query(ctx uintptr, port, gidIndex int, l *Limits) syscall.Errno
	async(ctx uintptr) (e Event, qp uintptr, err syscall.Errno)
	reg(pd uintptr, mem []byte, access uint32) (mr uintptr, lkey, rkey uint32, err syscall.Errno)
	dereg(mr uintptr) syscall.Errno
	cqCreate(ctx uintptr, n int) (channel, cq uintptr, fd int, err syscall.Errno)
	cqDestroy(channel, cq uintptr) syscall.Errno
	cqArm(cq uintptr) syscall.Errno
	cqEvents(channel uintptr) (n int, err syscall.Errno)
	cqPoll(cq uintptr, c []Completion, ns uint32) int
	qpCreate(pd, cq uintptr, sends, recvs, port int) (qp uintptr, qpn uint32, err syscall.Errno)
	qpConnect(qp uintptr, p *Peer) syscall.Errno
	qpDestroy(qp uintptr) syscall.Errno
	postSend(qp uintptr, w []WorkRequest) (posted int, err syscall.Errno)
	postRecv(qp uintptr, w []WorkRequest) (posted int, err syscall.Errno)
	status(s Status) string
	event(e Event) string
}

// library loads libibverbs once; its errors wrap ErrNoLibrary.
var library = sync.OnceValues(load)

// Available returns nil, or why verbs cannot be used in this process.
func Available() error {
	_, err := library()
	return err
}

func (s Status) String() string {
	if b, err := library(); err == nil {
		return b.status(s)
	}
	return fmt.Sprintf("status %d", uint32(s))
}

func (e Event) String() string {
	if b, err := library(); err == nil {
		return b.event(e)
	}
	return fmt.Sprintf("event %d", uint32(e))
}

func failed(what string, errno syscall.Errno) error {
	if errno == 0 {
		return nil
	}
	return fmt.Errorf("verbs: %s: %w", what, errno)
}
