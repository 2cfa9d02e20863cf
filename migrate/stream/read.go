package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// Pages may also be read into a buffer: by people and tools that look at the image,
// and by the kernel for a mapping of a file that the destination lacks. The store
// knows nothing of that, and nothing is placed.

// ErrNoLanes: there is no lane to read on, or the one that was asked is lost.
var ErrNoLanes = errors.New("stream: no lanes to the source")

// errRound: see Read.
var errRound = errors.New("stream: the memory of a process that runs at the source cannot be read")

// read is one call of Read.
type read struct {
	space  page.Space
	first  page.Num
	demand bool
	done   chan error // has room for one

	// Under Fetcher.mu.
	ask     page.Set // to be asked for
	missing page.Set // not in buf yet

	mu   sync.Mutex // nothing is taken under it
	over bool       // buf is the caller's again
	buf  []byte
}

// readQueue is the reads that have something to be asked for, a piece of each in turn.
// Those of the urgent lane are demands.
type readQueue struct{ urgent, bulk []*read }

func (q *readQueue) of(demand bool) *[]*read {
	if demand {
		return &q.urgent
	}
	return &q.bulk
}

// Read fills buf, whose length is a whole number of pages, with the pages of space
// from first on. Safe for concurrent use; any number of reads may be under way, and
// buf is not touched after it has returned.
//
// A Demand goes on the urgent lane, and outlives lanes: what one owed is asked for
// again on the next, and it waits for that until ctx or the fetcher ends. Any other
// goes on bulk lanes, before all that is fetched in the background and never before
// a fault, whether or not the background stream was started. It fails with
// ErrNoLanes where there is no such lane, or one that was asked is lost. When the
// source refuses, the error is that of ErrRefused, for this read alone.
//
// Preconditions: the process is frozen at the source, or space is that of a file.
// Who tracks a running process takes what it reads for what the destination has.
func (f *Fetcher) Read(ctx context.Context, space page.Space, first page.Num, buf []byte, prio page.Priority) error {
	r := page.Range{Start: first.Addr(), End: first.Addr() + page.Addr(len(buf))}
	if len(buf) == 0 || len(buf)%page.Size != 0 {
		return fmt.Errorf("stream: read %d bytes of space %d: not whole pages", len(buf), space)
	}
	if last := page.Num(1<<(64-page.Shift) - 1); first > last || page.Num(len(buf)>>page.Shift) > last-first {
		return fmt.Errorf("stream: read %d bytes from page %#x of space %d: beyond the end of all addresses", len(buf), uint64(first), space)
	}
	rd := &read{space: space, first: first, demand: prio >= page.Demand, done: make(chan error, 1),
		ask: page.NewSet(r), missing: page.NewSet(r), buf: buf}
	lanes, err := f.enqueue(rd)
	if err == nil {
		for _, l := range lanes {
			if l.urgent == rd.demand {
				l.pump()
			}
		}
		select {
		case err = <-rd.done:
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-f.ticker:
			err = transport.ErrClosed
		}
		f.forget(rd)
	}
	if err != nil {
		return fmt.Errorf("stream: read %v of space %d: %w", r, space, err)
	}
	return nil
}

// enqueue puts rd where lanes take from, and returns them, another one first each
// time.
func (f *Fetcher) enqueue(rd *read) ([]*lane, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.closed:
		return nil, transport.ErrClosed
	case rd.space < page.FirstFileSpace && f.now.Load().done != nil:
		return nil, errRound
	case !rd.demand && !f.bulk():
		return nil, ErrNoLanes
	}
	q := f.reads.of(rd.demand)
	*q = append(*q, rd)
	lanes := slices.Clone(f.lanes)
	if n := len(lanes); n > 0 {
		f.turn++
		k := f.turn % n
		lanes = append(lanes[k:], lanes[:k]...)
	}
	return lanes, nil
}

// bulk reports whether there is a bulk lane; mu is held.
func (f *Fetcher) bulk() bool {
	return slices.ContainsFunc(f.lanes, func(l *lane) bool { return !l.urgent })
}

// forget ends the use of rd's buffer. What was asked for comes all the same, and is
// dropped.
func (f *Fetcher) forget(rd *read) {
	f.mu.Lock()
	rd.ask, rd.missing = page.Set{}, page.Set{}
	q := f.reads.of(rd.demand)
	if i := slices.Index(*q, rd); i >= 0 {
		*q = slices.Delete(*q, i, i+1)
	}
	f.mu.Unlock()
	rd.mu.Lock()
	rd.over = true
	rd.mu.Unlock()
}

