package stream

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
)

// Placer puts pages where they belong; see fault.Trap. Pages that are not
// missing are left alone. Each method returns how many were missing.
type Placer interface {
	// Place puts data, the pages of r at the source. On error some of them are
	// missing still.
	Place(space page.Space, r page.Range, data []byte) (int, error)
	// Zero says that the pages of r are zero.
	Zero(space page.Space, r page.Range) (int, error)
	// Absent says that the source has nothing at r.
	Absent(space page.Space, r page.Range) (int, error)
}

// FetcherConfig is how a fetcher works; Store and Placer must be set.
type FetcherConfig struct {
	Store  *pagestore.Store
	Placer Placer
	// Window bounds the bytes asked for and not yet here on a bulk lane, and
	// Chunk is how many are asked for at once. Defaults 256 KiB and 128 KiB.
	Window, Chunk int
	// StallTimeout is how long a lane may owe pages and deliver nothing until
	// it is given up. Default 10 s.
	StallTimeout time.Duration
	// HeadStart is how long after Start(true) only the pages around those that
	// threads wait for are fetched in the background: what the program needs to
	// go on comes sooner than beside a stream at full speed. Default 0. There is none
	// where at most HeadStartOver bytes are missing, which are here sooner than that.
	HeadStart     time.Duration
	HeadStartOver uint64
	// Order of the background stream. Default EagerHotAscending.
	Order Order
	// Waiting calls its argument for every page that a thread waits for; they
	// are asked for again on a new urgent lane. May be nil.
	Waiting func(func(page.Space, page.Num))
	// Remote is where memory that the source has offered is read into; without it all
	// is asked for. Its buffers are of pages.
	Remote *transport.Pool
	// OnUrgent is called on the thread that receives on an urgent lane, which
	// is its own, to raise its priority. May be nil.
	OnUrgent func()
	// OnLost is called once for every lane that fails, and not for lanes that
	// DropLanes or Close ends. May be nil.
	OnLost func(id transport.LaneID, err error)
	// OnEager is called once every eager page is settled, OnResident when no
	// page is missing; again if more is adopted later. May be nil.
	OnEager, OnResident func()
	Log                 *slog.Logger // nil discards
}

var (
	// ErrStalled: a lane owed pages and delivered nothing.
	ErrStalled = errors.New("stream: lane stalled")
	// ErrRefused: the source could not give the pages asked for.
	ErrRefused = errors.New("stream: pages refused")
)

// Fetcher asks for missing pages and hands them to the placer.
type Fetcher struct {
	cfg    FetcherConfig
	st     *pagestore.Store
	log    *slog.Logger
	nextID atomic.Uint64
	now    atomic.Pointer[work] // replaced under mu
	ticker chan struct{}        // closed by Close
	wg     sync.WaitGroup

	mu      sync.Mutex
	lanes   []*lane
	started bool
	all     bool // not only hot and eager pages
	near    bool // those around a page that a thread waits for too
	begin   *time.Timer
	blocks  []piece // around such pages; the last comes first
	closed  bool
	flight  map[*pagestore.Source]*flight
	redo    []piece
	reads   readQueue
	turn    int // of the lanes, in taking up reads
	next    Next
	cur     piece
	told    struct{ eager, resident bool }
}

// piece is a run of pages of a source.
type piece struct {
	src *pagestore.Source
	pagestore.Span
}

// flight is which pages of a source were asked for and are not here yet, and
// which have been here.
type flight struct{ out, got *page.Bitmap }

// NewFetcher returns a fetcher without lanes. Close ends it.
func NewFetcher(cfg FetcherConfig) *Fetcher {
	if cfg.Window == 0 {
		cfg.Window = 256 << 10
	}
	if cfg.Chunk == 0 {
		cfg.Chunk = 128 << 10
	}
	cfg.Chunk = max(min(cfg.Chunk, cfg.Window), page.Size)
	if cfg.StallTimeout == 0 {
		cfg.StallTimeout = 10 * time.Second
	}
	if cfg.Order == nil {
		cfg.Order = EagerHotAscending
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	f := &Fetcher{cfg: cfg, st: cfg.Store, log: cfg.Log, ticker: make(chan struct{}), flight: map[*pagestore.Source]*flight{}}
	f.now.Store(&work{st: cfg.Store, placer: cfg.Placer, order: cfg.Order, window: cfg.Window, chunk: cfg.Chunk})
	f.wg.Add(1)
	go f.watch()
	return f
}

// Attach takes ownership of a lane, also when it fails, and begins to use it.
func (f *Fetcher) Attach(tl transport.Lane) error {
	l := &lane{f: f, tl: tl, urgent: tl.ID().Kind == transport.Urgent, reqs: map[uint64]*request{}, ended: make(chan struct{})}
	l.progress.Store(time.Now().UnixNano())
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		tl.Close()
		return fmt.Errorf("stream: attach %v lane: %w", tl.ID().Kind, transport.ErrClosed)
	}
	f.lanes = append(f.lanes, l)
	f.wg.Add(1)
	f.mu.Unlock()
	go l.run()
	if l.urgent {
		f.resendWaiting()
	}
	l.pump()
	return nil
}

// resendWaiting asks for everything that threads wait for.
func (f *Fetcher) resendWaiting() {
	if f.cfg.Waiting == nil {
		return
	}
	by := map[page.Space][]page.Num{}
	f.cfg.Waiting(func(s page.Space, n page.Num) { by[s] = append(by[s], n) })
	for s, ns := range by {
		f.Urgent(s, ns)
	}
}

