package codec

import (
	"hash/maphash"
	"math/bits"
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/page"
)

// TwinsConfig is how much a Twins remembers.
type TwinsConfig struct {
	// Bytes bounds its memory. Default 16 MiB, good for the last GiB of pages
	// that were sent. It is taken when the first page is put.
	Bytes int
}

// Twins knows which content has crossed, and with which page, so that a page of
// the same content need not cross again.
//
// Pages are told apart by a 64-bit hash under a seed that nobody outside knows
// and by their CRC32C. That two different pages agree in both has a probability
// of 2^-96 for each two, and as the seed is not known nobody can make such a
// pair; a mistake would pass the checksum.
//
// Hashing costs about as much as a checksum. Where nothing repeats only one page
// in 16 is looked at. Which ones depends on their checksum, not on their place,
// so that two of the same content are both looked at, or neither.
//
// Safe for concurrent use.
type Twins struct {
	seed maphash.Seed
	bits int

	live   atomic.Int64  // entries in use
	sample atomic.Uint32 // sampler.shift

	mu      sync.Mutex
	pages   []twin   // by page: what that page has at the destination
	keys    []uint32 // by key: where in pages
	sampler sampler
}

type twin struct {
	key   Key
	space page.Space
	round uint32
	page  page.Num
	lane  uint8
	used  bool
}

// Key stands for the content of a page.
type Key struct {
	hash uint64
	crc  uint32
}

const twinSize = 40 + 4

// NewTwins returns an empty one.
func NewTwins(cfg TwinsConfig) *Twins {
	if cfg.Bytes <= 0 {
		cfg.Bytes = 16 << 20
	}
	n := max(cfg.Bytes/twinSize, 1)
	return &Twins{
		seed: maphash.MakeSeed(), bits: bits.Len(uint(n)) - 1,
		sampler: sampler{window: 1024, worth: 32},
	}
}

// Key is the key of the content p with that CRC32C; ok is false if it is not
// looked at.
func (t *Twins) Key(p []byte, crc uint32) (k Key, ok bool) {
	if crc&(1<<t.sample.Load()-1) != 0 {
		return Key{}, false
	}
	return Key{maphash.Bytes(t.seed, p), crc}, true
}

// Lookup returns a page of that content which the destination has when it takes
// up what is sent in r.
func (t *Twins) Lookup(space page.Space, k Key, r Round) (page.Num, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.lookup(space, k, r)
}

func (t *Twins) lookup(space page.Space, k Key, r Round) (n page.Num, ok bool) {
	if t.keys != nil {
		e := &t.pages[t.keys[t.slot(k)]]
		ok = e.used && e.key == k && e.space == space && r.has(Round{Number: e.round, Lane: e.lane})
		n = e.page
	}
	shift := t.sampler.shift
	if t.sampler.note(ok); t.sampler.shift != shift {
		t.sample.Store(uint32(t.sampler.shift))
	}
	return n, ok
}

// Put tells that page n was sent in r with the content k.
func (t *Twins) Put(space page.Space, n page.Num, k Key, r Round) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.put(space, n, k, r)
}

func (t *Twins) put(space page.Space, n page.Num, k Key, r Round) {
	if r.Number == 0 {
		t.forget(space, n)
		return
	}
	if t.keys == nil {
		t.pages, t.keys = make([]twin, 1<<t.bits), make([]uint32, 1<<t.bits)
	}
	at := t.place(space, n)
	e := &t.pages[at]
	if !e.used {
		t.live.Add(1)
	}
	*e = twin{key: k, space: space, round: r.Number, page: n, lane: r.Lane, used: true}
	// What was sent first is kept, as more may refer to it.
	if s := t.slot(k); t.keys[s] != at {
		if o := &t.pages[t.keys[s]]; o.key != k || o.space != space || !r.has(Round{Number: o.round, Lane: o.lane}) {
			t.keys[s] = at
		}
	}
}

// place is where page n has its entry. Neighbours have theirs side by side.
func (t *Twins) place(space page.Space, n page.Num) uint32 {
	return (uint32(n) + uint32(space)*0x9e3779b1) & (1<<t.bits - 1)
}

func (t *Twins) slot(k Key) uint64 { return k.hash & (1<<t.bits - 1) }

// Forget tells that the pages of r are no longer known.
func (t *Twins) Forget(space page.Space, r page.Range) {
	if t.live.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if r.Bytes()>>page.Shift > uint64(len(t.pages)) {
		for i := range t.pages {
			if e := &t.pages[i]; e.used && e.space == space && r.Contains(e.page.Addr()) {
				t.drop(e)
			}
		}
		return
	}
	for n := r.Start.Page(); n < r.End.Page(); n++ {
		t.forget(space, n)
	}
}

func (t *Twins) forget(space page.Space, n page.Num) {
	if t.pages == nil {
		return
	}
	if e := &t.pages[t.place(space, n)]; e.used && e.page == n && e.space == space {
		t.drop(e)
	}
}

func (t *Twins) drop(e *twin) {
	*e = twin{}
	t.live.Add(-1)
}

// Reset forgets everything.
func (t *Twins) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.pages)
	t.live.Store(0)
}
