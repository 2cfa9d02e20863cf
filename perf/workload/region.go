package workload

import (
	"encoding/binary"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// region is the memory of one thread, which alone touches it.
//
// A page in its sequence s holds, but for the pattern edge: s in its first and
// its last eight bytes, its number in the second eight, and data that follows
// from seed, number and (with whole) s. A zero page is only zeros.
type region struct {
	mem   []byte
	seqs  []byte // four bytes per page, little-endian, outside the heap as well
	first uint64 // number of its first page in the whole workload
	hot   int    // pages that are written, the first of them
	cfg   *Config

	// For the pattern edge: pages below pos were incremented round+1 times,
	// the others round times.
	round uint64
	pos   int
}

func (r *region) pages() int { return len(r.mem) / page.Size }

func (r *region) page(i int) []byte {
	return r.mem[i*page.Size : (i+1)*page.Size : (i+1)*page.Size]
}

// seq is the sequence number that page i must have.
func (r *region) seq(i int) uint64 {
	if r.cfg.Pattern == Edge {
		switch {
		case i < r.pos:
			return r.round + 1
		case i < r.hot:
			return r.round
		}
		return 0
	}
	return uint64(binary.LittleEndian.Uint32(r.seqs[4*i:]))
}

// fill gives every page its first content.
func (r *region) fill(stop func() bool) {
	for i := range r.pages() {
		if i%1024 == 0 && stop() {
			return
		}
		r.put(i, 0)
	}
}

// write dirties page i.
func (r *region) write(i int) {
	if r.cfg.Pattern == Edge {
		// The next one in the circle, whichever was asked for.
		r.page(r.pos)[0]++
		if r.pos++; r.pos == r.hot {
			r.pos, r.round = 0, r.round+1
		}
		return
	}
	s := uint32(r.seq(i)) + 1
	binary.LittleEndian.PutUint32(r.seqs[4*i:], s)
	p := r.page(i)
	switch {
	case r.cfg.Data == Zero:
		binary.LittleEndian.PutUint64(p[8*(s%512):], 0) // a write all the same
	case r.cfg.Whole:
		r.put(i, uint64(s))
	default:
		binary.LittleEndian.PutUint64(p, uint64(s))
		binary.LittleEndian.PutUint64(p[page.Size-8:], uint64(s))
	}
}

// put writes the whole of page i in sequence s.
func (r *region) put(i int, s uint64) {
	p := r.page(i)
	if r.cfg.Data == Zero {
		clear(p)
		return
	}
	g := r.data(i, s)
	for off := 0; off < page.Size; off += 8 {
		binary.LittleEndian.PutUint64(p[off:], g.next())
	}
	if r.cfg.Pattern == Edge {
		p[0] = byte(s)
		return
	}
	binary.LittleEndian.PutUint64(p, s)
	binary.LittleEndian.PutUint64(p[8:], r.first+uint64(i))
	binary.LittleEndian.PutUint64(p[page.Size-8:], s)
}

// Damage is a page that does not hold what was written to it.
type Damage struct {
	Addr      uint64 // in this process
	Page      uint64 // its number in the workload
	Offset    int    // bytes into the page
	Got, Want uint64 // the eight bytes there (edge: the one byte at offset 0)
	Seq       uint64 // what its sequence number must be
}

func (d *Damage) Error() string {
	return fmt.Sprintf("page %d at %#x is wrong: at offset %d is %#x, not %#x (write %d)",
		d.Page, d.Addr, d.Offset, d.Got, d.Want, d.Seq)
}

// verify compares page i with what it must hold.
func (r *region) verify(i int) error {
	p := r.page(i)
	s := r.seq(i)
	off, end, edge := 0, page.Size, r.cfg.Pattern == Edge
	var g generator
	if r.cfg.Data == Zero {
		g = generator{kind: Zero}
	} else {
		g = r.data(i, s)
	}
	switch {
	case edge:
		g.next()
		if p[0] != byte(s) {
			return r.damage(i, 0, uint64(p[0]), uint64(byte(s)), s)
		}
		off = 8
		// The seven bytes beside the counted one.
		if got, want := binary.LittleEndian.Uint64(p)>>8, r.beside(i); got != want {
			return r.damage(i, 0, got<<8|uint64(p[0]), want<<8|uint64(byte(s)), s)
		}
	case r.cfg.Data != Zero:
		fixed := [...]struct {
			off  int
			want uint64
		}{{0, s}, {8, r.first + uint64(i)}, {page.Size - 8, s}}
		for _, f := range fixed {
			if got := binary.LittleEndian.Uint64(p[f.off:]); got != f.want {
				return r.damage(i, f.off, got, f.want, s)
			}
		}
		g.next()
		g.next()
		off, end = 16, page.Size-8
	}
	for ; off < end; off += 8 {
		if got, want := binary.LittleEndian.Uint64(p[off:]), g.next(); got != want {
			return r.damage(i, off, got, want, s)
		}
	}
	return nil
}

// beside is what the seven bytes after an edge page's counter hold.
func (r *region) beside(i int) uint64 {
	if r.cfg.Data == Zero {
		return 0
	}
	g := r.data(i, 0)
	return g.next() >> 8
}

func (r *region) damage(i, off int, got, want, seq uint64) error {
	return &Damage{Addr: r.addr() + uint64(i)*page.Size, Page: r.first + uint64(i), Offset: off, Got: got, Want: want, Seq: seq}
}

// data returns the generator of page i's content in sequence s.
func (r *region) data(i int, s uint64) generator {
	if !r.cfg.Whole {
		s = 0
	}
	g := generator{kind: r.cfg.Data, state: mix(r.cfg.Seed ^ mix(r.first+uint64(i)+1) ^ mix(s<<1|1))}
	if g.state == 0 {
		g.state = 1
	}
	return g
}

// generator makes eight bytes of content at a time.
type generator struct {
	kind  Data
	state uint64
}

func (g *generator) next() uint64 {
	if g.kind == Zero {
		return 0
	}
	g.state ^= g.state << 13
	g.state ^= g.state >> 7
	g.state ^= g.state << 17
	if g.kind == Text {
		return words[g.state>>60]
	}
	return g.state
}

// words are eight letters each: text of the kind that compresses to a third.
var words = func() (w [16]uint64) {
	const text = "memory, pages - process switch, source, arrival wire and ferry of downtimefaults, reader; bitmap; process "
	for i := range w {
		w[i] = binary.LittleEndian.Uint64([]byte(text[6*i : 6*i+8]))
	}
	return w
}()

// mix is the finalizer of splitmix64.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
