package pagestore

import (
	"encoding/binary"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// The log of a space is a ring of messages as read(2) gives them. A slot whose
// first word is zero is empty; a message is taken out by counting it as applied
// and then emptying its slot, so that after a kill the messages from Seq on, up
// to the first empty slot or the end of the ring, are those that were read and
// not applied.
const (
	logSlots     = 64
	logSlotWords = sys.UffdMsgSize / 8
)

// Seq is how many messages were applied to the space so far. Lock must be held.
func (sp *Space) Seq() uint64 {
	_, _, seq := unpackCommit(sp.st.load64(sp.at + pCommit))
	return seq
}

// LogTail is where to read(2) the next messages to: room for at least one, all
// of it empty if everything read before was applied. Lock must be held until
// they are.
func (sp *Space) LogTail() []byte {
	at := int(sp.st.load64(sp.at+pLog)) + int(sp.Seq()%logSlots)*logSlotWords
	end := int(sp.st.load64(sp.at+pLog)) + logSlots*logSlotWords
	return sp.st.mem[at*8 : end*8]
}

// Next is the message to be applied next, if there is one. Lock must be held.
func (sp *Space) Next() (m sys.UffdMsg, ok bool) {
	tail := sp.LogTail()
	if binary.NativeEndian.Uint64(tail) == 0 {
		return m, false
	}
	var out [1]sys.UffdMsg
	return sys.DecodeUffdMsgs(tail[:sys.UffdMsgSize], out[:0])[0], true
}

// slot is the word at which the slot of message seq begins.
func (sp *Space) slotWord(seq uint64) int {
	return int(sp.st.load64(sp.at+pLog)) + int(seq%logSlots)*logSlotWords
}

// Done counts the next message as applied. Lock must be held.
func (sp *Space) Done() {
	half, n, seq := unpackCommit(sp.st.load64(sp.at + pCommit))
	sp.st.store64(sp.at+pCommit, packCommit(half, n, seq+1))
	sp.st.store64(sp.slotWord(seq), 0)
}

// Drop settles the missing pages whose place here is in r, because the program
// gave up their content, and returns how many. keepShared spares the regions
// whose content the program does not own alone. Repeating it does no harm. Lock
// must be held.
func (sp *Space) Drop(r page.Range, keepShared bool) (n int) {
	for _, g := range sp.segs {
		if g.Dst.Overlaps(r) && (g.Flags&Shared == 0 || !keepShared) {
			n += sp.dropSegment(g.part(r))
		}
	}
	return n
}

func (sp *Space) dropSegment(g Segment) (n int) {
	if g.Flags&Alias != 0 {
		return 0
	}
	sp.src.Each(g.SrcRange(), func(p page.Range, first int) {
		n += sp.Settle(first, first+p.Pages())
	})
	if !sp.Forked() {
		sp.st.Add(Dropped, uint64(n))
	}
	return n
}

// Remap applies the next message, a REMAP: what was at [from, from+length) is
// at to. It counts the message as applied in the same step. A length of zero is
// mremap's second mapping of shared memory. Lock must be held.
func (sp *Space) Remap(from, to page.Addr, length uint64) error {
	delta := to - from // wraps around where to is below from
	var now, moved []Segment
	if length == 0 {
		now = sp.segs
		for _, g := range sp.segs {
			if g.Dst.End > from && (len(moved) > 0 || g.Dst.Contains(from)) {
				if len(moved) > 0 && moved[len(moved)-1].Dst.End+(from-to) != g.Dst.Start {
					break
				}
				a := g.part(page.Range{Start: from, End: g.Dst.End})
				a.Dst.Start, a.Dst.End, a.Flags = a.Dst.Start+delta, a.Dst.End+delta, a.Flags|Alias
				moved = append(moved, a)
			}
		}
		for _, a := range moved {
			now, _ = cut(now, a.Dst)
		}
	} else {
		now, moved = cut(sp.segs, page.Range{Start: from, End: from + page.Addr(length)})
		var over []Segment
		now, over = cut(now, page.Range{Start: to, End: to + page.Addr(length)})
		for _, g := range over {
			sp.dropSegment(g)
		}
		for i := range moved {
			moved[i].Dst.Start += delta
			moved[i].Dst.End += delta
		}
	}
	now = append(append(make([]Segment, 0, len(now)+len(moved)), now...), moved...)
	sortByDst(now)
	now = merge(now)
	sp.st.mu.Lock()
	half, _, seq := unpackCommit(sp.st.load64(sp.at + pCommit))
	err := sp.room(half^1, len(now))
	sp.st.mu.Unlock()
	if err != nil {
		return err
	}
	sp.writeSegs(now, seq+1)
	sp.st.store64(sp.slotWord(seq), 0)
	return nil
}

// merge joins neighbours that continue each other, in place.
func merge(segs []Segment) []Segment {
	out := segs[:0]
	for _, g := range segs {
		if n := len(out); n > 0 && out[n-1].Dst.End == g.Dst.Start && out[n-1].Flags == g.Flags && out[n-1].SrcRange().End == g.Src {
			out[n-1].Dst.End = g.Dst.End
			continue
		}
		out = append(out, g)
	}
	return out
}

// ForkDone reports whether the next message, a FORK, has made its space
// already, before a kill. Lock must be held.
func (sp *Space) ForkDone() bool {
	s := sp.st
	for i := range int(s.load64(wSpaces)) {
		at := spaceAt(i)
		if s.load64(at+pState) != stateFree && s.load64(at+pParent) == uint64(sp.slot+1) && s.load64(at+pParentSeq) == sp.Seq()+1 {
			return true
		}
	}
	return false
}

// Fork makes the space of the child that the next message, a FORK, brought: it
// needs what its parent is missing, at the same places. fd is the child's
// userfaultfd. The message still has to be counted as applied. Lock must be
// held.
func (sp *Space) Fork(fd int) (*Space, error) {
	s := sp.st
	s.mu.Lock()
	defer s.mu.Unlock()
	child, err := s.newSpace(sp.src, len(sp.segs))
	if err != nil {
		return nil, err
	}
	for i := sp.bits.NextSet(0); i < sp.bits.Len(); {
		j := sp.bits.NextClear(i)
		child.missing.Add(int64(child.bits.AtomicSetRange(i, j)))
		i = sp.bits.NextSet(j)
	}
	child.SetFD(fd)
	child.SetMemFD(-1)
	s.store64(child.at+pParent, uint64(sp.slot+1))
	s.store64(child.at+pParentSeq, sp.Seq()+1)
	child.writeSegs(append([]Segment(nil), sp.segs...), 0)
	s.store64(child.at+pState, stateLive)
	s.list(child)
	return child, nil
}
