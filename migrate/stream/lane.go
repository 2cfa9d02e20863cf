package stream

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// lane is the fetcher's end of one lane.
type lane struct {
	f        *Fetcher
	tl       transport.Lane
	urgent   bool
	dropped  atomic.Bool  // by us: nobody is told
	progress atomic.Int64 // when something came, or was asked for while nothing was owed
	owed     atomic.Int64 // bytes
	why      atomic.Pointer[error]

	sendMu sync.Mutex
	want   wire.Want // under sendMu
	meta   []byte

	reqs map[uint64]*request // under Fetcher.mu

	// The receiver's own.
	pages wire.Pages
	dec   *codec.Decoder
	rooms *transport.Pool
	room  *transport.Buffer // of the decoder, from rooms
	fails int
}

// request is what was asked for and has not come.
type request struct {
	src    *pagestore.Source
	placer Placer
	left   page.Set
}

// fail closes the lane for a reason of ours.
func (l *lane) fail(err error) {
	l.why.CompareAndSwap(nil, &err)
	l.tl.Close()
}

// run receives until the lane ends.
func (l *lane) run() {
	defer l.f.wg.Done()
	if l.urgent {
		runtime.LockOSThread() // and never unlocked: the thread ends with its priority
		if l.f.cfg.OnUrgent != nil {
			l.f.cfg.OnUrgent()
		}
	}
	err := l.receive()
	l.free()
	l.tl.Close()
	if why := l.why.Load(); why != nil {
		err = *why
	}
	if !l.dropped.Load() {
		l.f.now.Load().lose(l.tl.ID(), err)
	}
	l.f.detach(l)
	if !l.dropped.Load() {
		l.f.st.Add(pagestore.Lanes, 1)
		l.f.log.Warn("page lane lost", "lane", l.tl.ID().Kind, "index", l.tl.ID().Index, "err", err)
		if l.f.cfg.OnLost != nil {
			l.f.cfg.OnLost(l.tl.ID(), err)
		}
	}
}

func (l *lane) receive() error {
	for {
		fr, err := l.tl.Recv()
		if err != nil {
			return err
		}
		l.progress.Store(time.Now().UnixNano())
		switch fr.Type {
		case wire.TypePages:
			err = l.take(fr)
		case wire.TypeRefuse:
			err = l.refused(fr)
		case wire.TypePong:
		default:
			err = fmt.Errorf("%w: %v on a page lane of the destination", transport.ErrDamaged, fr.Type)
		}
		fr.Payload.Release()
		if err != nil {
			return err
		}
		l.f.check()
	}
}

// refused ends the lane with the source's reason. Asking again on the same lane
// would get the same answer.
func (l *lane) refused(fr transport.Frame) error {
	r, err := wire.ParseRefuse(fr.Meta)
	if err != nil {
		return fmt.Errorf("%w: %w", transport.ErrDamaged, err)
	}
	if r.Code == wire.RefuseGone {
		return fmt.Errorf("%w: %w: %s", ErrRefused, ErrGone, r.Text)
	}
	return fmt.Errorf("%w: %v: %s", ErrRefused, r.Code, r.Text)
}

// take verifies and places what a Pages frame brought.
func (l *lane) take(fr transport.Frame) error {
	f, p := l.f, &l.pages
	var data []byte
	if fr.Payload != nil {
		data = fr.Payload.Bytes()
	}
	if err := wire.ParsePages(fr.Meta, len(data), p); err != nil {
		return fmt.Errorf("%w: %w", transport.ErrDamaged, err)
	}
	f.mu.Lock()
	req := l.reqs[p.ID]
	f.mu.Unlock()
	if req == nil {
		return fmt.Errorf("%w: an answer to what was not asked", transport.ErrDamaged)
	}
	if err := l.came(req, p.Runs, fr.Flags&wire.FlagLast != 0); err != nil {
		return err
	}
	if !l.urgent {
		l.pump() // so that the source has something to do while these are placed
	}
	if err := l.decoder(p); err != nil {
		return err
	}
	l.dec.Begin(p, data)
	for i, run := range p.Runs {
		content, err := l.dec.Next()
		if err != nil {
			f.st.Add(pagestore.Bad, 1)
			err = fmt.Errorf("%w: %w", transport.ErrDamaged, err)
		}
		r := run.Range()
		// A run may cross from one range of the source into the next.
		req.src.Each(r, func(part page.Range, first int) {
			if err == nil {
				off := part.Start - r.Start
				var d []byte
				if content != nil {
					d = content[off : off+page.Addr(part.Bytes())]
				}
				err = l.place(req, run.Kind, part, first, d)
			}
		})
		if err != nil {
			f.mu.Lock()
			for _, run := range p.Runs[i:] {
				f.giveBack(req.src, []page.Range{run.Range()})
			}
			f.mu.Unlock()
			return err
		}
	}
	return nil
}

