package stream

import (
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// rewind begins the order anew; mu is held.
func (f *Fetcher) rewind() {
	f.cur = piece{}
	w := f.now.Load()
	order := Order(eagerHot)
	if f.all {
		order = w.order
	}
	f.next = order(w.st)
}

// take returns up to n pages of one source that are missing and not asked for,
// and notes that they are now. It returns nil when there is nothing.
func (f *Fetcher) take(n int) (src *pagestore.Source, rs []page.Range) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.started || f.closed {
		return nil, nil
	}
	for n > 0 && len(rs) < maxRuns {
		p := f.head()
		if p == nil || src != nil && p.src != src {
			break
		}
		fl := f.flightOf(p.src)
		i := p.src.NextWanted(p.First, p.End)
		if i < p.End && fl.out.AtomicGet(i) {
			p.First = fl.out.NextClear(i, p.End)
			continue
		}
		p.First = i
		if i >= p.End {
			continue
		}
		limit := p.src.Run(i, min(n, p.End-i))
		k := 1
		for k < limit && !fl.out.AtomicGet(i+k) && p.src.Wanted(i+k) {
			k++
		}
		fl.out.AtomicSetRange(i, i+k)
		at := p.src.Addr(i)
		src, rs = p.src, append(rs, page.Range{Start: at, End: at + page.Addr(k)<<page.Shift})
		p.First = i + k
		n -= k
	}
	return src, rs
}

// maxRuns bounds the runs of one request.
const maxRuns = 64

// head is the piece to take from next, or nil; mu is held.
func (f *Fetcher) head() *piece {
	for k := len(f.blocks); k > 0; k = len(f.blocks) {
		if p := &f.blocks[k-1]; p.First < p.End {
			return p
		}
		f.blocks = f.blocks[:k-1]
	}
	for len(f.redo) > 0 {
		if f.redo[0].First < f.redo[0].End {
			return &f.redo[0]
		}
		f.redo = f.redo[1:]
	}
	for f.cur.First >= f.cur.End {
		if f.next == nil {
			return nil
		}
		src, sp, ok := f.next()
		if !ok {
			f.next = nil
			return nil
		}
		f.cur = piece{src, sp}
	}
	return &f.cur
}
