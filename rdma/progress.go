package rdma

import (
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/rdma/verbs"
	"github.com/pageferry/pageferry/transport"
)

// Work requests are told apart by the upper bits of their ids.
const (
	idSend uint64 = iota << 56 // and the chunk's number
	idRecv                     // and the slot
	idRead                     // and the place in reads
	idMask uint64 = 0xff << 56
)

// signalEvery is how many chunks one completion stands for.
const signalEvery = 8

// ErrRemoteMemory: the peer's device refused a READ: no such key, or an address or
// length outside of what it is for. The lane has ended.
var ErrRemoteMemory = errors.New("rdma: the peer has no such memory")

// progress takes what has completed off the queue, posts what that allows, and
// returns how much it was. l.mu is held.
func (l *Lane) progress() int { return l.progressWithin(0) }

// progressWithin polls for so long if there is nothing at first.
func (l *Lane) progressWithin(d time.Duration) int {
	if l.err != nil {
		return 0
	}
	n, err := l.cq.Poll(l.wc[:], d)
	if err != nil {
		l.fail(fmt.Errorf("%w: %w: %w", transport.ErrPeer, ErrDevice, err))
		return 0
	}
	for i := range l.wc[:n] {
		if err := l.complete(&l.wc[i]); err != nil {
			l.fail(err)
			return 0
		}
	}
	if n > 0 {
		l.flush()
		l.recvCond.Broadcast()
		l.sendCond.Broadcast()
	}
	return n
}

func (l *Lane) complete(c *verbs.Completion) error {
	if c.Status != verbs.Success {
		return l.completionError(c)
	}
	n := c.ID &^ idMask
	switch c.ID & idMask {
	case idSend:
		l.sent = n + 1
		l.goodbyeArrived = l.goodbyeSent && l.sent == l.posted
	case idRead:
		p := l.reads[n]
		l.reads[n] = nil
		l.freeReads = append(l.freeReads, int(n))
		p.fetched = true
		l.stats.BytesReceived += uint64(p.ref.len)
		if !p.remote {
			l.owedPulls++
		}
	case idRecv:
		return l.received(int(n), int(c.Len))
	}
	return nil
}

// completionError is what becomes of a request that failed. The queue pair is in
// the error state, and flushes all others.
func (l *Lane) completionError(c *verbs.Completion) error {
	what := map[uint64]string{idSend: "send", idRecv: "receive", idRead: "read"}[c.ID&idMask]
	err := fmt.Errorf("%w: RDMA %s: %s", transport.ErrPeer, what, c.Status)
	if c.Status == verbs.RemoteAccessError || c.Status == verbs.RemoteInvalidRequest {
		err = fmt.Errorf("%w: %w", err, ErrRemoteMemory)
	}
	return err
}

// received takes a chunk that came into slot.
func (l *Lane) received(slot, n int) error {
	at := slot * slotSize
	c, err := parseChunk(l.ring[at : at+n : at+n])
	if err != nil {
		return err
	}
	l.stats.BytesReceived += uint64(n)
	l.credits += int(c.credits)
	if int(c.pulled) > len(l.refs) {
		return fmt.Errorf("%w: %d payloads fetched, %d were sent", transport.ErrDamaged, c.pulled, len(l.refs))
	}
	for _, b := range l.refs[:c.pulled] {
		b.Release()
	}
	l.refs = l.refs[:copy(l.refs, l.refs[c.pulled:])]
	l.ended = l.ended || c.flags&flagGoodbye != 0
	it := item{slot: slot, data: c.data}
	l.pulls = append(l.pulls, make([]*pull, c.inline)...)
	if c.flags&flagReference != 0 {
		room := 0
		if l.cfg.Pool != nil {
			room = l.cfg.Pool.BufferSize()
		}
		if c.ref.len == 0 || int(c.ref.len) > room {
			return fmt.Errorf("%w: payload of %d bytes on a lane that takes %d", transport.ErrDamaged, c.ref.len, room)
		}
		it.ref = &pull{ref: c.ref}
		l.pulls = append(l.pulls, it.ref)
	}
	if len(it.data) == 0 && it.ref == nil {
		l.repost(slot)
		return nil
	}
	if len(l.items) >= dataSlots {
		return fmt.Errorf("%w: more chunks than there are credits", transport.ErrDamaged)
	}
	l.items = append(l.items, it)
	return nil
}

