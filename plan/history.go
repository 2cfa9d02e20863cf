package plan

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"slices"
	"time"

	"github.com/pageferry/pageferry/page"
)

// Looks is how many scans a History remembers.
const Looks = 8

// Look is what one scan of the dirty tracker said.
type Look struct {
	// Written are the pages written since the look before.
	Written page.Set
	// Content are the pages that have content now. What is not in it is
	// forgotten: should the address be mapped again, it is another page.
	Content page.Set
	// Elapsed is the time since the look before.
	Elapsed time.Duration
}

// History is what the last looks said about each page. The zero value has seen
// nothing. It is not safe for concurrent use.
//
// A page has a byte, its age: bit 7 says that the last look found it written,
// bit 6 the one before, and so on. As a number it grows with how recently the
// page was written, which is the aging of Tanenbaum's Modern Operating Systems
// (3.4.7) and an approximation of LRU. Pages never written are kept in no block.
type History struct {
	blocks  []*block // ascending; none is all zero
	elapsed [Looks]time.Duration
	looks   int
}

const blockPages = 512 // 2 MiB of memory

type block struct {
	index page.Num // of the block: page number / blockPages
	age   [blockPages]uint8
}

// shift makes everything one look older and reports whether something is left.
func (b *block) shift() bool {
	const older = 0x7f7f7f7f7f7f7f7f
	var left uint64
	for i := 0; i < blockPages; i += 8 {
		w := b.age[i : i+8 : i+8]
		v := binary.LittleEndian.Uint64(w) >> 1 & older
		binary.LittleEndian.PutUint64(w, v)
		left |= v
	}
	return left != 0
}

func (b *block) empty() bool {
	for i := 0; i < blockPages; i += 8 {
		if binary.LittleEndian.Uint64(b.age[i:]) != 0 {
			return false
		}
	}
	return true
}

// in returns r's part in the block as indexes of pages.
func (b *block) in(r page.Range) (from, to int) {
	first := b.index * blockPages
	from = int(max(r.Start.Page(), first) - first)
	to = int(min(r.End.Page(), first+blockPages) - first)
	return from, to
}

func (b *block) start() page.Addr { return (b.index * blockPages).Addr() }
func (b *block) end() page.Addr   { return ((b.index + 1) * blockPages).Addr() }

// Seen is how many looks are remembered, at most Looks.
func (h *History) Seen() int { return h.looks }

// Note remembers a look. The sets are read during the call only.
func (h *History) Note(l Look) {
	copy(h.elapsed[1:], h.elapsed[:])
	h.elapsed[0] = max(l.Elapsed, time.Microsecond)
	h.looks = min(h.looks+1, Looks)
	h.blocks = slices.DeleteFunc(h.blocks, func(b *block) bool { return !b.shift() })
	h.write(l.Written.Ranges())
	h.forget(l.Content.Ranges())
}

// write sets the newest bit of the pages in rs. New blocks are appended and
// merged in at the end, as an insertion for each would be quadratic.
func (h *History) write(rs []page.Range) {
	old := h.blocks
	var fresh []*block
	var cur *block
	for _, r := range rs {
		for i := r.Start.Page() / blockPages; i.Addr()*blockPages < r.End; i++ {
			if cur == nil || cur.index != i {
				for len(old) > 0 && old[0].index < i {
					old = old[1:]
				}
				if len(old) > 0 && old[0].index == i {
					cur = old[0]
				} else {
					cur = &block{index: i}
					fresh = append(fresh, cur)
				}
			}
			from, to := cur.in(r)
			for k := from; k < to; k++ {
				cur.age[k] |= 0x80
			}
		}
	}
	if len(fresh) == 0 {
		return
	}
	all := make([]*block, 0, len(h.blocks)+len(fresh))
	for x, y := h.blocks, fresh; len(x)+len(y) > 0; {
		if len(y) == 0 || len(x) > 0 && x[0].index < y[0].index {
			all, x = append(all, x[0]), x[1:]
		} else {
			all, y = append(all, y[0]), y[1:]
		}
	}
	h.blocks = all
}

