package codec

import (
	"encoding/binary"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/wire"
)

// EncoderConfig is how pages are encoded. The zero value takes zero pages out and
// leaves the others as they are.
type EncoderConfig struct {
	// Chooser decides what is compressed; nil compresses nothing. It belongs to
	// the encoder.
	Chooser *Chooser
	// Sent and Twins are shared by all encoders of a migration; nil does without
	// deltas, or references. See Round for what they rely on.
	Sent  *Sent
	Twins *Twins
	// Group is how many pages are compressed together, at most
	// wire.MaxBlockPages. Default 16: most of what a window of 64 KiB finds,
	// and with a table that is still cleared quickly.
	Group int
	// DeltaLimit is how long a delta may be, in bytes below a page. Default
	// half a page: beyond that compressing it does better.
	DeltaLimit int
	// Now is the clock that the codec's speed is measured by. Default is the
	// monotonic clock since some moment.
	Now func() time.Duration
}

// Encoder turns pages as they were read into the runs, checksums and payload of a
// frame. Each lane has its own: only Stats is safe for concurrent use. It
// allocates nothing once it has seen the largest frame.
type Encoder struct {
	cfg     EncoderConfig
	round   Round
	lz4     *LZ4
	scratch []byte // of a block
	delta   []byte
	of      page.Num // what the first page of the last RunSame equals
	twin    []page.Num
	keys    []Key

	stats [5]struct{ pages, bytes atomic.Uint64 } // raw, zero, lz4, delta, same
	now   [5]Count                                // of this frame

	// Of the call of Encode.
	p     *wire.Pages
	space page.Space
	out   []byte
	keep  int // bytes of out that are the payload
}

// The places in stats.
const (
	sRaw = iota
	sZero
	sLZ4
	sDelta
	sSame
)

// none is no page number.
const none = ^page.Num(0)

var start = time.Now()

func sinceStart() time.Duration { return time.Since(start) }

// NewEncoder returns an encoder in round 0.
func NewEncoder(cfg EncoderConfig) *Encoder {
	if cfg.Chooser != nil && cfg.Chooser.Mode == Never {
		cfg.Chooser = nil
	}
	if cfg.Group <= 0 || cfg.Group > wire.MaxBlockPages {
		cfg.Group = 16
	}
	if cfg.DeltaLimit <= 0 || cfg.DeltaLimit >= page.Size {
		cfg.DeltaLimit = page.Size / 2
	}
	if cfg.Now == nil {
		cfg.Now = sinceStart
	}
	e := &Encoder{cfg: cfg}
	if cfg.Chooser != nil {
		e.lz4 = new(LZ4)
		e.scratch = make([]byte, cfg.Group*page.Size)
	}
	if cfg.Sent != nil {
		e.delta = make([]byte, 0, page.Size)
	}
	return e
}

// SetRound tells what the frames from here on belong to.
func (e *Encoder) SetRound(r Round) { e.round = r }

// Encode describes in p the pages of ranges, which follow each other in data, and
// makes data into the payload: its length is returned. p.ID is left as it is.
// data is at most wire.MaxPayload long, and is written to as the payload is never
// longer.
//
// What was encoded must be sent, and in that order. Where that fails, Sent and
// Twins are to be Reset.
func (e *Encoder) Encode(p *wire.Pages, space page.Space, ranges []page.Range, data []byte) int {
	p.Runs, p.Sums, p.Lengths = p.Runs[:0], p.Sums[:0], p.Lengths[:0]
	e.p, e.space, e.out, e.keep = p, space, data, 0
	plain := e.cfg.Chooser == nil && e.cfg.Sent == nil && e.cfg.Twins == nil
	at := 0
	for _, r := range ranges {
		for first := r.Start.Page(); first < r.End.Page(); {
			left := data[at : at+int((r.End.Page()-first)<<page.Shift)]
			zero, n := Run(left)
			content := left[:n<<page.Shift]
			switch {
			case zero:
				e.zero(first, n)
			case plain:
				p.Runs = append(p.Runs, e.run(wire.RunData, first, n))
				e.raw(content, true)
			default:
				e.content(first, content)
			}
			first += page.Num(n)
			at += n << page.Shift
		}
	}
	e.p, e.out = nil, nil
	for i := range e.now {
		if c := &e.now[i]; c.Pages > 0 {
			e.stats[i].pages.Add(c.Pages)
			e.stats[i].bytes.Add(c.Bytes)
			*c = Count{}
		}
	}
	return e.keep
}

// Stats is what went how since the encoder was made.
func (e *Encoder) Stats() Stats {
	c := func(i int) Count { return Count{e.stats[i].pages.Load(), e.stats[i].bytes.Load()} }
	return Stats{Raw: c(sRaw), Zero: c(sZero), LZ4: c(sLZ4), Delta: c(sDelta), Same: c(sSame)}
}

func (e *Encoder) run(kind wire.RunKind, first page.Num, n int) wire.Run {
	return wire.Run{Space: e.space, Kind: kind, Count: uint32(n), First: first}
}

func (e *Encoder) count(i, pages, bytes int) {
	e.now[i].Pages += uint64(pages)
	e.now[i].Bytes += uint64(bytes)
}

func (e *Encoder) zero(first page.Num, n int) {
	e.p.Runs = append(e.p.Runs, e.run(wire.RunZero, first, n))
	e.count(sZero, n, 0)
	r := page.Range{Start: first.Addr(), End: (first + page.Num(n)).Addr()}
	if e.cfg.Sent != nil {
		e.cfg.Sent.Forget(e.space, r)
	}
	if e.cfg.Twins != nil {
		e.cfg.Twins.Forget(e.space, r)
	}
}

