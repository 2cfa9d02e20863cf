package codec

import (
	"sync"
	"sync/atomic"

	"github.com/pageferry/pageferry/page"
)

// SentConfig is how much a Sent remembers.
type SentConfig struct {
	// Bytes bounds the memory for pages. Default 64 MiB. The kernel gives it
	// page by page, as it is used; a little more is needed to find them.
	Bytes int
}

// Sent remembers pages as they were sent, so that only what has changed needs to
// be sent the next time.
//
// Who is dirty is dirty again and again: all of such a working set comes by once
// in each round. A cache that threw out what was used longest ago would throw out
// each page just before its turn, if the set does not fit. So a page makes room
// only when it was not sent in the last round (QEMU's page cache does the
// same), and of a set that does not fit, a part is kept all the time.
//
// Safe for concurrent use.
type Sent struct {
	sets  uint64
	live  atomic.Int64
	once  sync.Once
	mem   []byte
	slots []sent
	locks [sentLocks]sentLock // of the sets, in turn
}

type sent struct {
	page  page.Num
	space page.Space
	round uint32
	lane  uint8
	used  bool
}

type sentLock struct {
	sync.Mutex
	sampler sampler // by page: one that changes all over does so again
	_       [64]byte
}

const (
	sentWays  = 4
	sentLocks = 64
)

// NewSent returns an empty one.
func NewSent(cfg SentConfig) *Sent {
	if cfg.Bytes <= 0 {
		cfg.Bytes = 64 << 20
	}
	s := &Sent{sets: uint64(max(cfg.Bytes/(sentWays*page.Size), 1))}
	for i := range s.locks {
		s.locks[i].sampler = sampler{window: 256, worth: 8}
	}
	return s
}

// mix spreads page numbers over sets. The constants are those of splitmix64.
func mix(space page.Space, n page.Num) uint64 {
	x := uint64(n) + uint64(space)<<52
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

func (s *Sent) find(h uint64, space page.Space, n page.Num) (lock *sentLock, first, at uint64, found bool) {
	set := h % s.sets
	lock = &s.locks[set%sentLocks]
	lock.Lock()
	first = set * sentWays
	for at = first; at < first+sentWays; at++ {
		if e := &s.slots[at]; e.used && e.page == n && e.space == space {
			return lock, first, at, true
		}
	}
	return lock, first, 0, false
}

// Exchange is told that page n is being sent in r with content p. If the version
// before is known, and what has changed takes at most limit bytes, it appends that
// to dst and returns true: the page may then be sent as that delta. Otherwise dst
// is returned as it was.
func (s *Sent) Exchange(dst []byte, space page.Space, n page.Num, p []byte, limit int, r Round) (_ []byte, ok bool) {
	if !r.Keep && s.live.Load() == 0 {
		return dst, false
	}
	s.once.Do(func() {
		s.mem, s.slots = make([]byte, s.sets*sentWays*page.Size), make([]sent, s.sets*sentWays)
	})
	h := mix(space, n)
	lock, first, at, found := s.find(h, space, n)
	defer lock.Unlock()
	takes := lock.sampler.takes(uint32(h >> 32))
	if found {
		e := &s.slots[at]
		if takes && r.has(Round{Number: e.round, Lane: e.lane}) {
			dst, ok = AppendDelta(dst, s.content(at), p, limit)
			lock.sampler.note(ok)
		}
		if !takes || r.Number == 0 {
			e.used = false
			s.live.Add(-1)
			return dst, ok
		}
	} else {
		if !takes || !r.Keep || r.Number == 0 {
			return dst, false
		}
		if at, found = s.room(first, r.Number); !found {
			return dst, false
		}
		s.live.Add(1)
	}
	s.slots[at] = sent{n, space, r.Number, r.Lane, true}
	copy(s.content(at), p)
	return dst, ok
}

func (s *Sent) content(at uint64) []byte { return s.mem[at*page.Size : (at+1)*page.Size] }

// room finds a place in the set that begins at first: a free one, or that of the
// page that was not sent for the longest time, and not in the last round.
func (s *Sent) room(first uint64, round uint32) (at uint64, ok bool) {
	oldest := round
	for i := first; i < first+sentWays; i++ {
		e := &s.slots[i]
		if !e.used {
			return i, true
		}
		if e.round+1 < round && e.round < oldest {
			oldest, at, ok = e.round, i, true
		}
	}
	if ok {
		s.live.Add(-1)
	}
	return at, ok
}

// Forget tells that what the destination has of the pages of r is no longer what
// was sent as content.
func (s *Sent) Forget(space page.Space, r page.Range) {
	if s.live.Load() == 0 {
		return
	}
	if r.Bytes()>>page.Shift > uint64(len(s.slots)) {
		s.drop(func(e *sent) bool { return e.space == space && r.Contains(e.page.Addr()) })
		return
	}
	for n := r.Start.Page(); n < r.End.Page(); n++ {
		lock, _, at, found := s.find(mix(space, n), space, n)
		if found {
			s.slots[at].used = false
			s.live.Add(-1)
		}
		lock.Unlock()
	}
}

// Reset forgets everything.
func (s *Sent) Reset() {
	if s.live.Load() > 0 {
		s.drop(func(*sent) bool { return true })
	}
}

func (s *Sent) drop(which func(*sent) bool) {
	for l := range s.locks {
		lock := &s.locks[l]
		lock.Lock()
		for set := uint64(l); set < s.sets; set += sentLocks {
			for at := set * sentWays; at < (set+1)*sentWays; at++ {
				if e := &s.slots[at]; e.used && which(e) {
					e.used = false
					s.live.Add(-1)
				}
			}
		}
		lock.Unlock()
	}
}