// end tells the reader, once.
func (rd *read) end(err error) {
	select {
	case rd.done <- err:
	default:
	}
}

// takeRead takes what l is to ask for next of what is read, or nil. What reads have
// under way on a lane is bounded as the background is, apart from that: neither
// keeps the other from getting on, and a fault has little before it.
func (f *Fetcher) takeRead(l *lane) (*request, []page.Range) {
	f.mu.Lock()
	defer f.mu.Unlock()
	q := f.reads.of(l.urgent)
	for len(*q) > 0 && (*q)[0].ask.Empty() {
		*q = slices.Delete(*q, 0, 1)
	}
	if len(*q) == 0 {
		return nil, nil
	}
	chunk := int64(f.cfg.Chunk) &^ (page.Size - 1)
	if owed := l.reading.Load(); owed > 0 && owed+chunk > int64(f.cfg.Window) {
		return nil, nil
	}
	rd := (*q)[0]
	var rs []page.Range
	for _, r := range rd.ask.Ranges() {
		r.End = r.Start + page.Addr(min(r.Bytes(), uint64(chunk)))
		if rs = append(rs, r); len(rs) == maxRuns {
			break
		}
		if chunk -= int64(r.Bytes()); chunk < page.Size {
			break
		}
	}
	for _, r := range rs {
		rd.ask.Remove(r)
	}
	// The others' turn: a page that a thread waits for has but a piece of each before
	// it, not all that was read ahead for another thread.
	if *q = slices.Delete(*q, 0, 1); !rd.ask.Empty() {
		*q = append(*q, rd)
	}
	return &request{space: rd.space, read: rd}, rs
}

// fill puts the content of r into the reader's buffer; nil stands for zeros.
func (f *Fetcher) fill(rd *read, r page.Range, content []byte) {
	rd.mu.Lock()
	if !rd.over {
		b := rd.buf[r.Start-rd.first.Addr():][:r.Bytes()]
		if content == nil {
			clear(b)
		} else {
			copy(b, content)
		}
	}
	rd.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	rd.ask.Remove(r) // it may have been given back by then
	if len(rd.missing.Remove(r)) > 0 && rd.missing.Empty() {
		rd.end(nil)
	}
}

// readLost is called with what a lane owed of a read; mu is held.
func (f *Fetcher) readLost(rd *read, rs []page.Range) {
	switch {
	case f.closed:
		rd.end(transport.ErrClosed)
	case !rd.demand:
		rd.end(ErrNoLanes)
	default:
		for _, r := range rs {
			for _, part := range rd.missing.Intersect(r) { // nothing of one that is over
				rd.ask.Add(part)
			}
		}
		if !rd.ask.Empty() && !slices.Contains(f.reads.urgent, rd) {
			f.reads.urgent = slices.Insert(f.reads.urgent, 0, rd)
		}
	}
}

// noBulk ends what waits for a bulk lane where there is none; mu is held.
func (f *Fetcher) noBulk() {
	if f.bulk() {
		return
	}
	for _, rd := range f.reads.bulk {
		rd.end(ErrNoLanes)
	}
}

// readRefused ends the read that request id is of, if it is of one.
func (l *lane) readRefused(id uint64, reason error) bool {
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	req := l.reqs[id]
	if req == nil || req.read == nil {
		return false
	}
	delete(l.reqs, id)
	left := req.left.Bytes()
	req.left = page.Set{}
	l.paid(req, left)
	req.read.end(reason)
	return true
}

// paid takes what has come of req, of which owed bytes were to come, off what the
// lane owes; mu is held.
func (l *lane) paid(req *request, owed uint64) {
	d := int64(req.left.Bytes()) - int64(owed)
	l.owed.Add(d)
	if req.read != nil {
		l.reading.Add(d)
	}
}

// fetching reports whether the lane owes pages of the process; mu is held.
func (l *lane) fetching() bool {
	for _, r := range l.reqs {
		if r.read == nil {
			return true
		}
	}
	return false
}

// Source is one space, to be read by whoever knows nothing of lanes. Reads in the
// background are made as a Reader's.
func (f *Fetcher) Source(space page.Space) page.Source { return source{f, space} }

type source struct {
	f     *Fetcher
	space page.Space
}

func (s source) ReadPages(ctx context.Context, first page.Num, buf []byte, prio page.Priority) error {
	return s.f.Read(ctx, s.space, first, buf, prio)
}
