package pagestore

import (
	"fmt"
	"sync/atomic"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// Some memory is veiled: the program sees a file in its place (fusemem), and its
// pages land in a shadow behind it. What must survive a pager of that lies here:
// which pages the program has given up, for the file would show their old content
// again; the userfaultfds that tell of it; and the events that are being dealt
// with.
const (
	vState  = iota // 1: the program is being stopped, or is stopped, for the events
	vEvents        // each a message, and the process that it is of, 0 where nobody knows
	// MaxVeilEvents is how many are dealt with at once.
	MaxVeilEvents = 64
	eventWords    = sys.UffdMsgSize/8 + 1
	vFDs          = vEvents + MaxVeilEvents*eventWords
	maxVeils      = 1024
	veilWords     = vFDs + maxVeils
)

// givenUp is the bitmap of src, or nil where nothing of it is veiled.
func (s *Source) givenUp() *page.Bitmap { return s.gone.Load() }

// Veil makes room for what must be known of veiled memory of s. Idempotent.
func (s *Source) Veil() error {
	st := s.st
	st.mu.Lock()
	defer st.mu.Unlock()
	at := sourceTable + s.slot*sourceWords + sVeil
	if st.load64(at) != 0 {
		return nil
	}
	off, err := st.alloc(veilWords + page.Words(s.Len()))
	if err != nil {
		return err
	}
	s.veil = off
	s.gone.Store(page.BitmapOver(st.words(off+veilWords, page.Words(s.Len())), s.Len()))
	st.store64(at, uint64(off))
	return nil
}

// loadVeil is the part of loadSource for it.
func (s *Source) loadVeil() error {
	off := s.st.load64(sourceTable + s.slot*sourceWords + sVeil)
	if off == 0 {
		return nil
	}
	n := veilWords + page.Words(s.Len())
	if off < firstFree || off > uint64(len(s.st.w)-n) {
		return fmt.Errorf("%w: veil of source %d", ErrFormat, s.slot)
	}
	s.veil = int(off)
	s.gone.Store(page.BitmapOver(s.st.words(s.veil+veilWords, page.Words(s.Len())), s.Len()))
	return nil
}

// Veiled reports whether Veil was called.
func (s *Source) Veiled() bool { return s.givenUp() != nil }

// GiveUp says that the program has given up the pages of r: they are zero from now
// on, where it has no copy of its own.
func (s *Source) GiveUp(r page.Range) {
	s.Each(r, func(p page.Range, first int) { s.givenUp().AtomicSetRange(first, first+p.Pages()) })
}

// GivenUp reports whether page number i was given up.
func (s *Source) GivenUp(i int) bool {
	b := s.givenUp()
	return b != nil && b.AtomicGet(i)
}

// NotGivenUp reports whether s has a page of r that was not.
func (s *Source) NotGivenUp(r page.Range) (found bool) {
	b := s.givenUp()
	s.Each(r, func(p page.Range, first int) {
		end := first + p.Pages()
		found = found || b == nil || b.NextClear(first, end) < end
	})
	return found
}

// AllGivenUp are the pages of r that were, of those that s has.
func (s *Source) AllGivenUp(r page.Range) (out page.Set) {
	b := s.givenUp()
	if b == nil {
		return out
	}
	s.Each(r, func(p page.Range, first int) {
		end := first + p.Pages()
		for i := b.NextSet(first, end); i < end; {
			j := b.NextClear(i, end)
			at := p.Start + page.Addr(i-first)<<page.Shift
			out.Add(page.Range{Start: at, End: at + page.Addr(j-i)<<page.Shift})
			i = b.NextSet(j, end)
		}
	})
	return out
}

// VeilFDs are the numbers of the userfaultfds that tell what programs do to veiled
// memory.
func (s *Source) VeilFDs() (out []int) {
	for k := range maxVeils {
		if v := s.st.load64(s.veil + vFDs + k); v != 0 {
			out = append(out, int(v)-1)
		}
	}
	return out
}

// AddVeilFD and DropVeilFD keep the list of them.
func (s *Source) AddVeilFD(fd int) error {
	for k := range maxVeils {
		if atomic.CompareAndSwapUint64(s.st.word(s.veil+vFDs+k), 0, uint64(fd)+1) {
			return nil
		}
	}
	return fmt.Errorf("%w: %d userfaultfds for veiled memory", ErrFull, maxVeils)
}

func (s *Source) DropVeilFD(fd int) {
	for k := range maxVeils {
		if atomic.CompareAndSwapUint64(s.st.word(s.veil+vFDs+k), uint64(fd)+1, 0) {
			return
		}
	}
}

// Stopping reports whether the program was being stopped for a message when the
// last pager ended; SetStopping says so.
func (s *Source) Stopping() bool { return s.st.load64(s.veil+vState) != 0 }

func (s *Source) SetStopping(on bool) {
	v := uint64(0)
	if on {
		v = 1
	}
	s.st.store64(s.veil+vState, v)
}

// VeilSlot is where to read(2) event number k to.
func (s *Source) VeilSlot(k int) []byte {
	at := (s.veil + vEvents + k*eventWords) * 8
	return s.st.mem[at : at+sys.UffdMsgSize]
}

// VeilEvent is what was read there, and the process that it is of, 0 where that is
// not known; ok is false where nothing was.
func (s *Source) VeilEvent(k int) (m sys.UffdMsg, pid int, ok bool) {
	b := s.VeilSlot(k)
	if b[0] == 0 {
		return m, 0, false
	}
	return sys.DecodeUffdMsgs(b, nil)[0], int(s.st.load64(s.veil + vEvents + k*eventWords + sys.UffdMsgSize/8)), true
}

// SetVeilPID says of which process the event in slot k is; before it is read.
func (s *Source) SetVeilPID(k, pid int) {
	s.st.store64(s.veil+vEvents+k*eventWords+sys.UffdMsgSize/8, uint64(pid))
}

// ClearVeilEvents empties the slots.
func (s *Source) ClearVeilEvents() {
	for k := range MaxVeilEvents {
		s.st.store64(s.veil+vEvents+k*eventWords, 0)
	}
}
