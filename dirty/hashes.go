package dirty

import (
	"errors"
	"hash/maphash"
	"io"
	"math"
	"sync"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// hashes keeps, for each page, the hash of what was sent of it: 8 bytes a page,
// by blocks, so that an address space with much that is not there costs little.
//
// Comparing what a page is at two looks is not enough, however carefully each is
// read. A page that is A, is B while it is sent, and is A again at the next look
// would count as unchanged, and the other side keep B: a lock that was held at
// the wrong moment. Nor do two readings of one page agree while the program
// writes to it. Compared with what was sent itself, a page is told until it is
// as the other side has it, whatever happened between.
//
// Hashes are of 64 bits and seeded anew for each tracker: a page that differs is
// missed with a probability of 2^-64, and nobody outside can look for one.
type hashes struct {
	seed maphash.Seed
	pace func(bytes int)

	mu     sync.Mutex
	blocks map[page.Num]*block // by the number of their first page
}

const blockPages = 64

// block has 0 where nothing is known.
type block [blockPages]uint64

// piece is how many bytes are read at once.
const piece = 256 << 10

var everywhere = page.Range{End: math.MaxUint64}

func newHashes(pace func(int)) *hashes {
	if pace == nil {
		pace = func(int) {}
	}
	return &hashes{seed: maphash.MakeSeed(), pace: pace, blocks: map[page.Num]*block{}}
}

func (h *hashes) sum(b []byte) uint64 { return max(1, maphash.Bytes(h.seed, b)) }

func (h *hashes) get(n page.Num) uint64 {
	if b := h.blocks[n&^(blockPages-1)]; b != nil {
		return b[n%blockPages]
	}
	return 0
}

func (h *hashes) set(n page.Num, v uint64) {
	b := h.blocks[n&^(blockPages-1)]
	if b == nil {
		b = new(block)
		h.blocks[n&^(blockPages-1)] = b
	}
	b[n%blockPages] = v
}

// sent notes what was sent of those pages of rs that are in of; nil is all.
func (h *hashes) sent(rs []page.Range, buf []byte, of *page.Set) {
	if of != nil && of.Empty() {
		return
	}
	for _, r := range rs {
		for at := r.Start; at < r.End && len(buf) >= page.Size; at += page.Size {
			if of == nil || of.Contains(at) {
				v := h.sum(buf[:page.Size])
				h.mu.Lock()
				h.set(at.Page(), v)
				h.mu.Unlock()
			}
			buf = buf[page.Size:]
		}
	}
}

// known returns how many pages from at to end, at most a piece, have a hash, or how
// many have none.
func (h *hashes) known(at, end page.Addr) (pages int, known bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	first, last := at.Page(), min(end.Page(), at.Page()+piece/page.Size)
	known = h.get(first) != 0
	n := first + 1
	for ; n < last && (h.get(n) != 0) == known; n++ {
	}
	return int(n - first), known
}

// compare tells which pages of r are not as they were sent, and reads those that
// were. What cannot be read, because the program has given it up meanwhile, is
// told, too.
func (h *hashes) compare(r page.Range, read func(b []byte, at page.Addr) error, written func(page.Range)) error {
	var buf []byte
	var sums [piece / page.Size]uint64
	for at := r.Start; at < r.End; {
		n, known := h.known(at, r.End)
		if !known {
			end := at + page.Addr(n)<<page.Shift
			written(page.Range{Start: at, End: end})
			at = end
			continue
		}
		if buf == nil {
			buf = make([]byte, min(piece, r.Bytes()))
		}
		b := buf[:n<<page.Shift]
		h.pace(len(b))
		err := read(b, at)
		if errors.Is(err, proc.ErrNoPage) {
			b = b[:page.Size]
			if err = read(b, at); errors.Is(err, proc.ErrNoPage) {
				h.forget(page.PageOf(at))
				err = nil
			}
		}
		if err != nil {
			return err
		}
		now := sums[:len(b)/page.Size]
		for i := range now {
			now[i] = h.sum(b[i*page.Size:][:page.Size])
		}
		h.mu.Lock()
		for _, v := range now {
			if h.get(at.Page()) != v {
				written(page.PageOf(at))
			}
			at += page.Size
		}
		h.mu.Unlock()
	}
	return nil
}

// forget drops what is known of r.
func (h *hashes) forget(r page.Range) {
	h.mu.Lock()
	defer h.mu.Unlock()
	first, end := r.Start.Page(), r.End.Page()
	for n, b := range h.blocks {
		if n+blockPages <= first || n >= end {
			continue
		}
		if n >= first && n+blockPages <= end {
			delete(h.blocks, n)
			continue
		}
		for i := range page.Num(blockPages) {
			if n+i >= first && n+i < end {
				b[i] = 0
			}
		}
	}
}

// drop forgets the pages of gone.
func (h *hashes) drop(gone *page.Set) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, r := range gone.Ranges() {
		for n := r.Start.Page(); n < r.End.Page(); {
			key := n &^ (blockPages - 1)
			b := h.blocks[key]
			left := false
			for ; n < min(r.End.Page(), key+blockPages); n++ {
				if b != nil {
					b[n%blockPages] = 0
				}
			}
			if b == nil {
				continue
			}
			for _, v := range b {
				left = left || v != 0
			}
			if !left {
				delete(h.blocks, key)
			}
		}
	}
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