// decoder sees to it that there is one, and that it has room of its own for what
// is encoded: what is placed must not be memory of the Go heap.
func (l *lane) decoder(p *wire.Pages) error {
	if l.dec == nil {
		l.dec = codec.NewDecoder(l.f)
	}
	if len(p.Lengths) == 0 || l.room != nil {
		return nil
	}
	pool, err := transport.NewPool(1, wire.MaxBlockPages*page.Size)
	if err != nil {
		return err
	}
	l.rooms, l.room = pool, pool.Get(wire.MaxBlockPages*page.Size, nil)
	l.dec.SetScratch(l.room.Bytes())
	return nil
}

// free gives that room back.
func (l *lane) free() {
	if l.room != nil {
		l.room.Release()
		l.room = nil
		if err := l.rooms.Close(); err != nil {
			l.f.log.Error("page lane kept buffers", "err", err)
		}
	}
}

// came takes runs that have arrived off what is owed. On error nothing of them
// counts as arrived.
func (l *lane) came(req *request, runs []wire.Run, last bool) (err error) {
	f := l.f
	f.mu.Lock()
	defer f.mu.Unlock()
	owed := req.left.Bytes()
	for i, run := range runs {
		r := run.Range()
		var n uint64
		if run.Space != req.src.ID() {
			err = fmt.Errorf("%w: pages of another address space", transport.ErrDamaged)
		} else {
			for _, c := range req.left.Remove(r) {
				n += c.Bytes()
			}
		}
		if err == nil && n != r.Bytes() {
			err = fmt.Errorf("%w: pages %v were not asked for, or came twice", transport.ErrDamaged, r)
		}
		if err != nil {
			for _, run := range runs[:i+1] {
				f.giveBack(req.src, []page.Range{run.Range()})
			}
			return err
		}
	}
	l.owed.Add(int64(req.left.Bytes()) - int64(owed))
	if last && !req.left.Empty() {
		err = fmt.Errorf("%w: an answer that leaves out what was asked", transport.ErrDamaged)
		for _, run := range runs {
			f.giveBack(req.src, []page.Range{run.Range()})
		}
		return err
	}
	if last {
		delete(l.reqs, l.pages.ID)
	}
	return nil
}

// place hands one run to the placer. The pages are in one range of the source.
func (l *lane) place(req *request, kind wire.RunKind, r page.Range, first int, data []byte) error {
	f, src := l.f, req.src
	n := r.Pages()
	var err error
	switch {
	case kind.Content():
		_, err = req.placer.Place(src.ID(), r, data)
	case kind == wire.RunZero:
		var k int
		k, err = req.placer.Zero(src.ID(), r)
		f.st.Add(pagestore.Zeros, uint64(k))
	default:
		_, err = req.placer.Absent(src.ID(), r)
	}
	f.mu.Lock()
	fl := f.flightOf(src)
	f.mu.Unlock()
	if err == nil {
		fl.out.AtomicClearRange(first, first+n)
		if d := n - fl.got.AtomicSetRange(first, first+n); d > 0 {
			f.st.Add(pagestore.Doubles, uint64(d))
		}
		l.fails = 0
		return nil
	}
	f.log.Warn("pages cannot be placed, trying again", "range", r, "err", err)
	f.mu.Lock()
	f.giveBack(src, []page.Range{r})
	f.mu.Unlock()
	if l.fails++; l.fails > 100 {
		return fmt.Errorf("stream: place %v: %w", r, err)
	}
	time.Sleep(time.Duration(l.fails) * time.Millisecond) // memory is short
	return nil
}

// pump asks for more until the window is full or there is nothing to ask for.
func (l *lane) pump() {
	l.sendMu.Lock()
	defer l.sendMu.Unlock()
	l.pumpLocked()
}

func (l *lane) pumpLocked() {
	for {
		w := l.f.now.Load()
		if w.window-int(l.owed.Load()) < w.chunk {
			return
		}
		src, rs := l.f.take(w.chunk >> page.Shift)
		if src == nil || !l.send(src, rs) {
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
	defer l.sendMu.Unlock()
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
		if !l.send(src, set.Ranges()) {
			return
		}
	}
}

// send sends one request; sendMu is held. It reports whether the lane lives.
func (l *lane) send(src *pagestore.Source, rs []page.Range) bool {
	req := &request{src: src, placer: l.f.now.Load().placer, left: page.NewSet(rs...)}
	id := l.f.nextID.Add(1)
	l.f.mu.Lock()
	attached := false
	for _, o := range l.f.lanes {
		attached = attached || o == l
	}
	if !attached {
		l.f.giveBack(src, rs)
		l.f.mu.Unlock()
		return false
	}
	l.reqs[id] = req
	l.f.mu.Unlock()
	l.want.ID, l.want.Runs = id, l.want.Runs[:0]
	for _, r := range rs {
		l.want.Runs = append(l.want.Runs, wire.Run{Space: src.ID(), Count: uint32(r.Pages()), First: r.Start.Page()})
	}
	l.meta = wire.AppendWant(l.meta[:0], l.want)
	if l.owed.Add(int64(req.left.Bytes())) == int64(req.left.Bytes()) {
		l.progress.Store(time.Now().UnixNano())
	}
	if err := l.tl.Send(transport.Frame{Type: wire.TypeWant, Meta: l.meta}); err != nil {
		if !errors.Is(err, transport.ErrClosed) {
			l.fail(err)
		}
		return false
	}
	return true
}
