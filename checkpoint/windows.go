package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// window is where we say that the process has a memfd mapped that it has not, or
// only in part: all pages have an address then, and are found, sent and kept as
// those of mappings are. Nothing is there in the process itself. At the destination
// it is a mapping, until the process runs.
type window struct {
	page.Range // with room to grow
	id         image.ObjectID
	file       *os.File
}

const (
	// windowsFrom is where they are looked for: programs and the kernel have nothing
	// there as a rule.
	windowsFrom = page.Addr(0x3800_0000_0000)
	windowsEnd  = page.Addr(0x7000_0000_0000)
	windowStep  = page.Addr(1) << 30
)

// Windows returns mappings for what descriptors of the process lead to and maps, all
// that it has, do not show: of memfds that are too large for the image to carry.
// They come behind all mappings, and what is shown twice is theirs last.
func (s *Session) Windows(maps []proc.Mapping) ([]proc.Mapping, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w, err := s.showUnmapped(maps)
	if err != nil {
		return nil, &Error{"look for memfds of", s.pid, err}
	}
	return w, nil
}

func (s *Session) showUnmapped(maps []proc.Mapping) (out []proc.Mapping, err error) {
	dir := fmt.Sprintf("/proc/%d/fd/", s.pid)
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, proc.Gone(s.pid, err)
	}
	var now []window
	defer func() {
		if err != nil {
			closeAllBut(now, s.windows.Load())
		}
	}()
	for _, e := range es {
		to, err := os.Readlink(dir + e.Name())
		if err != nil || !strings.HasPrefix(to, "/memfd:") || !strings.HasSuffix(to, " (deleted)") {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(dir+e.Name(), &st); err != nil || st.Size <= image.MaxInlineMemory {
			continue // closed meanwhile
		}
		id := image.ObjectID{Dev: st.Dev, Ino: st.Ino}
		if slices.ContainsFunc(now, func(w window) bool { return w.id == id }) || covered(maps, id, st.Size) {
			continue
		}
		w, err := s.window(id, page.Addr(st.Size).Ceil(), dir+e.Name(), append(rangesOf(maps), rangesOfWindows(now)...))
		if err != nil {
			return nil, err
		}
		if w.file == nil {
			continue
		}
		now = append(now, w)
		out = append(out, proc.Mapping{
			Range: page.Range{Start: w.Start, End: w.Start + page.Addr(st.Size).Ceil()}, Prot: unix.PROT_READ | unix.PROT_WRITE, Shared: true,
			Dev: st.Dev, Ino: st.Ino, Name: strings.TrimSuffix(to, " (deleted)"), Deleted: true,
		})
	}
	list := &now
	if len(now) == 0 {
		list = nil
	}
	if old := s.windows.Swap(list); old != nil {
		closeAllBut(*old, list)
	}
	return out, nil
}

// closeAllBut closes the files of ws that none of keep has; keep may be nil.
func closeAllBut(ws []window, keep *[]window) {
	for _, w := range ws {
		if keep == nil || !slices.ContainsFunc(*keep, func(k window) bool { return k.file == w.file }) {
			_ = w.file.Close()
		}
	}
}

// startWindows looks for the windows of a frozen process, and returns what waits for
// them: among many descriptors that takes as long as the capture of the threads.
func (c *capture) startWindows() func() ([]proc.Mapping, error) {
	var out []proc.Mapping
	var err error
	done := make(chan struct{})
	maps := c.maps
	go func() {
		defer close(done)
		out, err = c.s.showUnmapped(maps)
	}()
	return func() ([]proc.Mapping, error) { <-done; return out, err }
}

// finder is the session's, which hears of windows, too. Nil where there is none.
func (c *capture) finder(windows func() ([]proc.Mapping, error)) Finder {
	find := c.s.find
	if find == nil {
		return nil
	}
	return func(maps []proc.Mapping) (own, guards page.Set, err error) {
		shown, err := windows()
		if err != nil {
			return own, guards, err
		}
		return find(slices.Concat(maps, shown))
	}
}

func rangesOf(maps []proc.Mapping) []page.Range {
	out := make([]page.Range, len(maps))
	for i := range maps {
		out[i] = maps[i].Range
	}
	return out
}

func rangesOfWindows(ws []window) (out []page.Range) {
	for i := range ws {
		out = append(out, ws[i].Range)
	}
	return out
}

