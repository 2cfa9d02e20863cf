package stream

import (
	"context"
	"errors"
	"time"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// remote is what of a request for rs can be read from the source's memory itself,
// and the rest. Nobody takes part in that at the source.
func (l *lane) remote(req *request, rs []page.Range) ([]transport.Remote, []page.Range) {
	r, ok := l.tl.(transport.RemoteReader)
	if !ok || l.f.cfg.Remote == nil || req.read != nil {
		return nil, rs
	}
	return r.Offered().Split(req.space, rs)
}

// mostRemote is how much is read at a time: what a thread waits for queues behind it.
const mostRemote = 32 << 10

// sendRemote begins to read; sendMu is held. rest is given back, too, where the lane
// has ended.
func (l *lane) sendRemote(req *request, read []transport.Remote, rest []page.Range) bool {
	size := min(page.Addr(l.f.cfg.Remote.BufferSize()), mostRemote)
	var pieces []transport.Remote
	rs := make([]page.Range, 0, len(read))
	for _, m := range read {
		rs = append(rs, m.Range)
		for at, end := m.Range.Start, m.Range.End; at < end; at += size {
			m.Range = page.Range{Start: at, End: min(at+size, end)}
			pieces = append(pieces, m)
		}
	}
	id, ok := l.enter(req, rs, len(pieces))
	if !ok {
		l.f.mu.Lock()
		l.f.giveBack(req, rest)
		l.f.mu.Unlock()
		return false
	}
	for _, m := range pieces {
		go func() {
			defer l.readers.Done()
			if err := l.readRemote(id, req, m); err != nil && !errors.Is(err, transport.ErrClosed) {
				l.fail(err)
			}
		}()
	}
	return true
}

// readRemote reads one piece, and hands it on. What a lane owes when it ends is
// asked for again on another.
func (l *lane) readRemote(id uint64, req *request, m transport.Remote) error {
	b := l.f.cfg.Remote.Get(int(m.Range.Bytes()), l.ended)
	if b == nil {
		return transport.ErrClosed
	}
	defer b.Release()
	if err := l.tl.(transport.RemoteReader).ReadRemote(context.Background(), m.Key, uint64(m.Range.Start), b); err != nil {
		return err
	}
	l.progress.Store(time.Now().UnixNano())
	run := wire.Run{Space: req.space, Count: uint32(m.Range.Pages()), First: m.Range.Start.Page()}
	if err := l.came(id, req, []wire.Run{run}, false); err != nil {
		return err
	}
	l.f.st.Add(pagestore.OneSided, uint64(m.Range.Pages()))
	if !l.urgent {
		l.pump()
	}
	defer l.f.check()
	return l.putRemote(req, m.Range, b.Bytes())
}

// putRemote places r, page by page where some are zero.
func (l *lane) putRemote(req *request, r page.Range, data []byte) error {
	for !r.Empty() {
		zero, n := codec.Run(data)
		part := page.Range{Start: r.Start, End: r.Start + page.Addr(n)<<page.Shift}
		kind := wire.RunData
		if zero {
			kind = wire.RunZero
		}
		var err error
		req.src.Each(part, func(p page.Range, first int) {
			if err == nil {
				off := p.Start - part.Start
				err = l.place(req, kind, p, first, data[off:off+page.Addr(p.Bytes())])
			}
		})
		if err != nil {
			l.f.mu.Lock()
			l.f.giveBack(req, []page.Range{r})
			l.f.mu.Unlock()
			return err
		}
		r.Start, data = part.End, data[n<<page.Shift:]
	}
	return nil
}
