package stream

import (
	"context"
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/codec"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"github.com/pageferry/pageferry/transport"
)

// errBusy: a round was asked for while pages of something else are fetched.
var errBusy = errors.New("stream: the fetcher is at work already")

// Round is a set of pages to be fetched on the bulk lanes while the process runs
// at the source. It has a store of its own, which knows nothing of the pages that
// the process will lack: they may come again in the next round.
type Round struct {
	Store  *pagestore.Store
	Placer Placer
	Order  Order // default: by address
	// Reader reads what was placed, in this round or one before it: pages may be
	// sent as what has changed of them, or as equal to others. Nil: they may not.
	Reader codec.Reader
	// Window and Chunk are as in FetcherConfig, whose they are by default. No thread
	// waits for a page here, so that there is nothing to be held up by larger ones.
	Window, Chunk int
}

// work is what the fetcher is at: its own store, or a round.
type work struct {
	st     *pagestore.Store
	placer Placer
	order  Order
	done   chan struct{} // of a round: closed when nothing is missing
	lost   chan error    // of a round: why its first lane was lost; has room for it
	reader codec.Reader

	window, chunk int
}

// errStands: see ReadPages.
var errStands = errors.New("stream: a page that stands on others, outside of a round")

// ReadPages reads for the decoders of the lanes what pages stand on.
func (f *Fetcher) ReadPages(space page.Space, first page.Num, buf []byte) error {
	r := f.now.Load().reader
	if r == nil {
		return errStands
	}
	return r.ReadPages(space, first, buf)
}

// Round fetches every page of r.Store and returns when it has placed them, or ctx
// or the fetcher ends, or a lane is lost. Nothing else may be fetched meanwhile, and
// nothing may have been asked for. After an error the fetcher should be closed.
//
// In a round each page is read once at the source. What a lost lane owed would be
// asked for again on another, while the source, which may not know yet, still reads
// for the lost one: it would note as sent what it read last, and that need not be
// what arrived. Who finds out by comparing what the program has written (dirty, by
// hash) would then miss a write.
func (f *Fetcher) Round(ctx context.Context, r Round) error {
	if r.Order == nil {
		r.Order = EagerHotAscending
	}
	w := &work{r.Store, r.Placer, r.Order, make(chan struct{}), make(chan error, 1), r.Reader, r.Window, r.Chunk}
	if w.window == 0 {
		w.window = f.cfg.Window
	}
	if w.chunk == 0 {
		w.chunk = f.cfg.Chunk
	}
	w.chunk = max(min(w.chunk, w.window), page.Size)
	f.mu.Lock()
	own := f.now.Load()
	switch {
	case f.closed:
		f.mu.Unlock()
		return fmt.Errorf("stream: round: %w", transport.ErrClosed)
	case own.done != nil || f.started:
		f.mu.Unlock()
		return errBusy
	}
	f.change(w, true)
	f.mu.Unlock()
	f.kick()
	f.check()
	var err error
	select {
	case <-w.done:
	case err = <-w.lost:
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-f.ticker:
		err = fmt.Errorf("stream: round: %w", transport.ErrClosed)
	}
	if err == nil {
		select {
		case err = <-w.lost: // before the last page came
		default:
		}
	}
	f.mu.Lock()
	f.change(own, false)
	f.mu.Unlock()
	return err
}

// lose tells a round that a lane is lost, before what that owed is asked for again.
func (w *work) lose(id transport.LaneID, err error) {
	if w.done == nil {
		return
	}
	select {
	case w.lost <- fmt.Errorf("stream: %v lane %d lost in a round: %w", id.Kind, id.Index, err):
	default:
	}
}

// change begins or ends a round; mu is held.
func (f *Fetcher) change(w *work, on bool) {
	f.now.Store(w)
	f.flight = map[*pagestore.Source]*flight{}
	f.blocks, f.redo, f.cur, f.next = nil, nil, piece{}, nil
	f.started, f.all = on, on
	f.told.eager, f.told.resident = false, false
	if on {
		f.rewind()
	}
}

// current reports whether src is of what is fetched now; mu is held.
func (f *Fetcher) current(src *pagestore.Source) bool {
	return f.now.Load().st.Source(src.ID()) == src
}

// InOrder fetches classes one after the other, each by address.
func InOrder(space page.Space, classes []page.Set) Order {
	of := make([]func(*pagestore.Source) []pagestore.Span, len(classes))
	for i := range classes {
		of[i] = func(src *pagestore.Source) (out []pagestore.Span) {
			if src.ID() != space {
				return nil
			}
			for _, r := range classes[i].Ranges() {
				src.Each(r, func(p page.Range, first int) {
					out = append(out, pagestore.Span{First: first, End: first + p.Pages()})
				})
			}
			return out
		}
	}
	return func(st *pagestore.Store) Next { return parts(st, of...) }
}
