package dirtytest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Shadow is a copy of a process's memory that knows only what a tracker told.
type Shadow struct {
	t     testing.TB
	pid   int
	track dirty.Tracker
	mem   *proc.Memory
	pages map[page.Num]*[page.Size]byte
	last  dirty.Pages
	// Read is how many pages were read.
	Read uint64
}

// NewShadow does not own track.
func NewShadow(t testing.TB, pid int, track dirty.Tracker) *Shadow {
	t.Helper()
	mem, err := proc.OpenMemory(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mem.Close() })
	return &Shadow{t: t, pid: pid, track: track, mem: mem, pages: map[page.Num]*[page.Size]byte{}}
}

// Round lets the tracker look, reads what was written, and drops what is no
// content any more.
func (s *Shadow) Round() dirty.Pages {
	s.t.Helper()
	return s.look(s.track.Collect)
}

func (s *Shadow) look(look func([]proc.Mapping) (dirty.Pages, error)) dirty.Pages {
	s.t.Helper()
	maps, err := proc.ReadMaps(s.pid)
	if err != nil {
		s.t.Fatal(err)
	}
	p, err := look(maps)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Send(&p)
	return p
}

// Send does what Round does after the look.
func (s *Shadow) Send(p *dirty.Pages) {
	all := page.Union(&p.Content, &p.Shared.Content)
	for n := range s.pages {
		if !all.Contains(n.Addr()) {
			delete(s.pages, n)
		}
	}
	wrote := page.Union(&p.Written, &p.Shared.Written)
	for _, r := range wrote.Ranges() {
		s.read(r)
	}
	s.last = *p
}

const most = 256 << 10

func (s *Shadow) read(r page.Range) {
	for !r.Empty() {
		part := page.Range{Start: r.Start, End: min(r.End, r.Start+most)}
		r.Start = part.End
		b := make([]byte, part.Bytes())
		err := s.mem.ReadPages([]page.Range{part}, b)
		if err == nil {
			s.take(part, b)
			continue
		}
		// Some of it went away meanwhile.
		for at := part.Start; at < part.End; at += page.Size {
			b := make([]byte, page.Size)
			if err := s.mem.ReadPages([]page.Range{page.PageOf(at)}, b); err != nil {
				delete(s.pages, at.Page())
				continue
			}
			s.take(page.PageOf(at), b)
		}
	}
}

func (s *Shadow) take(r page.Range, b []byte) {
	s.track.Sent([]page.Range{r}, b)
	s.Read += uint64(r.Pages())
	for at := r.Start; at < r.End; at += page.Size {
		to := s.pages[at.Page()]
		if to == nil {
			to = new([page.Size]byte)
			s.pages[at.Page()] = to
		}
		copy(to[:], b)
		b = b[page.Size:]
	}
}

// Diff compares the shadow with the memory of the process, which must stand still
// since before the last Round or Last: what is content must be equal and must be
// what the page tables say, all else must read as zero or as the file.
func (s *Shadow) Diff() error {
	maps, err := proc.ReadMaps(s.pid)
	if err != nil {
		return err
	}
	// An object that is mapped twice was told at its first address.
	type place struct{ dev, ino, offset uint64 }
	shared := map[place]bool{}
	var errs []error
	if err := s.exact(maps); err != nil {
		errs = append(errs, err)
	}
	var compared, content int
	for i := range maps {
		m := &maps[i]
		if m.Name == "[vdso]" || m.Name == "[vsyscall]" || len(m.Name) > 4 && m.Name[:5] == "[vvar" {
			continue
		}
		f, err := source(s.pid, m)
		if err != nil {
			return err
		}
		for at := m.Start; at < m.End; at += page.Size {
			offset := m.Offset + uint64(at-m.Start)
			want := make([]byte, page.Size)
			switch {
			case m.Shared && shared[place{m.Dev, m.Ino, offset}]:
				continue
			case m.Shared:
				shared[place{m.Dev, m.Ino, offset}] = true
				if s.last.Shared.Content.Contains(at) {
					content++
					copy(want, s.get(at, &errs))
				}
			case s.last.Guards.Contains(at):
				continue
			case s.last.Content.Contains(at):
				content++
				copy(want, s.get(at, &errs))
			case f != nil:
				if _, err := f.ReadAt(want, int64(offset)); err != nil && !errors.Is(err, io.EOF) {
					return err
				}
			}
			got := make([]byte, page.Size)
			if err := s.mem.ReadAt(got, at); err != nil {
				if m.Ino != 0 && errors.Is(err, proc.ErrNoPage) {
					continue // behind the end of the file
				}
				return err
			}
			compared++
			if !bytes.Equal(got, want) && len(errs) < 20 {
				k := 0
				for got[k] == want[k] {
					k++
				}
				errs = append(errs, fmt.Errorf("page %v of %v %s (shared %v): differs from byte %d on; content %v", at, m.Range, m.Name,
					m.Shared, k, s.last.Content.Contains(at) || s.last.Shared.Content.Contains(at)))
			}
		}
		if f != nil {
			f.Close()
		}
	}
	if compared < 100 || content < 20 {
		errs = append(errs, fmt.Errorf("only %d pages compared, %d with content", compared, content))
	}
	return errors.Join(errs...)
}

func (s *Shadow) get(at page.Addr, errs *[]error) []byte {
	b := s.pages[at.Page()]
	if b == nil {
		if len(*errs) < 20 {
			*errs = append(*errs, fmt.Errorf("page %v is content and was never told as written", at))
		}
		return nil
	}
	return b[:]
}

// source is the file behind a private mapping, nil for none.
func source(pid int, m *proc.Mapping) (*os.File, error) {
	if m.Ino == 0 || m.Shared {
		return nil, nil
	}
	return os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, uint64(m.Start), uint64(m.End)))
}