// raw moves content, which is part of out, to the end of the payload. Its
// checksums are taken there, while it is in the cache.
func (e *Encoder) raw(content []byte, sums bool) {
	to := e.out[e.keep : e.keep+len(content)]
	if &to[0] != &content[0] {
		copy(to, content)
	}
	if sums {
		e.p.Sums = AppendSums(e.p.Sums, to)
	}
	e.keep += len(content)
	e.count(sRaw, len(content)>>page.Shift, len(content))
}

// encoded puts an encoding at the end of the payload. It is shorter than the pages
// it stands for, so no page is overwritten that is still needed.
func (e *Encoder) encoded(kind wire.RunKind, stat int, first page.Num, n int, enc []byte) {
	e.p.Runs = append(e.p.Runs, e.run(kind, first, n))
	e.p.Lengths = append(e.p.Lengths, uint32(len(enc)))
	e.keep += copy(e.out[e.keep:], enc)
	e.count(stat, n, len(enc))
}

// content encodes pages that are not zero.
func (e *Encoder) content(first page.Num, data []byte) {
	n := len(data) >> page.Shift
	begin := len(e.p.Runs)
	e.p.Sums = AppendSums(e.p.Sums, data)
	twin := e.findTwins(first, data, e.p.Sums[len(e.p.Sums)-n:])
	group := 0 // where the pages begin that are neither
	for i := range n {
		num, d := first+page.Num(i), data[i<<page.Shift:(i+1)<<page.Shift]
		var delta []byte
		changed := false
		if e.cfg.Sent != nil {
			delta, changed = e.cfg.Sent.Exchange(e.delta, e.space, num, d, e.cfg.DeltaLimit, e.round)
		}
		switch {
		case twin != nil && twin[i] != none:
			e.groups(begin, first, group, i, data)
			group = i + 1
			e.same(begin, num, twin[i])
		case changed:
			e.groups(begin, first, group, i, data)
			group = i + 1
			e.encoded(wire.RunDelta, sDelta, num, 1, delta)
		}
	}
	e.groups(begin, first, group, n, data)
}

// groups encodes the pages from to to of data as they are or compressed. Runs
// from begin on are of the same stretch of pages.
func (e *Encoder) groups(begin int, first page.Num, from, to int, data []byte) {
	for n := 0; from < to; from += n {
		n = min(to-from, e.cfg.Group)
		num, d := first+page.Num(from), data[from<<page.Shift:(from+n)<<page.Shift]
		if k := e.compress(d); k > 0 {
			e.encoded(wire.RunLZ4, sLZ4, num, n, e.scratch[:k])
			continue
		}
		if last := len(e.p.Runs) - 1; last >= begin && e.p.Runs[last].Kind == wire.RunData {
			e.p.Runs[last].Count += uint32(n) // what comes between would be a run
		} else {
			e.p.Runs = append(e.p.Runs, e.run(wire.RunData, num, n))
		}
		e.raw(d, false)
	}
}

// compress makes d, if that pays, to a block in scratch and returns its length, or
// 0.
func (e *Encoder) compress(d []byte) int {
	c := e.cfg.Chooser
	if c == nil {
		return 0
	}
	switch c.Next(len(d)) {
	case Raw:
		return 0
	case Probe:
		// One from the middle: the first is often of another kind.
		one := d[len(d)>>page.Shift/2<<page.Shift:][:page.Size]
		t := e.cfg.Now()
		k := e.lz4.Compress(e.scratch, one)
		if !c.Probed(len(d), k, e.cfg.Now()-t) {
			return 0
		}
	}
	t := e.cfg.Now()
	k := e.lz4.Compress(e.scratch, d)
	c.Tried(len(d), k, e.cfg.Now()-t)
	return k
}

// same says that page n equals page of, or adds that to the run before.
func (e *Encoder) same(begin int, n, of page.Num) {
	if last := len(e.p.Runs) - 1; last >= begin && e.p.Runs[last].Kind == wire.RunSame {
		r := &e.p.Runs[last]
		// A page of the run itself is not there when the run is taken up.
		if of == e.of+page.Num(r.Count) && r.Count < wire.MaxBlockPages && (of < r.First || of > n) {
			r.Count++
			e.count(sSame, 1, 0)
			return
		}
	}
	e.of = of
	var b [wire.SameSize]byte
	binary.LittleEndian.PutUint64(b[:], uint64(of))
	e.encoded(wire.RunSame, sSame, n, 1, b[:])
}

// findTwins returns for each page of data one of the same content that the
// destination has, or none; nil stands for none at all.
func (e *Encoder) findTwins(first page.Num, data []byte, sums []uint32) []page.Num {
	t := e.cfg.Twins
	if t == nil {
		return nil
	}
	if e.round.Number == 0 {
		t.Forget(e.space, page.Range{Start: first.Addr(), End: (first + page.Num(len(sums))).Addr()})
		return nil
	}
	// Hashing takes the time, and is done without the lock.
	e.twin, e.keys = e.twin[:0], e.keys[:0]
	for i, sum := range sums {
		k, ok := t.Key(data[i<<page.Shift:(i+1)<<page.Shift], sum)
		n := none
		if ok {
			n = 0
		}
		e.keys, e.twin = append(e.keys, k), append(e.twin, n)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, n := range e.twin {
		num := first + page.Num(i)
		if n == none {
			t.forget(e.space, num)
			continue
		}
		of, ok := t.lookup(e.space, e.keys[i], e.round)
		if e.twin[i] = none; ok {
			e.twin[i] = of
		}
		t.put(e.space, num, e.keys[i], e.round)
	}
	return e.twin
}