// never is closed: a pool waits for nobody with it.
var never = func() chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// flush posts whatever can be: slots to receive into, READs of payloads that have
// come, and what the peer is owed where no chunk takes it along.
func (l *Lane) flush() {
	if l.err != nil {
		return
	}
	for len(l.pulls) > 0 && l.pulls[0] != nil && len(l.freeReads) > remoteReads {
		b := l.cfg.Pool.Get(int(l.pulls[0].ref.len), never)
		if b == nil {
			break
		}
		l.fetch(b)
	}
	if (l.owedPulls > 0 || l.owedCredits >= dataSlots/2) && l.slotFree() && !l.goodbyeSent {
		l.post(l.slot(), 0, 0, 0, reference{})
	}
	err := l.flushRecv()
	if err == nil {
		err = l.qp.PostSend(l.sends)
		l.sends = l.sends[:0]
	}
	if err == nil {
		err = l.readQP.PostSend(l.asks)
		l.asks = l.asks[:0]
	}
	if err != nil {
		l.fail(fmt.Errorf("%w: %w: %w", transport.ErrPeer, ErrDevice, err))
	}
}

// fetch reads the oldest payload that waits for it into b.
func (l *Lane) fetch(b *transport.Buffer) {
	p := l.pulls[0]
	l.served()
	l.read(p, b)
}

// served drops the first of pulls: there is a buffer for it.
func (l *Lane) served() { l.pulls = l.pulls[:copy(l.pulls, l.pulls[1:])] }

// read appends the READ of p into b; there must be a free place in reads.
func (l *Lane) read(p *pull, b *transport.Buffer) {
	i := l.freeReads[len(l.freeReads)-1]
	l.freeReads = l.freeReads[:len(l.freeReads)-1]
	p.buf, p.posted = b, true
	l.reads[i] = p
	l.asks = append(l.asks, verbs.WorkRequest{
		ID: idRead | uint64(i), Op: verbs.OpRead, Flags: verbs.Signaled,
		Addr: bufferAddr(b), Len: p.ref.len, LKey: l.keys[b.Pool()].LKey, Remote: p.ref.addr, RKey: p.ref.key,
	})
}

// repost makes slot free to receive into again.
func (l *Lane) repost(slot int) {
	l.recvs = append(l.recvs, verbs.WorkRequest{
		ID: idRecv | uint64(slot), Addr: l.ringAddr + uint64(slot*slotSize), Len: slotSize, LKey: l.ringMR.LKey,
	})
}

func (l *Lane) flushRecv() error {
	if len(l.recvs) == 0 || l.err != nil {
		return nil
	}
	err := l.qp.PostRecv(l.recvs)
	l.recvs = l.recvs[:0]
	return err
}

func (l *Lane) slotFree() bool { return l.posted-l.sent < sendSlots }

// slot is the memory of the next chunk.
func (l *Lane) slot() []byte {
	at := (recvSlots + int(l.posted%sendSlots)) * slotSize
	return l.ring[at : at+slotSize : at+slotSize]
}

// post appends the chunk in b, which has n bytes of data and in them the beginning of
// inline payloads, to what is to be posted.
func (l *Lane) post(b []byte, n, inline int, flags uint16, ref reference) {
	if l.owedCredits > 0 {
		// The peer may use a credit at once: its slot must be posted by then.
		if err := l.flushRecv(); err != nil {
			l.fail(fmt.Errorf("%w: %w: %w", transport.ErrPeer, ErrDevice, err))
			return
		}
	}
	putPrefix(b, chunk{flags: flags, credits: uint16(l.owedCredits), pulled: uint16(l.owedPulls), inline: uint16(inline)}, n)
	l.owedCredits, l.owedPulls = 0, 0
	size := prefixSize + n
	if flags&flagReference != 0 {
		appendReference(b[:size], ref)
		size += referenceSize
	}
	w := verbs.WorkRequest{
		ID: idSend | l.posted, Op: verbs.OpSend, Len: uint32(size), LKey: l.ringMR.LKey,
		Addr: l.ringAddr + uint64((recvSlots+int(l.posted%sendSlots))*slotSize),
	}
	if l.posted%signalEvery == signalEvery-1 || flags&flagGoodbye != 0 {
		w.Flags = verbs.Signaled
	}
	l.posted++
	l.sends = append(l.sends, w)
	l.stats.BytesSent += uint64(size + int(ref.len))
}
