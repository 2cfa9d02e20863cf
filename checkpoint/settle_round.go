package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// piece is a part of one mapping with one backing, to be settled in one stop or
// several.
type piece struct {
	page.Range               // where the program has it
	of         *proc.Mapping // as it was when the round began
	shadow     page.Addr     // 0: none yet
	flags      []string      // VmFlags of the shadow
	read       func(ctx context.Context, offset uint64, buf []byte) error
	fresh      bool   // the shadow is to be made
	path       string // by mapping this
	dev, ino   uint64 // that the shadow is mapped from, 0 for anonymous memory

	// ahead: the shadow has what the program had written, but for what openPages
	// tells. plain: it is not tried.
	ahead, plain bool
	sure         *sure         // of ahead
	tries        int           // stops in which more was left to copy than fits
	aside        page.Addr     // where the mapping is moved to, 0: nowhere
	fixed        time.Duration // guess of what it takes besides copying, where that is ahead
}

// offset of the piece in its file.
func (p *piece) offset() uint64 { return p.of.Offset + uint64(p.Start-p.of.Start) }

// cut splits p at a; a lies inside.
func (p *piece) cut(a page.Addr) (head, rest piece) {
	head, rest = *p, *p
	head.End, rest.Start = a, a
	if p.shadow != 0 {
		rest.shadow += a - p.Start
	}
	if p.aside != 0 {
		rest.aside += a - p.Start
	}
	head.fixed = time.Duration(float64(p.fixed) * float64(head.Bytes()) / float64(p.Bytes()))
	rest.fixed = p.fixed - head.fixed
	return head, rest
}

func (p *piece) part() SettlePart {
	return SettlePart{p.Range, p.of.Ino, p.offset(), p.shadow, p.aside}
}

// round goes once through all that is mapped from the device, and returns how many
// pieces there were.
func (t *Settler) round(ctx context.Context, within []page.Range) (n int, err error) {
	if err := t.open(); err != nil {
		return 0, err
	}
	defer t.shut()
	t.forsaken()
	if len(t.pieces(within)) == 0 && len(t.left) == 0 {
		return 0, nil // which took no walk of its page tables
	}
	if err := t.flags(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, t.tidy(context.WithoutCancel(ctx))) }()
	t.forsaken()
	t.rep.Skipped, t.rep.Later = nil, 0
	queue := t.pieces(within)
	n = len(queue)
	if err := t.clearLeft(ctx); err != nil && !errors.Is(err, errInside) {
		return n, err
	}
	fresh := slices.DeleteFunc(slices.Clone(queue), func(p piece) bool { return !p.fresh })
	queue = slices.DeleteFunc(queue, func(p piece) bool { return p.fresh })
	if err := t.settle(ctx, queue); err != nil {
		return n, err
	}
	for len(fresh) > 0 && !t.stale() {
		few := fresh[:min(len(fresh), mostShadows)]
		fresh = fresh[len(few):]
		if err := t.freshly(ctx, few); err != nil {
			return n, err
		}
	}
	return n, nil
}

// freshly settles pieces for which shadows are made.
func (t *Settler) freshly(ctx context.Context, few []piece) (err error) {
	if few, err = t.makeShadows(ctx, few); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.sweep(context.WithoutCancel(ctx), &t.made)) }()
	var ahead []piece
	var bytes uint64
	for len(few) > 0 && (!t.stale() || len(ahead) > 0) {
		p := few[0]
		few = few[1:]
		if room := page.Addr(t.cfg.Ahead - bytes).Floor(); p.path == "" && p.read != nil && p.Bytes() > uint64(room) {
			head, rest := p.cut(p.Start + room)
			few = slices.Insert(few, 0, rest)
			p = head
		}
		if err := t.fill(ctx, &p); err != nil {
			t.skip(&p, err)
		} else {
			ahead = append(ahead, p)
			bytes += p.Bytes()
		}
		if bytes >= t.cfg.Ahead || len(few) == 0 {
			if err := t.settle(ctx, ahead); err != nil {
				return err
			}
			ahead, bytes = nil, 0
		}
	}
	return nil
}

// open takes the handles of one round: they stay with the address space that the
// process has now.
func (t *Settler) open() (err error) {
	t.shut()
	if t.space != nil && t.space.Alive() != nil {
		_ = t.forget() // it has called exec
	}
	if t.space == nil {
		if t.space, err = proc.OpenMemory(t.s.pid); err != nil {
			return err
		}
	}
	if t.mem, err = proc.OpenMemory(t.s.pid); err != nil {
		return err
	}
	if t.pm, err = proc.OpenPagemap(t.s.pid); err != nil {
		return err
	}
	if t.look, err = proc.OpenLookup(t.s.pid); err != nil {
		return err
	}
	t.asked, t.next = map[proc.Piece]Backing{}, 0
	t.maps, err = proc.ReadMaps(t.s.pid)
	return err
}

// flags reads the mappings again with their flags.
func (t *Settler) flags() (err error) {
	began := time.Now()
	t.maps, err = proc.ReadSmaps(t.s.pid)
	t.good = time.Now().Add(max(surveyAge, 2*time.Since(began)))
	return err
}

// renew gives pieces the flags that their mappings have now. What has changed so that
// they are not what they were is seen in the stop.
func (t *Settler) renew(queue []piece) error {
	if err := t.flags(); err != nil {
		return err
	}
	for i := range queue {
		p := &queue[i]
		if m, ok := t.find(p.Start); ok && m.Dev == p.of.Dev && m.Ino == p.of.Ino && m.Offset+uint64(p.Start-m.Start) == p.offset() {
			p.of = m
		}
		if m, ok := t.find(p.shadow); ok && !p.fresh {
			p.flags = m.Flags
		}
	}
	return nil
}

