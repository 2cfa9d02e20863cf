package stream

import (
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// A program touches its memory in clusters. Every page has to come some time, so
// those around one that a thread waits for come first, on a bulk lane beside the
// urgent one.

const (
	// aroundPages is the size of an aligned block that comes as a whole.
	aroundPages = 16
	// maxAround is how many blocks may wait; older ones are forgotten and come in
	// their turn.
	maxAround = 64
)

// startAll lets everything be fetched: at once, or after the head start; mu is
// held.
func (f *Fetcher) startAll() {
	switch {
	case f.all:
	case f.cfg.HeadStart <= 0 || f.st.Missing(true)<<page.Shift <= f.cfg.HeadStartOver:
		f.all = true
	case f.begin == nil && !f.closed:
		f.wg.Add(1)
		f.begin = time.AfterFunc(f.cfg.HeadStart, func() {
			defer f.wg.Done()
			f.mu.Lock()
			f.all = true
			f.rewind()
			f.mu.Unlock()
			f.kick()
			f.check()
		})
	}
	f.near = true
}

// around puts the blocks of pages that threads wait for before all else that is
// to be fetched.
func (f *Fetcher) around(space page.Space, pages []page.Num) {
	src := f.now.Load().st.Source(space)
	if src == nil {
		return
	}
	f.mu.Lock()
	if !f.near {
		f.mu.Unlock()
		return
	}
	for _, n := range pages {
		i, ok := src.Find(n.Addr())
		if !ok {
			continue
		}
		b := pagestore.Span{First: i &^ (aroundPages - 1)}
		b.End = min(b.First+aroundPages, src.Len())
		if k := len(f.blocks); k > 0 && f.blocks[k-1] == (piece{src, b}) {
			continue
		}
		if len(f.blocks) == maxAround {
			f.blocks = append(f.blocks[:0], f.blocks[1:]...)
		}
		f.blocks = append(f.blocks, piece{src, b})
	}
	f.mu.Unlock()
	f.kick()
}
