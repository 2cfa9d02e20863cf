package pagestore

import "github.com/pageferry/pageferry/internal/sys"

// The log of a space is a ring of messages as read(2) gives them. Those from Seq
// on, up to the first empty slot (whose first word is zero), were read and not
// applied: after a kill as well, because a slot is emptied only after the
// message in it was counted as applied. Messages are applied together, in a
// Change.
const (
	logSlots     = 512
	logSlotWords = sys.UffdMsgSize / 8
)

// Seq is how many messages were applied to the space so far. Lock must be held.
func (sp *Space) Seq() uint64 {
	_, _, seq := unpackCommit(sp.st.load64(sp.at + pCommit))
	return seq
}

// slotWord is the word at which the slot of message seq begins.
func (sp *Space) slotWord(seq uint64) int {
	return int(sp.st.load64(sp.at+pLog)) + int(seq%logSlots)*logSlotWords
}

// LogTail is where to read(2) the next messages to, and empty when the ring is
// full. Lock must be held until LogRead.
func (sp *Space) LogTail() []byte {
	if sp.pending == logSlots {
		return nil
	}
	from := sp.slotWord(sp.Seq() + uint64(sp.pending))
	to := int(sp.st.load64(sp.at+pLog)) + logSlots*logSlotWords
	if oldest := sp.slotWord(sp.Seq()); oldest > from {
		to = oldest
	}
	return sp.st.mem[from*8 : to*8]
}

// LogRead says how many bytes were read to LogTail. Lock must be held.
func (sp *Space) LogRead(n int) { sp.pending += n / sys.UffdMsgSize }

// LogFull reports whether there is room for few messages only.
func (sp *Space) LogFull() bool { return sp.pending > logSlots-64 }

// countPending finds what a killed pager had read and not applied.
func (sp *Space) countPending() {
	seq := sp.Seq()
	for sp.pending = 0; sp.pending < logSlots && sp.st.load64(sp.slotWord(seq+uint64(sp.pending))) != 0; {
		sp.pending++
	}
	for k := sp.pending; k < logSlots; k++ { // counted as applied, not emptied
		sp.st.store64(sp.slotWord(seq+uint64(k)), 0)
	}
}

// Messages appends to out what was read and not applied, from message number
// from of it on. Lock must be held.
func (sp *Space) Messages(from int, out []sys.UffdMsg) []sys.UffdMsg {
	for k := from; k < sp.pending; k++ {
		at := sp.slotWord(sp.Seq()+uint64(k)) * 8
		out = sys.DecodeUffdMsgs(sp.st.mem[at:at+sys.UffdMsgSize], out)
	}
	return out
}

// Pending is how many messages were read and not applied. Lock must be held.
func (sp *Space) Pending() int { return sp.pending }
