package migrate

import (
	"context"
	"time"

	"github.com/pageferry/pageferry/page"
)

// The model of memory: four pages with versions. The program writes whenever the
// rounds look or copy; what the tracker tells is right, and whether migrate makes
// the right thing of it is seen when the destination keeps a page.
//
// The last page is compared with what was read of it last, as shared memory is.

const modelPages = 4

var modelMemory = page.Range{Start: 0x1000, End: 0x1000 + modelPages*page.Size}

type modelMem struct {
	version [modelPages]int // at the source
	written [modelPages]bool
	tracked bool
	writes  int             // how many more there will be
	landed  [modelPages]int // version that the destination has, 0 none
	read    int             // version of the last page that was read last
	// What the lanes were told last.
	round     uint32
	announced page.Set
}

func modelPage(i int) page.Range {
	return page.PageOf(modelMemory.Start + page.Addr(i)<<page.Shift)
}

// writeLocked lets the program write to some page. Caller holds w.mu.
func (w *world) writeLocked() {
	if w.src != copyRunning || w.mem.writes == 0 {
		return
	}
	w.mem.writes--
	one := w.rng.IntN(modelPages)
	for i := range w.mem.version {
		if i == one || w.auto { // of what writes everywhere there is something to choose
			w.mem.version[i]++
			w.mem.written[i] = true
		}
	}
}

func (p *fakeProcess) Track(ctx context.Context) (string, error) {
	return "model", p.op("track", func(w *world) error {
		w.mem.tracked, w.mem.writes = true, 4+w.rng.IntN(12)
		for i := range w.mem.version {
			w.mem.version[i]++
			w.mem.written[i] = true
		}
		w.mem.read = 0
		return nil
	})
}

// takeWritten is what the tracker tells and forgets. Caller holds w.mu.
func (w *world) takeWritten() (s page.Set) {
	w.mem.written[modelPages-1] = w.mem.version[modelPages-1] != w.mem.read
	for i := range w.mem.written {
		if w.mem.written[i] {
			s.Add(modelPage(i))
		}
	}
	w.mem.written = [modelPages]bool{}
	return s
}

func (p *fakeProcess) Look(ctx context.Context) (l Look, err error) {
	if err := p.l.work(ctx, time.Millisecond); err != nil {
		return l, err
	}
	err = p.op("look", func(w *world) error {
		if !w.mem.tracked {
			w.violate("a look without tracking")
		}
		w.writeLocked()
		l = Look{Layout: []byte("layout"), Content: page.NewSet(modelMemory), Written: w.takeWritten(), Compared: page.NewSet(modelPage(modelPages - 1))}
		w.writeLocked()
		return nil
	})
	return l, err
}

func (p *fakeProcess) Throttle(part float64) error {
	return p.op("throttle", func(w *world) error {
		if part < 0 || part >= 1 {
			w.violate("throttled by %v", part)
		}
		return nil
	})
}

func (p *fakeProcess) SwitchNears() {}

func (p *fakeProcess) Peek(pages *page.Set) (page.Set, error) {
	p.l.w.mu.Lock()
	defer p.l.w.mu.Unlock()
	var again page.Set
	for i, written := range p.l.w.mem.written {
		if written && p.l.w.rng.IntN(2) == 0 {
			again.Add(modelPage(i))
		}
	}
	return page.Intersection(&again, pages), nil
}

func (a *fakeArrival) Land(ctx context.Context, b Batch) (l Landed, err error) {
	took := 2 * time.Millisecond
	a.l.w.mu.Lock()
	if a.l.w.auto { // some links are slow enough to be measured
		took *= time.Duration(1 + a.l.w.rng.IntN(120))
	}
	a.l.w.mu.Unlock()
	if err := a.l.work(ctx, took); err != nil {
		return l, err
	}
	err = a.op("land", func(w *world) error {
		if w.dst != copyNone {
			w.violate("landed into a process that is %v", w.dst)
		}
		for i := range w.mem.version {
			at := modelPage(i).Start
			if b.Gone.Contains(at) {
				w.mem.landed[i] = 0
			}
			for _, c := range b.Classes {
				if c.Contains(at) {
					if w.mem.round == 0 || !w.mem.announced.Contains(at) {
						w.violate("page %d is fetched in round %d, which was not announced", i, w.mem.round)
					}
					w.writeLocked()
					w.mem.landed[i] = w.mem.version[i]
					if i == modelPages-1 {
						w.mem.read = w.mem.version[i]
					}
					l.Pages++
				}
			}
		}
		w.writeLocked()
		return nil
	})
	return l, err
}

// keep is what Rebuild does with what was landed: it keeps what is not dirty, and
// returns how many pages are missing. Caller holds w.mu.
func (w *world) keep(ms []Memory) (missing int) {
	for i, v := range w.mem.landed {
		at := modelPage(i).Start
		content, dirty := false, false
		for j := range ms {
			content = content || ms[j].Lazy.Contains(at)
			dirty = dirty || ms[j].Dirty.Contains(at)
		}
		switch {
		case !content:
			w.violate("page %d has no content", i)
		case v == 0 || dirty:
			missing++
		case v != w.mem.version[i]:
			w.violate("page %d is kept in version %d, the source has %d", i, v, w.mem.version[i])
		}
	}
	return missing
}
