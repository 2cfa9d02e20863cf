package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// Landing is a round of pages that come while the process still runs at the
// source. They are put at their final places in the process-to-be, which stands
// still, in mappings that can be written.
type Landing struct {
	Space page.Space
	PID   int // of the process-to-be
	// UFFD is a userfaultfd of that process by which pages that are missing are
	// placed: registered, without events, and with UFFD_FEATURE_SIGBUS. It stays the
	// caller's. Pages that are there are written over by process_vm_writev(2).
	UFFD *os.File
	// Classes are the pages, in the order in which they are to be fetched; disjoint.
	Classes []page.Set
	// Backed is where there is something though no page has landed, as in private
	// mappings of files: nothing is missing there, and nothing is zero by itself.
	Backed page.Set
}

// Landed is what became of a round.
type Landed struct {
	Pages     uint64        `cbor:"1,keyasint"`
	PagesZero uint64        `cbor:"2,keyasint"` // of them
	BytesWire uint64        `cbor:"3,keyasint"` // received meanwhile
	Took      time.Duration `cbor:"4,keyasint"`
}

// Land fetches a round, before anything is adopted, and returns when all of it is
// in place. A pager that dies in between leaves nothing but pages half written.
func (c *Client) Land(ctx context.Context, l Landing) (Landed, error) {
	if l.UFFD == nil {
		return Landed{}, errors.New("pager: land pages without a userfaultfd")
	}
	p, err := c.call(ctx, opLand, landMsg{l.Space, l.PID, l.Classes, l.Backed}, l.UFFD)
	if err != nil {
		return Landed{}, err
	}
	return decode[Landed](p)
}

type landMsg struct {
	Space   page.Space `cbor:"1,keyasint"`
	PID     int        `cbor:"2,keyasint"`
	Classes []page.Set `cbor:"3,keyasint"`
	Backed  page.Set   `cbor:"4,keyasint"`
}

// roundStore is the name of the memfd of a round.
const roundStore = "pageferry-round"

// land does one round. Only one is done at a time: the fetcher sees to it.
func (s *server) land(m landMsg, uffd *os.File) (_ Landed, err error) {
	begin, before := time.Now(), s.fetch.Received()
	var all page.Set
	var pages uint64
	for i := range m.Classes {
		all = page.Union(&all, &m.Classes[i])
		pages += m.Classes[i].Pages()
	}
	if all.Pages() != pages {
		return Landed{}, errors.New("pager: the classes of a round overlap")
	}
	if all.Empty() {
		return Landed{}, nil
	}
	st, err := pagestore.Create(roundStore)
	if err != nil {
		return Landed{}, err
	}
	defer func() {
		if err == nil { // else a lane may still look at it
			err = st.Close()
		}
	}()
	src, err := st.AddSource(m.Space, all, page.Set{}, page.Set{})
	if err != nil {
		return Landed{}, err
	}
	segs := make([]pagestore.Segment, 0, all.Len())
	for _, r := range all.Ranges() {
		segs = append(segs, pagestore.Segment{Dst: r, Src: r.Start, Flags: pagestore.Written})
	}
	sp, err := st.AddSpace(src, m.PID, -1, -1, segs)
	if err != nil {
		return Landed{}, err
	}
	if s.landPID != m.PID {
		s.landPID, s.written = m.PID, page.Set{}
	}
	fd, err := dupHigh(uffd)
	if err != nil {
		return Landed{}, err
	}
	defer func() {
		if err == nil { // likewise
			unix.Close(fd)
		}
	}()
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	there := page.Union(&s.written, &m.Backed)
	l := &lander{pid: m.PID, uffd: fd, space: sp, ended: cancel, written: page.Intersection(&there, &all)}
	s.landing.Store(l)
	defer s.landing.Store(nil)
	err = s.fetch.Round(ctx, stream.Round{Store: st, Placer: l, Order: stream.InOrder(m.Space, m.Classes), Reader: l,
		Window: 2 * s.cfg.Window, Chunk: 2 * s.cfg.Chunk})
	if err != nil {
		return Landed{}, err
	}
	zero := page.NewSet(l.zero...)
	data := page.Difference(&all, &zero)
	s.written = page.Difference(&s.written, &zero)
	s.written = page.Union(&s.written, &data)
	s.landed.Add(pages)
	return Landed{Pages: pages, PagesZero: zero.Pages(), BytesWire: s.fetch.Received() - before, Took: time.Since(begin)}, nil
}

// lander is the placer of one round.
type lander struct {
	pid   int
	uffd  int
	space *pagestore.Space // of the round's own store
	pages atomic.Uint64    // in place
	// ended ends the round, where the process has: then no other lane can do better.
	ended context.CancelCauseFunc

	mu      sync.Mutex
	written page.Set // those that may hold something, from an earlier round or this one
	zero    []page.Range
}

// Place puts pages where they belong.
func (l *lander) Place(_ page.Space, r page.Range, data []byte) (int, error) {
	if err := l.put(r, data); err != nil {
		// Some of it may be there, and be zero when it comes again.
		some := page.NewSet(r)
		l.mu.Lock()
		l.written = page.Union(&l.written, &some)
		l.mu.Unlock()
		return 0, err
	}
	return l.settle(r), nil
}

// Zero sees to it that the pages of r are zero. Those that nobody wrote to are.
func (l *lander) Zero(_ page.Space, r page.Range) (int, error) {
	l.mu.Lock()
	written := l.written
	l.mu.Unlock()
	for _, part := range written.Intersect(r) {
		for !part.Empty() {
			piece := page.Range{Start: part.Start, End: min(part.End, part.Start+page.Addr(len(zeroes)))}
			if err := l.put(piece, zeroes[:piece.Bytes()]); err != nil {
				return 0, err
			}
			part.Start = piece.End
		}
	}
	l.mu.Lock()
	l.zero = append(l.zero, r)
	l.mu.Unlock()
	return l.settle(r), nil
}

// ReadPages reads pages that have landed.
func (l *lander) ReadPages(_ page.Space, first page.Num, buf []byte) error {
	local := [1]unix.Iovec{{Base: &buf[0], Len: uint64(len(buf))}}
	remote := [1]unix.RemoteIovec{{Base: uintptr(first.Addr()), Len: len(buf)}}
	n, err := sys.ProcessVMReadvNow(l.pid, local[:], remote[:])
	if err == nil && n != len(buf) {
		err = unix.EFAULT
	}
	if err != nil {
		l.check(err)
		return fmt.Errorf("pager: read pages of process %d that have landed at %v: %w", l.pid, first.Addr(), err)
	}
	return nil
}

// check ends the round where err says that there is nothing to land in.
func (l *lander) check(err error) {
	if err == unix.ESRCH {
		l.ended(fmt.Errorf("pager: process %d, in which pages land, has been killed: out of memory, most likely, look into the kernel's log", l.pid))
	}
}

// Absent is Zero: the source's page went away in the middle of the round.
func (l *lander) Absent(s page.Space, r page.Range) (int, error) { return l.Zero(s, r) }

var zeroes = make([]byte, 64<<10)

func (l *lander) settle(r page.Range) (n int) {
	if !l.space.RLock() {
		return 0
	}
	defer l.space.RUnlock()
	l.space.Source().Each(r, func(p page.Range, first int) { n += l.space.Settle(first, first+p.Pages()) })
	l.pages.Add(uint64(n))
	return n
}
