package simulate

import (
	"math/rand/v2"
	"time"

	"github.com/pageferry/pageferry/page"
)

// Pattern is where a writer writes.
type Pattern string

const (
	Idle       Pattern = ""            // nowhere
	Sequential Pattern = "sequential"  // in a circle
	Uniform    Pattern = "uniform"     // anywhere
	Zipf       Pattern = "zipf"        // few pages often, most of them seldom, as in perf/workload
	WorkingSet Pattern = "working set" // nine of ten writes into a sixteenth
)

// Writer dirties a part of the memory.
type Writer struct {
	Pattern Pattern
	From    uint64 // bytes from the beginning of the memory
	Size    uint64 // bytes
	Rate    float64
}

// base is where the memory lies: not where a block of a history begins.
const base page.Addr = 0x7f12_3456_7000

// process is memory without content: pages that count their writes.
type process struct {
	version []uint32
	written []bool // since the last scan
	writers []*writer
}

type writer struct {
	Writer
	first, pages int
	owed         float64 // writes
	at           int
	rng          *rand.Rand
	zipf         *rand.Zipf
	stride       int
}

func newProcess(bytes uint64, writers []Writer, rng *rand.Rand) *process {
	n := int(bytes / page.Size)
	p := &process{version: make([]uint32, n), written: make([]bool, n)}
	for _, w := range writers {
		x := &writer{Writer: w, first: int(w.From / page.Size), pages: int(w.Size / page.Size), rng: rng}
		x.at = rng.IntN(max(1, x.pages))
		x.stride = 7919 // a prime, so that hot pages are no neighbours
		if w.Pattern == Zipf {
			x.zipf = rand.NewZipf(rng, 1.1, 1, uint64(x.pages-1))
		}
		p.writers = append(p.writers, x)
	}
	return p
}

func (w *writer) next() int {
	switch w.Pattern {
	case Sequential:
		w.at = (w.at + 1) % w.pages
		return w.at
	case Zipf:
		return int(w.zipf.Uint64()) * w.stride % w.pages
	case WorkingSet:
		if w.rng.IntN(10) > 0 {
			return w.rng.IntN(max(1, w.pages/16))
		}
	}
	return w.rng.IntN(w.pages)
}

// run lets the program run for d, throttled.
func (p *process) run(d time.Duration, throttle float64) {
	for _, w := range p.writers {
		if w.Pattern == Idle {
			continue
		}
		for w.owed += d.Seconds() * (1 - throttle) * w.Rate / page.Size; w.owed >= 1; w.owed-- {
			i := w.first + w.next()
			p.version[i]++
			p.written[i] = true
		}
	}
}

func (p *process) content() page.Set {
	return page.NewSet(page.Range{Start: base, End: base + page.Addr(len(p.version))*page.Size})
}

// scan returns what was written since the last one.
func (p *process) scan() page.Set {
	var s page.Set
	for i, w := range p.written {
		if w {
			s.Add(page.Range{Start: addr(i), End: addr(i + 1)})
		}
	}
	clear(p.written)
	return s
}

func addr(i int) page.Addr  { return base + page.Addr(i)*page.Size }
func index(a page.Addr) int { return int((a - base) / page.Size) }

// each calls f for all pages of s.
func each(s page.Set, f func(i int)) {
	for _, r := range s.Ranges() {
		for i := index(r.Start); i < index(r.End); i++ {
			f(i)
		}
	}
}
