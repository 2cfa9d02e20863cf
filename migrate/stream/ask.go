package stream

import (
	"errors"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// pump asks for more until the window is full or there is nothing to ask for.
// Where somebody is asking already, they look once more instead.
func (l *lane) pump() {
	l.again.Store(true)
	for l.again.Load() && l.sendMu.TryLock() {
		l.again.Store(false)
		l.pumpLocked()
		l.sendMu.Unlock()
	}
}

func (l *lane) pumpLocked() {
	for {
		req, rs := l.f.takeRead(l)
		if req == nil {
			break
		}
		if !l.send(req, rs) {
			return
		}
	}
	for !l.urgent {
		w := l.f.now.Load()
		if w.window-int(l.owed.Load()-l.reading.Load()) < w.chunk {
			return
		}
		src, rs := l.f.take(w.chunk >> page.Shift)
		if src == nil || !l.send(l.f.request(src), rs) {
			return
		}
	}
}

// askPages asks for single pages.
func (l *lane) askPages(space page.Space, pages []page.Num) {
	src := l.f.now.Load().st.Source(space)
	if src == nil {
		return
	}
	l.sendMu.Lock()
	defer func() {
		l.sendMu.Unlock()
		if l.again.Load() {
			l.pump()
		}
	}()
	for len(pages) > 0 {
		k := min(len(pages), maxRuns)
		var set page.Set
		for _, n := range pages[:k] {
			set.Add(page.PageOf(n.Addr()))
		}
		pages = pages[k:]
		l.f.mu.Lock()
		fl := l.f.flightOf(src)
		l.f.mu.Unlock()
		for _, r := range set.Ranges() {
			src.Each(r, func(p page.Range, i int) { fl.out.AtomicSetRange(i, i+p.Pages()) })
		}
		if !l.send(l.f.request(src), set.Ranges()) {
			return
		}
	}
}

// send asks for rs, or reads what of them can be read without asking; sendMu is held.
// It reports whether the lane lives.
func (l *lane) send(req *request, rs []page.Range) bool {
	if read, rest := l.remote(req, rs); len(read) > 0 {
		if !l.sendRemote(req, read, rest) {
			return false
		}
		if len(rest) == 0 {
			return true
		}
		req, rs = req.again(), rest
	}
	id, ok := l.enter(req, rs, 0)
	if !ok {
		return false
	}
	l.want.ID, l.want.Runs = id, l.want.Runs[:0]
	for _, r := range rs {
		l.want.Runs = append(l.want.Runs, wire.Run{Space: req.space, Count: uint32(r.Pages()), First: r.Start.Page()})
	}
	l.meta = wire.AppendWant(l.meta[:0], l.want)
	if err := l.tl.Send(transport.Frame{Type: wire.TypeWant, Meta: l.meta}); err != nil {
		if !errors.Is(err, transport.ErrClosed) {
			l.fail(err)
		}
		return false
	}
	return true
}

// enter takes a request into the books of the lane, and so many who will read for it,
// unless the lane has ended.
func (l *lane) enter(req *request, rs []page.Range, readers int) (id uint64, ok bool) {
	req.left = page.NewSet(rs...)
	bytes := int64(req.left.Bytes())
	id = l.f.nextID.Add(1)
	l.f.mu.Lock()
	defer l.f.mu.Unlock()
	attached := false
	for _, o := range l.f.lanes {
		attached = attached || o == l
	}
	if !attached {
		l.f.giveBack(req, rs)
		return 0, false
	}
	l.reqs[id] = req
	l.readers.Add(readers)
	if req.read != nil {
		l.reading.Add(bytes)
	}
	if l.owed.Add(bytes) == bytes {
		l.progress.Store(time.Now().UnixNano())
	}
	return id, true
}
