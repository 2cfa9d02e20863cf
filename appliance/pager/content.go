package pager

import (
	"errors"
	"fmt"

	"github.com/pageferry/pageferry/page"
)

// contentChunk is how much of a file is asked for at once.
const contentChunk = 1 << 20

// eachChunk reads size bytes of file number i from offset on, and calls f for each
// chunk.
func (s *server) eachChunk(i int, offset, size int64, f func(at int64, b []byte) error) error {
	if i < 0 || offset < 0 || offset%page.Size != 0 || size < 0 {
		return fmt.Errorf("pager: %d bytes of file %d at offset %d", size, i, offset)
	}
	src := s.fileSource(i)
	buf := make([]byte, contentChunk)
	for at := int64(0); at < size; {
		n := min(size-at, contentChunk)
		b := buf[:(n+page.Size-1)&^(page.Size-1)]
		if err := src.ReadPages(s.ctx, page.Num((offset+at)>>page.Shift), b, page.Demand); err != nil {
			return err
		}
		if err := f(at, b[:n]); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// maxRead is the most that one request reads.
const maxRead = 16 << 20

// read answers readMsg.
func (s *server) read(m readMsg) ([]byte, error) {
	if m.Bytes < 0 || m.Bytes > maxRead {
		return nil, fmt.Errorf("pager: %d bytes of a file at once", m.Bytes)
	}
	out := make([]byte, 0, m.Bytes)
	err := s.eachChunk(m.File, m.Offset, int64(m.Bytes), func(_ int64, b []byte) error {
		out = append(out, b...)
		return nil
	})
	return out, err
}

// whatIsShown answers opShown.
func (s *server) whatIsShown() (r shownReply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fs != nil {
		r.Dev, r.Image = s.fs.ImageID()
		r.Show, r.Views = s.shown.Show, s.shown.Views
	}
	return r
}

// veiledNow answers veiledMsg.
func (s *server) veiledNow(m veiledMsg) (r veilReply, err error) {
	src := s.store.Source(0)
	if src == nil {
		return r, nil
	}
	grain := page.Addr(max(m.Grain, page.Size)).Floor()
	src.Each(page.Range{End: 1 << 47}, func(p page.Range, first int) {
		for i := src.NextWanted(first, first+p.Pages()); i < first+p.Pages(); {
			start := (p.Start + page.Addr(i-first)<<page.Shift) / grain * grain
			r.Missing.Add(page.Range{Start: start, End: start + grain})
			i = src.NextWanted(max(i+1, first+int((min(start+grain, p.End)-p.Start)>>page.Shift)), first+p.Pages())
		}
	})
	if m.Has {
		r.Has = src.Set()
	}
	// Without s.mu: who knows may be waiting for what s.mu is needed for.
	if v := s.veiled.Load(); v != nil {
		r.Own = v.veil.Own(m.PID, page.Range{End: 1 << 47})
	}
	return r, nil
}

// replaced answers replacedMsg.
func (s *server) replaced(m replacedMsg) (err error) {
	v := s.veiled.Load()
	for _, r := range m.Ranges {
		if v != nil {
			v.src.GiveUp(r) // its shadow is empty, and what grows over it in place is new
			err = errors.Join(err, v.invalidate(r))
		}
	}
	return err
}