// find is the mapping that a lay in when they were read.
func (t *Settler) find(a page.Addr) (*proc.Mapping, bool) {
	i, ok := slices.BinarySearchFunc(t.maps, a, func(m proc.Mapping, a page.Addr) int {
		switch {
		case m.End <= a:
			return -1
		case m.Start > a:
			return 1
		}
		return 0
	})
	if !ok {
		return nil, false
	}
	return &t.maps[i], true
}

// stale reports whether the flags of the mappings are to be read again, by another
// round: madvise(2) may have changed them.
func (t *Settler) stale() bool { return time.Now().After(t.good) }

func (t *Settler) shut() {
	if t.mem != nil {
		_ = t.mem.Close()
	}
	if t.pm != nil {
		_ = t.pm.Close()
	}
	if t.look != nil {
		_ = t.look.Close()
	}
	t.mem, t.pm, t.look, t.maps = nil, nil, nil, nil
}

// pieces lists what is to be settled.
func (t *Settler) pieces(within []page.Range) []piece {
	all := page.NewSet(within...)
	var out []piece
	for i := range t.maps {
		m := &t.maps[i]
		if m.Dev != t.cfg.Dev || m.Ino == 0 || t.ours(m.Range) {
			continue
		}
		rs := []page.Range{m.Range}
		if within != nil {
			rs = all.Intersect(m.Range)
		}
		for _, r := range rs {
			out = t.backed(out, m, r)
		}
	}
	return out
}

// backed appends the pieces of r, a part of m: all of it, or of a long one the slices
// of which nothing is put off.
func (t *Settler) backed(out []piece, m *proc.Mapping, r page.Range) []piece {
	if m.Shared || m.Has("gd") {
		t.skip(&piece{Range: r, of: m}, errors.New("it is shared, or grows downward"))
		return out
	}
	slice := r
	if r.Bytes() > t.cfg.Slice {
		slice.End = page.Addr(uint64(r.Start)/t.cfg.Slice*t.cfg.Slice + t.cfg.Slice)
	}
	first := len(out)
	for ; !slice.Empty(); slice = (page.Range{Start: slice.End, End: min(slice.End+page.Addr(t.cfg.Slice), r.End)}) {
		ps, ok := t.behind(m, slice)
		if !ok {
			t.rep.Later += slice.Bytes()
			continue
		}
		for _, p := range ps {
			if n := len(out); n > first && out[n-1].continued(&p) {
				out[n-1].End = p.End
				continue
			}
			out = append(out, p)
		}
	}
	all := out[first:]
	out = out[:first]
	for _, p := range all {
		if p.fresh {
			out = append(out, p)
		} else {
			out = t.shadowed(out, p)
		}
	}
	return out
}

// continued reports whether q is more of the same.
func (p *piece) continued(q *piece) bool {
	return p.End == q.Start && !p.fresh && !q.fresh && p.shadow+page.Addr(p.Bytes()) == q.shadow
}

// behind asks what stands behind r, a part of m; false where some of it is put off.
func (t *Settler) behind(m *proc.Mapping, r page.Range) (out []piece, ok bool) {
	for !r.Empty() {
		p := piece{Range: r, of: m}
		b := t.ask(&p)
		if n := uint64(page.Addr(b.Bytes).Floor()); b.Bytes != 0 && n < r.Bytes() {
			if n == 0 {
				t.skip(&p, fmt.Errorf("what stands behind it holds for %d bytes", b.Bytes))
				return out, true
			}
			p.End = p.Start + page.Addr(n)
		}
		r.Start = p.End
		p.shadow, p.path, p.read, p.fresh = b.Shadow, b.Path, b.Read, b.Shadow == 0
		bad := t.bad[p.path]
		if bad != nil {
			p.path = ""
		}
		switch {
		case b.Later:
			return nil, false
		case bad != nil && p.read == nil:
			t.skip(&p, bad)
		default:
			out = append(out, p)
		}
	}
	return out, true
}

// ask is Backing, once for each part in a round.
func (t *Settler) ask(p *piece) Backing {
	key := proc.Piece{Range: p.Range, Offset: p.offset(), Ino: p.of.Ino}
	b, ok := t.asked[key]
	if !ok {
		m := *p.of
		m.Range, m.Offset = p.Range, p.offset()
		b = t.cfg.Backing(m)
		t.asked[key] = b
	}
	return b
}

// shadowed appends p, a piece for each mapping of its shadow.
func (t *Settler) shadowed(out []piece, p piece) []piece {
	for {
		s := page.Range{Start: p.shadow, End: p.shadow + page.Addr(p.Bytes())}
		m, ok := t.find(s.Start)
		if !ok || !private(m) {
			t.skip(&p, fmt.Errorf("its shadow at %v is not private anonymous memory", s.Start))
			return out
		}
		if s.End = min(s.End, m.End); t.taken.BytesIn(s) > 0 {
			t.skip(&p, fmt.Errorf("its shadow at %v has moved to another mapping of the same content (MREMAP_DONTUNMAP)", s.Start))
			return out
		}
		p.flags = m.Flags
		if s.Bytes() == p.Bytes() {
			return append(out, p)
		}
		head, rest := p.cut(p.Start + page.Addr(s.Bytes()))
		out, p = append(out, head), rest
	}
}

// private reports whether m is private anonymous memory.
func private(m *proc.Mapping) bool { return !m.Shared && m.Ino == 0 && m.Dev == 0 }

func (t *Settler) skip(p *piece, why error) {
	m := *p.of
	m.Range, m.Offset = p.Range, p.offset()
	t.rep.Skipped = append(t.rep.Skipped, Skipped{m, why})
}
