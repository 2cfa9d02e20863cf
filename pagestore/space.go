package pagestore

import (
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/pageferry/pageferry/page"
)

// Words of an entry of the space table.
const (
	pState = iota
	pFD
	pMem // descriptor of /proc/PID/mem plus one, 0 without
	pPID
	pSource
	pParent    // slot plus one, 0 without
	pParentSeq // the parent's Seq of the FORK event
	pBits
	pLog
	// pCommit is the one word whose store makes a step happen: which of the
	// two segment tables counts (bit 63), its length (bits 40 to 62), and how
	// many messages were applied (bits 0 to 39).
	pCommit
	pSegs0
	pSegs1
	pCap0
	pCap1
	spaceWords = 16
)

// States of an entry.
const (
	stateFree = iota
	stateLive
	stateGone // its words can be taken by another space of the same source
)

func spaceAt(slot int) int { return spaceTable + slot*spaceWords }

// Space is an address space here. Methods that need its lock say so.
type Space struct {
	st   *Store
	src  *Source
	slot int
	at   int // of its entry

	mu      gate
	gone    bool
	flux    bool
	pending int       // messages in the log that are not applied
	segs    []Segment // in ascending order of Dst
	bySrc   []Segment // in ascending order of Src, without aliases
	bits    *page.Bitmap
	shared  bool // some segment is
	missing atomic.Int64
	fd      atomic.Int64
}

// Lock excludes placing: hold it across reading and applying events. It takes
// no lock and returns false when the space is gone.
func (sp *Space) Lock() bool {
	sp.mu.Lock()
	if sp.gone {
		sp.mu.Unlock()
		return false
	}
	return true
}

// RLock excludes that: hold it across looking up and placing. It takes no lock
// and returns false when the space is gone.
func (sp *Space) RLock() bool {
	sp.mu.RLock()
	if sp.gone {
		sp.mu.RUnlock()
		return false
	}
	return true
}

// Unlock undoes Lock, RUnlock undoes RLock.
func (sp *Space) Unlock()  { sp.mu.Unlock() }
func (sp *Space) RUnlock() { sp.mu.RUnlock() }

// SetFlux says whether messages were read that are not applied: what Lookup and
// Targets tell may not hold any more, and nothing must be placed. Lock must be
// held; RLock for Flux.
func (sp *Space) SetFlux(on bool) { sp.flux = on }

// Flux reports what SetFlux said last.
func (sp *Space) Flux() bool { return sp.flux }

// Source is where its pages come from.
func (sp *Space) Source() *Source { return sp.src }

// FD is the userfaultfd's number, or -1 where there is none.
func (sp *Space) FD() int { return int(sp.fd.Load()) }

// SetFD records another number for the userfaultfd.
func (sp *Space) SetFD(fd int) {
	sp.st.store64(sp.at+pFD, uint64(fd))
	sp.fd.Store(int64(fd))
}

// MemFD is the number of the descriptor of /proc/PID/mem, or -1.
func (sp *Space) MemFD() int { return int(sp.st.load64(sp.at+pMem)) - 1 }

// SetMemFD records it; -1 for none.
func (sp *Space) SetMemFD(fd int) { sp.st.store64(sp.at+pMem, uint64(fd+1)) }

// PID is the process's, 0 where it is not known (a forked child).
func (sp *Space) PID() int { return int(sp.st.load64(sp.at + pPID)) }

// Forked reports whether a FORK event made it.
func (sp *Space) Forked() bool { return sp.st.load64(sp.at+pParent) != 0 }

// Missing is how many of its pages are not settled.
func (sp *Space) Missing() int { return int(max(sp.missing.Load(), 0)) }