// forget clears what is not in content.
func (h *History) forget(content []page.Range) {
	h.blocks = slices.DeleteFunc(h.blocks, func(b *block) bool {
		for len(content) > 0 && content[0].End <= b.start() {
			content = content[1:]
		}
		at, cut := 0, false
		for _, r := range content {
			if r.Start >= b.end() {
				break
			}
			from, to := b.in(r)
			cut = cut || at < from
			clear(b.age[at:from])
			at = to
		}
		cut = cut || at < blockPages
		clear(b.age[at:])
		return cut && b.empty() // nearly all blocks are as a whole in content
	})
}

// runs calls f for the runs of pages of equal age in pages, in ascending order.
func (h *History) runs(pages page.Set, f func(r page.Range, age uint8)) {
	blocks := h.blocks
	for _, r := range pages.Ranges() {
		for len(blocks) > 0 && blocks[0].end() <= r.Start {
			blocks = blocks[1:]
		}
		for _, b := range blocks {
			if b.start() >= r.End {
				break
			}
			if b.start() > r.Start {
				f(page.Range{Start: r.Start, End: b.start()}, 0)
				r.Start = b.start()
			}
			from, to := b.in(r)
			for k := from; k < to; {
				j := k + 1
				for j < to && b.age[j] == b.age[k] {
					j++
				}
				f(page.Range{Start: b.start() + page.Addr(k)*page.Size, End: b.start() + page.Addr(j)*page.Size}, b.age[k])
				k = j
			}
			r.Start = b.start() + page.Addr(to)*page.Size
		}
		if !r.Empty() {
			f(r, 0)
		}
	}
}

// class orders ages: by the last write, then by how many looks found one.
func class(age uint8) int { return bits.Len8(age)*(Looks+1) + bits.OnesCount8(age) }

const classes = (Looks + 1) * (Looks + 1)

// near are the distances in blocks from a block with a written page that sort
// what no look found written: 8 MiB, 64 MiB, 512 MiB.
var near = [...]page.Num{256, 32, 4}

// Order returns pages in classes: what no look found written, the furthest from
// anything written first; then the least recently written and of these the least
// often written first, the most recently and most often written last. The classes
// are disjoint, none is empty, together they are pages. Backwards they are the
// order in which pages are wanted after a switch to post-copy.
//
// Memory near written memory is likelier to be written next than memory far from
// it, as what a program works on lies together: a few short looks find a part of
// a working set only, and a program that goes through memory in order writes
// where nobody saw it before.
func (h *History) Order(pages page.Set) []page.Set {
	var sets [len(near) + classes]page.Set
	blocks := h.blocks // those before the first have all been passed
	h.runs(pages, func(r page.Range, age uint8) {
		if age != 0 {
			sets[len(near)+class(age)].Add(r)
			return
		}
		for !r.Empty() {
			part, level := untouched(&blocks, r)
			sets[level].Add(part)
			r.Start = part.End
		}
	})
	return slices.DeleteFunc(sets[:], func(s page.Set) bool { return s.Empty() })
}

// untouched returns the first part of r that has one distance from the blocks, and
// which: 0 is the furthest. Blocks that end before r are dropped but the last.
func untouched(blocks *[]*block, r page.Range) (page.Range, int) {
	for len(*blocks) > 1 && (*blocks)[1].start() <= r.Start {
		*blocks = (*blocks)[1:]
	}
	at := r.Start.Page() / blockPages
	end := (r.End-1).Page()/blockPages + 1
	level := func(at page.Num) int {
		n := 0
		for _, b := range (*blocks)[:min(2, len(*blocks))] {
			far := max(b.index, at) - min(b.index, at)
			for n < len(near) && far <= near[n] {
				n++
			}
		}
		return n
	}
	first := level(at)
	// It changes where one of the distances begins or ends.
	next := end
	for _, b := range (*blocks)[:min(2, len(*blocks))] {
		if at < b.index {
			next = min(next, b.index)
		}
		for _, n := range near {
			if edge := b.index + n + 1; edge > at {
				next = min(next, edge)
			}
			if b.index > n && b.index-n > at {
				next = min(next, b.index-n)
			}
		}
	}
	return page.Range{Start: r.Start, End: min(r.End, (next * blockPages).Addr())}, first
}

