package stream

import (
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
	reading  atomic.Int64 // those of them that are of reads; both change under Fetcher.mu
	again    atomic.Bool  // whoever holds sendMu looks once more for what to ask
	why      atomic.Pointer[error]
	ended    chan struct{}  // closed when nothing more is received
	readers  sync.WaitGroup // who read the source's memory; grows under Fetcher.mu while attached

	sendMu sync.Mutex
	want   wire.Want // under sendMu
	meta   []byte

	reqs map[uint64]*request // under Fetcher.mu

	// The receiver's own.
	pages wire.Pages
	dec   *codec.Decoder
	rooms *transport.Pool
	room  *transport.Buffer // of the decoder, from rooms
	fails atomic.Int32
}

// request is what was asked for and has not come.
type request struct {
	space  page.Space
	src    *pagestore.Source // nil for a read
	placer Placer
	read   *read // nil for pages of the process
	left   page.Set
}

// again is a request for other pages of the same kind.
func (r *request) again() *request {
	return &request{space: r.space, src: r.src, placer: r.placer, read: r.read}
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
	close(l.ended)
	l.free()
	l.tl.Close()
	if why := l.why.Load(); why != nil {
		err = *why
	}
	if !l.dropped.Load() {
		l.f.now.Load().lose(l.tl.ID(), err)
	}
	l.f.detach(l)
	l.readers.Wait()
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

// refused ends the lane with the source's reason, as asking again on the same lane
// would get the same answer. The reason why a read was refused is its own: nothing
// says that the process's pages cannot be had.
func (l *lane) refused(fr transport.Frame) error {
	r, err := wire.ParseRefuse(fr.Meta)
	if err != nil {
		return fmt.Errorf("%w: %w", transport.ErrDamaged, err)
	}
	reason := fmt.Errorf("%w: %v: %s", ErrRefused, r.Code, r.Text)
	if r.Code == wire.RefuseGone {
		reason = fmt.Errorf("%w: %w: %s", ErrRefused, ErrGone, r.Text)
	}
	if l.readRefused(r.ID, reason) {
		l.pump()
		return nil
	}
	return reason
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
	if err := l.came(p.ID, req, p.Runs, fr.Flags&wire.FlagLast != 0); err != nil {
		return err
	}
	if !l.urgent || req.read != nil {
		l.pump() // so that the source has something to do while these are placed
	}
	done, err := l.put(req, p, data)
	if err != nil {
		f.mu.Lock()
		for _, run := range p.Runs[done:] {
			f.giveBack(req, []page.Range{run.Range()})
		}
		f.mu.Unlock()
	}
	return err
}

// put decodes and verifies runs, one after the other, and hands them on. It returns
// how many were.
func (l *lane) put(req *request, p *wire.Pages, data []byte) (int, error) {
	if err := l.decoder(p); err != nil {
		return 0, err
	}
	l.dec.Begin(p, data)
	for i, run := range p.Runs {
		content, err := l.dec.Next()
		if err != nil {
			l.f.st.Add(pagestore.Bad, 1)
			return i, fmt.Errorf("%w: %w", transport.ErrDamaged, err)
		}
		r := run.Range()
		if req.read != nil {
			l.f.fill(req.read, r, content)
			continue
		}
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
			return i, err
		}
	}
	return len(p.Runs), nil
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
func (l *lane) came(id uint64, req *request, runs []wire.Run, last bool) (err error) {
	f := l.f
	f.mu.Lock()
	defer f.mu.Unlock()
	owed := req.left.Bytes()
	defer func() { l.paid(req, owed) }()
	for i, run := range runs {
		r := run.Range()
		var n uint64
		if run.Space != req.space {
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
				f.giveBack(req, []page.Range{run.Range()})
			}
			return err
		}
	}
	if last && !req.left.Empty() {
		err = fmt.Errorf("%w: an answer that leaves out what was asked", transport.ErrDamaged)
		for _, run := range runs {
			f.giveBack(req, []page.Range{run.Range()})
		}
		return err
	}
	if last || req.left.Empty() {
		delete(l.reqs, id)
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
		l.fails.Store(0)
		return nil
	}
	f.log.Warn("pages cannot be placed, trying again", "range", r, "err", err)
	f.mu.Lock()
	f.giveBack(req, []page.Range{r})
	f.mu.Unlock()
	fails := l.fails.Add(1)
	if fails > 100 {
		return fmt.Errorf("stream: place %v: %w", r, err)
	}
	time.Sleep(time.Duration(fails) * time.Millisecond) // memory is short
	return nil
}