// AddSpace makes a space that needs every page of src, laid out by segs.
// Descriptors are recorded only; -1 where there is none.
func (s *Store) AddSpace(src *Source, pid, fd, mem int, segs []Segment) (*Space, error) {
	segs = slices.Clone(segs)
	sortByDst(segs)
	for i, g := range segs {
		if g.Dst.Empty() || !g.Dst.Aligned() || !g.Src.Aligned() || i > 0 && g.Dst.Start < segs[i-1].Dst.End {
			return nil, fmt.Errorf("pagestore: space %d: region %v is empty, not whole pages, or overlaps another", src.id, g.Dst)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	sp, err := s.newSpace(src, len(segs))
	if err != nil {
		return nil, err
	}
	sp.bits.AtomicSetRange(0, src.Len())
	sp.missing.Store(int64(src.Len()))
	s.store64(sp.at+pPID, uint64(pid))
	sp.SetFD(fd)
	sp.SetMemFD(mem)
	sp.writeSegs(segs, 0)
	sp.dropUnmapped()
	s.store64(sp.at+pState, stateLive)
	s.list(sp)
	return sp, nil
}

// newSpace takes an entry for a space that is not live yet; mu is held.
func (s *Store) newSpace(src *Source, segs int) (*Space, error) {
	used := int(s.w[wSpaces])
	slot := used
	for i := range used {
		if s.w[spaceAt(i)+pState] == stateGone && s.w[spaceAt(i)+pSource] == uint64(src.slot) {
			slot = i
			break
		}
	}
	at := spaceAt(slot)
	if slot == used {
		if used == maxSpaces {
			return nil, fmt.Errorf("%w: %d spaces", ErrFull, maxSpaces)
		}
		bits, err := s.alloc(page.Words(src.Len()))
		if err != nil {
			return nil, err
		}
		log, err := s.alloc(logSlots * logSlotWords)
		if err != nil {
			return nil, err
		}
		clear(s.w[at : at+spaceWords])
		s.w[at+pSource], s.w[at+pBits], s.w[at+pLog] = uint64(src.slot), uint64(bits), uint64(log)
		s.store64(wSpaces, uint64(used+1))
	}
	clear(s.words(int(s.w[at+pLog]), logSlots*logSlotWords))
	clear(s.words(int(s.w[at+pBits]), page.Words(src.Len())))
	for _, k := range []int{pFD, pMem, pPID, pParent, pParentSeq, pCommit} {
		s.w[at+k] = 0
	}
	sp := &Space{st: s, src: src, slot: slot, at: at}
	sp.bits = page.BitmapOver(s.words(int(s.w[at+pBits]), page.Words(src.Len())), src.Len())
	for half := range 2 {
		if err := sp.room(half, segs); err != nil {
			return nil, err
		}
	}
	return sp, nil
}

func (s *Store) loadSpace(slot int) (*Space, error) {
	at := spaceAt(slot)
	bad := func(what string) (*Space, error) {
		return nil, fmt.Errorf("%w: %s of space %d", ErrFormat, what, slot)
	}
	fits := func(off, n uint64) bool {
		return off >= firstFree && n <= uint64(len(s.w)) && off <= uint64(len(s.w))-n
	}
	sources := s.Sources()
	if s.w[at+pSource] >= uint64(len(sources)) {
		return bad("source")
	}
	src := sources[s.w[at+pSource]]
	sp := &Space{st: s, src: src, slot: slot, at: at}
	if !fits(s.w[at+pBits], uint64(page.Words(src.Len()))) || !fits(s.w[at+pLog], logSlots*logSlotWords) {
		return bad("bitmap or log")
	}
	sp.bits = page.BitmapOver(s.words(int(s.w[at+pBits]), page.Words(src.Len())), src.Len())
	sp.missing.Store(int64(sp.bits.Count()))
	sp.fd.Store(int64(s.w[at+pFD]))
	half, n, _ := unpackCommit(s.w[at+pCommit])
	off := s.w[at+pSegs0+half]
	if uint64(n) > s.w[at+pCap0+half] || !fits(off, uint64(n)*segWords) {
		return bad("segments")
	}
	sp.setSegs(readSegs(s.words(int(off), n*segWords)))
	sp.countPending()
	return sp, nil
}

// list makes a live space known; mu is held, or nobody else knows the store.
func (s *Store) list(sp *Space) {
	for _, p := range []*atomic.Pointer[[]*Space]{&s.spaces, &sp.src.spaces} {
		now := append(slices.Clone(*p.Load()), sp)
		p.Store(&now)
	}
}

// Gone forgets a space whose process has ended, and returns the numbers of its
// descriptors, now the caller's to close, or -1. Neither lock may be held.
// Idempotent.
func (sp *Space) Gone() (fd, mem int) {
	if !sp.Lock() {
		return -1, -1
	}
	defer sp.Unlock()
	fd, mem = sp.FD(), sp.MemFD()
	sp.gone = true // before its words can be taken by another
	s := sp.st
	s.mu.Lock()
	defer s.mu.Unlock()
	if !sp.Forked() {
		s.Add(Dropped, uint64(sp.Missing()))
	}
	for _, p := range []*atomic.Pointer[[]*Space]{&s.spaces, &sp.src.spaces} {
		now := slices.DeleteFunc(slices.Clone(*p.Load()), func(o *Space) bool { return o == sp })
		p.Store(&now)
	}
	sp.missing.Store(0)
	s.store64(sp.at+pState, stateGone)
	return fd, mem
}

// Lookup says which page of the source belongs at a, and whether it is missing.
// ok is false where the source has nothing for a. RLock must be held.
func (sp *Space) Lookup(a page.Addr) (i int, missing, ok bool) {
	g, ok := findSegment(sp.segs, a)
	if !ok {
		return 0, false, false
	}
	i, ok = sp.src.Find(g.Src + (a - g.Dst.Start))
	if !ok {
		return 0, false, false
	}
	return i, sp.bits.AtomicGet(i), true
}

// Hole is the range from a on, at most limit bytes, for which the source has no
// page, of private memory that is served; empty where that does not hold. RLock
// must be held.
func (sp *Space) Hole(a page.Addr, limit uint64) page.Range {
	g, ok := findSegment(sp.segs, a)
	if !ok || g.Flags != 0 {
		return page.Range{}
	}
	r := page.Range{Start: a, End: min(g.Dst.End, a+page.Addr(limit))}
	sp.src.Each(g.part(r).SrcRange(), func(p page.Range, _ int) {
		r.End = min(r.End, a+(p.Start-g.part(r).Src))
	})
	return r
}

// IsMissing reports whether page number i is missing.
func (sp *Space) IsMissing(i int) bool { return sp.bits.AtomicGet(i) }

// Target is a run of missing pages: where it belongs, its first number, and
// what its region is.
type Target struct {
	Dst   page.Range
	First int
	Flags SegmentFlags
}

// Targets appends the missing pages of source range r to out, as runs that lie
// in one piece on both sides. RLock must be held.
func (sp *Space) Targets(r page.Range, out []Target) []Target {
	for k := firstBySrc(sp.bySrc, r.Start); k < len(sp.bySrc) && sp.bySrc[k].Src < r.End; k++ {
		g := sp.bySrc[k]
		sp.src.Each(g.SrcRange().Intersect(r), func(p page.Range, first int) {
			end := first + p.Pages()
			for i := sp.bits.NextSet(first, end); i < end; {
				j := sp.bits.NextClear(i, end)
				at := g.Dst.Start + (p.Start - g.Src) + page.Addr(i-first)<<page.Shift
				out = append(out, Target{page.Range{Start: at, End: at + page.Addr(j-i)<<page.Shift}, i, g.Flags})
				i = sp.bits.NextSet(j, end)
			}
		})
	}
	return out
}

// EachMissing calls f for every run of missing pages, until it returns false.
// RLock must be held.
func (sp *Space) EachMissing(f func(t Target) bool) {
	var ts []Target
	for _, g := range sp.bySrc {
		ts = sp.Targets(g.SrcRange(), ts[:0])
		for _, t := range ts {
			if !f(t) {
				return
			}
		}
	}
}

// Settle says that pages [i, j) are no longer missing, and returns how many
// were. RLock or Lock must be held.
func (sp *Space) Settle(i, j int) int {
	n := sp.bits.AtomicClearRange(i, j)
	sp.missing.Add(-int64(n))
	return n
}

// dropUnmapped settles what no segment leads to.
func (sp *Space) dropUnmapped() {
	at := 0
	mark := func(i, j int) {
		if i < j {
			sp.Settle(i, j)
		}
	}
	for _, g := range sp.bySrc {
		sp.src.Each(g.SrcRange(), func(p page.Range, first int) {
			mark(at, first)
			at = first + p.Pages()
		})
	}
	mark(at, sp.src.Len())
}

// Trapped are the ranges of the segments that the userfaultfd serves.
func (sp *Space) Trapped() (out []page.Range) {
	if !sp.RLock() {
		return nil
	}
	defer sp.RUnlock()
	for _, g := range sp.segs {
		if g.Flags&Written == 0 {
			out = append(out, g.Dst)
		}
	}
	return out
}

// SharedMissing reports whether a page of a shared segment may be missing. Lock
// must be held.
func (sp *Space) SharedMissing() bool {
	return sp.shared && sp.missing.Load() > 0
}