// covered reports whether shared mappings show all of an object.
func covered(maps []proc.Mapping, id image.ObjectID, size int64) bool {
	var shown page.Set
	for i := range maps {
		if m := &maps[i]; m.Shared && m.Dev == id.Dev && m.Ino == id.Ino {
			shown.Add(page.Range{Start: page.Addr(m.Offset), End: page.Addr(m.Offset + m.Bytes())})
		}
	}
	return shown.Covers(page.Range{End: page.Addr(size).Ceil()})
}

// window returns that of an object: the same as long as it can be. Without a file it
// is none, since the object has no such pages.
func (s *Session) window(id image.ObjectID, size page.Addr, path string, taken []page.Range) (window, error) {
	if size > (windowsEnd-windowsFrom)/4 {
		return window{}, nil // what it holds may still be little enough for the image
	}
	w := window{id: id}
	if old := s.windows.Load(); old != nil {
		if i := slices.IndexFunc(*old, func(w window) bool { return w.id == id }); i >= 0 {
			w = (*old)[i]
		}
	}
	if w.file == nil {
		// The number may belong to something else by now: a pipe, whose other end
		// would be waited for, or what cannot be opened anew.
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err != nil {
			return window{}, nil
		}
		var st unix.Stat_t
		var in unix.Statfs_t
		if err := errors.Join(unix.Fstat(int(f.Fd()), &st), unix.Fstatfs(int(f.Fd()), &in)); err != nil || in.Type == unix.HUGETLBFS_MAGIC || (image.ObjectID{Dev: st.Dev, Ino: st.Ino}) != id {
			return window{}, errors.Join(err, f.Close())
		}
		w.file = f
	}
	overlaps := func(r page.Range) bool { return slices.ContainsFunc(taken, r.Overlaps) }
	if w.Bytes() > uint64(size) && !w.Empty() && !overlaps(w.Range) {
		return w, nil
	}
	room := (2*size + windowStep - 1) &^ (windowStep - 1)
	for at := windowsFrom; at+room <= windowsEnd; at += windowStep {
		if r := (page.Range{Start: at, End: at + room}); !overlaps(r) {
			w.Range = r
			return w, nil
		}
	}
	closeAllBut([]window{w}, s.windows.Load())
	return window{}, fmt.Errorf("no addresses for %d bytes of a memfd", size)
}

// windowAt finds the window that a mapping is.
func (s *Session) windowAt(r page.Range) (window, bool) {
	if all := s.windows.Load(); all != nil {
		for _, w := range *all {
			if w.Covers(r) {
				return w, true
			}
		}
	}
	return window{}, false
}

// OpenMapped opens the file behind a mapping of the process anew, or behind a window.
func (s *Session) OpenMapped(r page.Range) (*os.File, error) {
	path := mapFile(s.pid, r)
	if w, ok := s.windowAt(r); ok {
		path = fmt.Sprintf("/proc/self/fd/%d", w.file.Fd())
	}
	return os.Open(path)
}

// readPages reads what mappings show from the process, and the rest from what
// windows do.
func (s *Session) readPages(m *proc.Memory, rs []page.Range, buf []byte) error {
	if s.windows.Load() == nil {
		return m.ReadPages(rs, buf)
	}
	for len(rs) > 0 {
		n, bytes := 0, uint64(0) // that no window shows
		var w window
		for shown := false; n < len(rs); n++ {
			if w, shown = s.windowAt(rs[n]); shown {
				break
			}
			bytes += rs[n].Bytes()
		}
		if n > 0 {
			if err := m.ReadPages(rs[:n], buf[:bytes]); err != nil {
				return err
			}
		} else {
			n, bytes = 1, rs[0].Bytes()
			if err := w.read(rs[0], buf[:bytes]); err != nil {
				return err
			}
		}
		rs, buf = rs[n:], buf[bytes:]
	}
	return nil
}

func (w *window) read(r page.Range, buf []byte) error {
	n, err := w.file.ReadAt(buf, int64(r.Start-w.Start))
	clear(buf[n:]) // behind the end
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case errors.Is(err, os.ErrClosed):
		return fmt.Errorf("a memfd that was closed: %w", proc.ErrNoPage)
	}
	return err
}

func (s *Session) closeWindows() {
	if old := s.windows.Swap(nil); old != nil {
		for _, w := range *old {
			_ = w.file.Close()
		}
	}
}