// rate estimates how often a page of that age is written, per second: the
// writes that were seen over the time it was watched, where a look that found a
// write counts half, as the write is in its middle in the mean (the actuarial
// estimate of a rate from censored times).
func (h *History) rate(age uint8) float64 {
	var writes, time float64
	for i := range h.looks {
		if age&(0x80>>i) != 0 {
			writes++
			time += h.elapsed[i].Seconds() / 2
		} else {
			time += h.elapsed[i].Seconds()
		}
	}
	if writes == 0 {
		return 0
	}
	return writes / time
}

// HoldBack returns what of pages is better left to the switch: the hottest of
// them, as long as they are written again faster than they can be sent. As Order
// sends them last and what is written before its turn is skipped, a page is
// exposed only for as long as it takes to send those that are hotter than itself:
// what is more likely than not to be written again in that time is sent for nothing.
// A small hot set is therefore not held back, sending it is cheap, and one that is
// held back while rounds are long may be sent when they are short.
//
// takes says how long a round with that many bytes takes ([Rounds.Takes]). At most
// most bytes are held back, the hottest first: they add to the remainder, so that
// pre-copy must not hold back more than fits into its downtime ([Rounds.Room]).
// In hybrid, where they can follow after the switch, most may be everything.
//
// Only pages that two looks found written are held back, one of them the last
// look: one write is no habit, and a habit may have ended. They are held back for
// one round; the next one asks again.
func (h *History) HoldBack(pages page.Set, takes func(bytes uint64) time.Duration, most uint64) page.Set {
	const likely = 0.6931 // 1-exp(-likely) = 1/2
	var in [256]uint64
	h.runs(pages, func(r page.Range, age uint8) { in[age] += r.Bytes() })
	var hot []uint8
	for age := 0x80; age < len(in); age++ {
		if in[age] > 0 && bits.OnesCount8(uint8(age)) >= 2 {
			hot = append(hot, uint8(age))
		}
	}
	slices.SortFunc(hot, func(a, b uint8) int {
		return cmp.Or(cmp.Compare(h.rate(b), h.rate(a)), cmp.Compare(b, a))
	})
	n := 0
	var sum uint64
	for i, age := range hot {
		if sum += in[age]; h.rate(age)*takes(sum).Seconds() > likely {
			n = i + 1
		}
	}
	var take [256]uint64
	for _, age := range hot[:n] {
		take[age] = min(in[age], most) &^ (page.Size - 1)
		most -= take[age]
	}
	var out page.Set
	h.runs(pages, func(r page.Range, age uint8) {
		n := min(take[age], r.Bytes())
		take[age] -= n
		out.Add(page.Range{Start: r.Start, End: r.Start + page.Addr(n)})
	})
	return out
}

// Curve returns the working set curve that the remembered looks drew: how much
// was written in each, and in the last two, three and more together. Pages given
// up meanwhile count no more.
func (h *History) Curve() Curve {
	var one, last [Looks]uint64 // pages written in look i; in the looks 0 to i
	for _, b := range h.blocks {
		for _, age := range b.age {
			if age == 0 {
				continue
			}
			for v := age; v != 0; v &= v - 1 {
				one[7-bits.TrailingZeros8(v)]++
			}
			last[8-bits.Len8(age)]++
		}
	}
	// The oldest first, as a Curve believes what it was told last.
	var c Curve
	var sum, total uint64
	var elapsed time.Duration
	var cumulated [Looks]Point
	for i := range h.looks {
		sum += last[i]
		elapsed += h.elapsed[i]
		cumulated[i] = Point{elapsed, sum * page.Size}
		total += one[i]
	}
	if total == 0 {
		if h.looks > 0 {
			c.Add(Point{elapsed, 0})
		}
		return c
	}
	for i := h.looks - 1; i >= 0; i-- {
		c.Add(cumulated[i])
	}
	for i := h.looks - 1; i >= 0; i-- {
		c.Add(Point{h.elapsed[i], one[i] * page.Size})
	}
	return c
}
