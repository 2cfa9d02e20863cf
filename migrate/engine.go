package migrate

import (
	"context"
	"errors"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// Memory says which pages of one address space have content; see
// checkpoint/image.Memory, of which it is the form on the wire.
type Memory struct {
	Space page.Space
	Lazy  page.Set // may arrive after the process runs
	Eager page.Set // must be in place before it runs
	Hot   page.Set // part of Lazy, touched at once
	// Guards are where an access is a fault of the program.
	Guards page.Set
	// Dirty are pages of Lazy and Eager that may differ from what a round brought.
	Dirty page.Set
}

// sets are all of them, in the order of the wire.
func (m *Memory) sets() []*page.Set {
	return []*page.Set{&m.Lazy, &m.Eager, &m.Hot, &m.Guards, &m.Dirty}
}

// State is the process at the freeze: an opaque image (checkpoint/image.Encode)
// and the map of its memory.
type State struct {
	Image  []byte
	Memory []Memory
	// Rest waits for the part of the map of memory that is not in Memory: finding
	// it takes time for each GiB, in which the destination can begin. Nil where
	// there is none. It is called once, with the process as Freeze left it. At the
	// destination it is always there, and Arrival.Rebuild must call it.
	Rest func(context.Context) ([]Memory, error)
	// Stopped is when the process stopped, where that took Freeze more than one try;
	// zero for when it was called. It does not cross.
	Stopped time.Time
}

// ErrGone: the process, or what was left of a migration, does not exist any
// more. Methods of Process and Arrival, and Host.Adopt, wrap it.
var ErrGone = errors.New("migrate: the process is gone")

// Look is what one look at the memory of a running process found.
type Look struct {
	// Layout describes the mappings that pages can be landed in, in the engine's
	// own form.
	Layout []byte
	// Content are the pages in them, and Written those of Content that may have
	// been written since the look before; at the first all of them. Whoever reads
	// a page after the look gets all that Written does not tell the next time.
	Content, Written page.Set
	// Compared are those of Content of which it is only known whether they are as
	// they were when they were read last: they are in Written until they are. To find
	// out takes time for each byte, also at the freeze.
	Compared page.Set
	// Remade is where a destination that was laid out as the Look before said makes
	// mappings anew for this one. What has landed there is lost, content or not.
	Remade page.Set
}

// Process is a process at the source. Its methods are called by one goroutine
// at a time, but Kill and Thaw must be safe at any moment after Isolate.
type Process interface {
	// Isolate moves the process into a child cgroup of its own.
	Isolate(ctx context.Context) error
	// Track begins to note what the running process writes; Thaw, Kill and Close
	// end that, and so does the death of this program. It returns the method.
	Track(ctx context.Context) (string, error)
	// Look says what there is, and what was written since the Look before. Only
	// after Track and before Freeze, whose State has in Memory.Dirty what was
	// written since the last Look.
	Look(ctx context.Context) (Look, error)
	// Peek returns those of pages that have been written since the last Look. It
	// may return too few.
	Peek(pages *page.Set) (page.Set, error)
	// SwitchNears says, in the rounds, that Isolate and Freeze may follow soon: what
	// costs time for each GiB can be read beside the last pages of a round.
	SwitchNears()
	// Throttle keeps the running process from running for that part of its time, 0
	// to below 1, until it is called again, or Freeze, Thaw or Close is, or this
	// program ends.
	Throttle(part float64) error
	// Freeze stops every thread and captures. On error the process runs on. What
	// costs time for each GiB is read before, by Isolate; it may be called again
	// for that, shortly before.
	Freeze(ctx context.Context) (State, error)
	// Hold freezes the child cgroup and lets go of the threads: from here
	// nothing but Thaw lets the process run, whatever dies.
	// It is also called on a process that runs and must not, when a person
	// resolved for the destination.
	Hold(ctx context.Context) error
	// Held reports whether the process is in the frozen child cgroup, as Hold
	// left it: a daemon that comes back asks before it decides. ErrGone where
	// there is no process any more.
	Held(ctx context.Context) (bool, error)
	// Thaw undoes Freeze, Hold and Isolate, in whatever state the process is:
	// it runs on as if nothing had been. Idempotent.
	Thaw(ctx context.Context) error
	// Kill ends the frozen copy after its pages are no longer needed.
	// Idempotent.
	Kill(ctx context.Context) error
	// ReadPages copies the pages of rs one after the other into buf. Safe for
	// concurrent use after Track or Freeze. What a running process does not have any
	// more reads as zeros.
	ReadPages(space page.Space, rs []page.Range, buf []byte) error
	// Close lets go of handles and changes nothing about the process.
	Close() error
}

// Arrival is the destination's side of one migration: skeleton, pager and
// cgroup. Prepared by Host before the freeze.
type Arrival interface {
	// LaneKey is the one-time key that the lanes of this epoch are bound to.
	LaneKey() []byte
	// Land brings the process-to-be to the layout of a batch, and fetches its pages
	// to where they will be, over the lanes. Before Rebuild, which keeps those that
	// are not in Memory.Dirty.
	Land(ctx context.Context, b Batch) (Landed, error)
	// Rebuild makes the stopped process, registers its memory with the trap
	// and leaves it held by its own frozen cgroup, untraced. Every eager page
	// is in place when it returns, with all set every page.
	Rebuild(ctx context.Context, st State, all bool) error
	// Release lets the process run: a thaw, idempotent. pid is what the
	// destination's host calls it.
	Release(ctx context.Context) (pid int, err error)
	// Fetch begins the background stream; it may be called before Release
	// has returned. Idempotent.
	Fetch(ctx context.Context) error
	// Resident waits until the last page has arrived and nothing of the
	// appliance is left in the process. It returns nil, too, once the process
	// has ended by itself: it will want no more pages. ErrGone where it was
	// lost. Any other error is tried again. Broken lanes are no error here. Where
	// Offer.Keep was said it waits for a person's release, too.
	Resident(ctx context.Context) error
	// Finish is called after Resident, once that is journalled: it removes the
	// traces by which Adopt finds the arrival. Until then Adopt must succeed,
	// also after Resident has returned, and Resident again. Idempotent.
	Finish(ctx context.Context) error
	// Abort ends everything: no process, no pager, no cgroup, no file.
	// Idempotent.
	Abort(ctx context.Context) error
	// NewEpoch forgets the lanes after a broken link and returns the key for
	// the next ones. The first epoch, of Prepare and LaneKey, is 1; each later
	// one is above all before it, whatever daemon had them.
	NewEpoch(ctx context.Context) (epoch uint32, key []byte, err error)
	// Stats is a snapshot for progress and the final report. Safe at any time,
	// during Rebuild and Resident too.
	Stats() ArrivalStats
	// Close lets go of handles; process and pager stay.
	Close() error
}

// Count is pages, and the bytes that they took on the wire without frames.
type Count struct {
	Pages uint64 `json:"pages"`
	Bytes uint64 `json:"bytes"`
}

// Saved is what was sent how: as it is, not at all because it is zero, compressed,
// as what had changed, or as equal to another page.
type Saved struct {
	Raw   Count `json:"raw"`
	Zero  Count `json:"zero"`
	LZ4   Count `json:"lz4"`
	Delta Count `json:"delta"`
	Same  Count `json:"same"`
}

// Batch is what is to be landed while the process runs at the source.
type Batch struct {
	Layout  []byte     // see Look; nil: as in the batch before
	Gone    page.Set   // pages that were landed and are no content any more
	Classes []page.Set // pages to fetch, one class after the other
}

// Landed is what became of a batch.
type Landed struct {
	Pages, PagesZero, BytesWire uint64
	Took                        time.Duration
}

// ArrivalStats counts pages and bytes at the destination.
type ArrivalStats struct {
	PagesTotal, PagesResident, PagesZero, PagesFaulted, PagesDouble uint64
	BytesWire                                                       uint64
	FaultP50us, FaultP99us, FaultMaxus                              float64
	PagesLanded                                                     uint64 // while the process ran at the source, resent ones again
	PagesOneSided                                                   uint64 // read from the source's memory by RDMA
}

// Host is the destination's daemon as migrate sees it.
type Host interface {
	// Prepare decides whether to take what is offered (a *Refusal where not)
	// and makes everything ready that can be before the freeze.
	Prepare(ctx context.Context, id transport.MigrationID, offer Offer) (Arrival, error)
	// Adopt takes up what an earlier daemon left of an arrival, frozen or
	// running. ErrGone where nothing of it is left, and where the process is
	// not there any more without having ended by itself.
	Adopt(ctx context.Context, id transport.MigrationID) (Arrival, error)
}

// Lanes is how the source opens its page lanes and serves them: the appliance's
// adapter over a transport and migrate/stream.
type Lanes interface {
	// Open connects the urgent and bulk lanes of an epoch and begins to serve
	// pages of p on them in the background. What is left of an earlier epoch is
	// closed first.
	Open(ctx context.Context, epoch uint32, key []byte, p Process) error
	// Lost is closed or receives when a lane of the current epoch has failed.
	// It is asked for again after every Open. A lane that the destination
	// closed in good order, because it needs no more pages, has not failed.
	Lost() <-chan error
	// Round tells what will be fetched next while the process runs, and what the
	// destination gives up, so that pages may be sent as what has changed of them.
	// Everything of the round before has been placed. again: these pages were sent
	// before, and are likely to be sent once more. 0: from here on the process may
	// run at the destination.
	Round(number uint32, again bool, send, gone *page.Set)
	// BytesSent on all page lanes so far.
	BytesSent() uint64
	// Saved says what was sent how.
	Saved() Saved
	Close() error
}