// Start begins the background stream, and begins it anew after address spaces
// were added to the store: with hot and eager pages, and the others once all was
// set and the head start is over.
func (f *Fetcher) Start(all bool) {
	f.mu.Lock()
	f.started = true
	if all {
		f.startAll()
	}
	f.rewind()
	f.told.eager, f.told.resident = false, false
	f.mu.Unlock()
	f.kick()
	f.check()
}

// Urgent asks for pages that threads wait for. Without an urgent lane they are
// asked for when there is one.
func (f *Fetcher) Urgent(space page.Space, pages []page.Num) {
	if l := f.urgentLane(); l != nil {
		l.askPages(space, pages)
		f.around(space, pages)
	}
}

func (f *Fetcher) urgentLane() *lane {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.lanes {
		if l.urgent {
			return l
		}
	}
	return nil
}

// Lanes is how many lanes there are now.
func (f *Fetcher) Lanes() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.lanes)
}

// Received is how many bytes came in on lanes, those that are gone included.
func (f *Fetcher) Received() uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := f.st.Count(pagestore.WireIn)
	for _, l := range f.lanes {
		n += l.tl.Stats().BytesReceived
	}
	return n
}

// DropLanes closes all lanes. What they owed is asked for again on lanes that
// are attached later, but for what was read without a thread that waits for it.
func (f *Fetcher) DropLanes() {
	f.mu.Lock()
	lanes := slices.Clone(f.lanes)
	for _, l := range lanes {
		l.dropped.Store(true)
	}
	f.mu.Unlock()
	for _, l := range lanes {
		l.tl.Close()
	}
	for _, l := range lanes {
		f.detach(l)
	}
}

// Close ends all lanes and returns when their goroutines have. Idempotent.
func (f *Fetcher) Close() error {
	f.mu.Lock()
	first := !f.closed
	f.closed = true
	if first && f.begin != nil && f.begin.Stop() {
		f.wg.Done()
	}
	f.mu.Unlock()
	f.DropLanes()
	if first {
		close(f.ticker)
	}
	f.wg.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next = nil
	return nil
}

// detach takes a lane out, and what it owed with it.
func (f *Fetcher) detach(l *lane) {
	f.mu.Lock()
	i := slices.Index(f.lanes, l)
	if i >= 0 {
		f.lanes = slices.Delete(slices.Clone(f.lanes), i, i+1)
		f.st.Add(pagestore.WireIn, l.tl.Stats().BytesReceived)
		for id, r := range l.reqs {
			f.giveBack(r, r.left.Ranges())
			delete(l.reqs, id)
		}
		l.owed.Store(0)
		l.reading.Store(0)
		f.noBulk()
	}
	f.mu.Unlock()
	if i >= 0 {
		f.kick()
	}
}

// giveBack makes pages that were asked for be asked for again; mu is held.
func (f *Fetcher) giveBack(req *request, rs []page.Range) {
	src := req.src
	if req.read != nil {
		f.readLost(req.read, rs)
		return
	}
	if !f.current(src) {
		return // of a round that was given up
	}
	fl := f.flightOf(src)
	for _, r := range rs {
		src.Each(r, func(p page.Range, i int) {
			fl.out.AtomicClearRange(i, i+p.Pages())
			f.redo = append(f.redo, piece{src, pagestore.Span{First: i, End: i + p.Pages()}})
		})
	}
}

func (f *Fetcher) flightOf(src *pagestore.Source) *flight {
	fl := f.flight[src]
	if fl == nil {
		fl = &flight{page.NewBitmap(src.Len()), page.NewBitmap(src.Len())}
		f.flight[src] = fl
	}
	return fl
}

// request is one for pages of src, to be placed.
func (f *Fetcher) request(src *pagestore.Source) *request {
	return &request{space: src.ID(), src: src, placer: f.now.Load().placer}
}

// kick lets every lane ask for more.
func (f *Fetcher) kick() {
	f.mu.Lock()
	lanes := f.lanes
	f.mu.Unlock()
	for _, l := range lanes {
		l.pump()
	}
}

// check tells once that the eager pages, or all of them, are settled.
func (f *Fetcher) check() {
	f.mu.Lock()
	if !f.started {
		f.mu.Unlock()
		return
	}
	var calls []func()
	w := f.now.Load()
	if w.done == nil && !f.told.eager && !slices.ContainsFunc(w.st.Sources(), (*pagestore.Source).EagerLeft) {
		f.told.eager = true
		calls = append(calls, f.cfg.OnEager)
	}
	if !f.told.resident && w.st.Resident() {
		f.told.resident = true
		if w.done != nil {
			close(w.done)
		} else {
			calls = append(calls, f.cfg.OnResident)
		}
	}
	f.mu.Unlock()
	for _, c := range calls {
		if c != nil {
			c()
		}
	}
}

// watch gives up lanes that stall, and notices what happened without a page
// arriving: a program that gave up its last missing page, or forked.
func (f *Fetcher) watch() {
	defer f.wg.Done()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-f.ticker:
			return
		case now := <-tick.C:
			f.mu.Lock()
			lanes := f.lanes
			idle := f.started && f.next == nil && len(f.redo) == 0
			for _, l := range lanes {
				idle = idle && !l.fetching()
			}
			if idle && !f.now.Load().st.Resident() {
				f.rewind()
			}
			f.mu.Unlock()
			for _, l := range lanes {
				if l.owed.Load() > 0 && now.UnixNano()-l.progress.Load() > int64(f.cfg.StallTimeout) {
					l.fail(fmt.Errorf("%w: %v lane %d owes pages and delivered nothing for %v",
						ErrStalled, l.tl.ID().Kind, l.tl.ID().Index, f.cfg.StallTimeout))
				}
			}
			f.kick()
			f.check()
		}
	}
}
