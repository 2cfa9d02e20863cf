package dirty

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// shared tracks the objects of shared memory that a process has mapped: its
// pages are read from the object, whoever wrote them, and compared by hash.
//
// Write protection would be cheaper and is not enough. It belongs to a mapping,
// not to the object: a write through another mapping, a descriptor or by a child
// that has ended since is not seen. Where there is nobody else a page that is
// punched out of the object (MADV_REMOVE) and read again still is one that nobody
// wrote: its protection outlives it in the page table, and it is zero now.
type shared struct {
	open    func(page.Range) (*os.File, error)
	objects map[objectKey]*object
	hashes  *hashes

	mu      sync.Mutex // Sent may be called during a look
	content page.Set   // at the last look
}

type objectKey struct{ dev, ino uint64 }

// object is one object of shared memory as the last look found it.
type object struct {
	views []view
	seen  bool // by the look that goes on
}

// view is a mapping of an object.
type view struct {
	page.Range
	offset uint64
}

// sharedMemory reports whether m is of an object of shared memory: a memfd, or one
// made by MAP_SHARED|MAP_ANONYMOUS.
func sharedMemory(m *proc.Mapping) bool {
	switch {
	case m.Ino == 0 || m.Has("ht"):
		return false
	case strings.HasPrefix(m.Name, "/memfd:"), m.Name == "/dev/zero":
		return m.Deleted
	}
	return strings.HasPrefix(m.Name, "[anon_shmem:")
}

func newShared(open func(page.Range) (*os.File, error), h *hashes) *shared {
	return &shared{open: open, objects: map[objectKey]*object{}, hashes: h}
}

// forget makes all content count as written at the next look.
func (s *shared) forget() {
	if s != nil {
		s.hashes.forget(everywhere)
		s.objects = map[objectKey]*object{}
	}
}

func (s *shared) sent(rs []page.Range, buf []byte) {
	if s != nil {
		s.mu.Lock()
		content := s.content
		s.mu.Unlock()
		s.hashes.sent(rs, buf, &content)
	}
}

// collect looks at the objects in maps. Where it has no shared mapping at all
// nobody asked for them.
func (s *shared) collect(maps []proc.Mapping) (Shared, error) {
	if s == nil || !slices.ContainsFunc(maps, func(m proc.Mapping) bool { return m.Shared }) {
		return Shared{}, nil
	}
	now := map[objectKey][]view{}
	var order []objectKey
	for i := range maps {
		m := &maps[i]
		if !m.Shared || !sharedMemory(m) {
			continue // a private mapping of it shows pages of its own, or says nothing new
		}
		k := objectKey{m.Dev, m.Ino}
		if now[k] == nil {
			order = append(order, k)
		}
		now[k] = append(now[k], view{m.Range, m.Offset})
	}
	for _, o := range s.objects {
		o.seen = false
	}
	var f found
	for _, k := range order {
		o := s.objects[k]
		if o == nil || !slices.Equal(o.views, now[k]) {
			if o != nil {
				s.drop(o)
			}
			o = &object{views: now[k]}
			s.drop(o)
			s.objects[k] = o
		}
		o.seen = true
		if err := s.object(k, o, &f); err != nil {
			return Shared{}, err
		}
	}
	for k, o := range s.objects {
		if !o.seen {
			s.drop(o)
			delete(s.objects, k)
		}
	}
	out := Shared{Content: page.NewSet(f.content...), Written: page.NewSet(f.written...)}
	gone := page.Difference(&s.content, &out.Content)
	s.hashes.drop(&gone)
	s.mu.Lock()
	s.content = out.Content
	s.mu.Unlock()
	return out, nil
}

// drop forgets what is known of an object that is mapped otherwise now.
func (s *shared) drop(o *object) {
	for _, v := range o.views {
		s.hashes.forget(v.Range)
	}
}

func (s *shared) object(k objectKey, o *object, f *found) error {
	first := o.views[0].Range
	h, err := s.open(first)
	if errors.Is(err, os.ErrNotExist) {
		// Unmapped meanwhile, or its neighbour was joined to it: the next look
		// knows. An end of the process is found elsewhere.
		o.views = nil
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the shared memory at %v: %w", first, err)
	}
	defer h.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(h.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if (objectKey{st.Dev, st.Ino}) != k {
		o.views = nil
		return nil
	}
	data, err := dataRanges(h, st.Size)
	if err != nil {
		return fmt.Errorf("find the content of the shared memory at %v: %w", first, err)
	}
	parts := show(o.views, data)
	for _, p := range parts {
		f.addContent(p.at)
	}
	if err := s.compare(h, cut(parts), f); err != nil {
		return fmt.Errorf("read the shared memory at %v: %w", first, err)
	}
	return nil
}

// share is how much of an object one goroutine compares at a time.
const share = 8 << 20

// compare compares parts of an object, several at once: at the last look the process
// stands still meanwhile.
func (s *shared) compare(h *os.File, parts []shown, f *found) error {
	written := make([]found, len(parts))
	var all errgroup.Group
	all.SetLimit(runtime.GOMAXPROCS(0))
	for i, p := range parts {
		all.Go(func() error {
			return s.hashes.compare(p.at, func(b []byte, at page.Addr) error {
				n, err := h.ReadAt(b, int64(p.offset)+int64(at-p.at.Start))
				clear(b[n:]) // the end of the last page
				return ignoreEOF(err)
			}, written[i].addWritten)
		})
	}
	err := all.Wait()
	for i := range written {
		for _, r := range written[i].written {
			f.addWritten(r)
		}
	}
	return err
}

// cut cuts what is larger than share.
func cut(parts []shown) (out []shown) {
	for _, p := range parts {
		for p.at.Bytes() > share {
			out = append(out, shown{page.Range{Start: p.at.Start, End: p.at.Start + share}, p.offset})
			p.at.Start, p.offset = p.at.Start+share, p.offset+share
		}
		out = append(out, p)
	}
	return out
}

// shown is where the process sees a part of an object.
type shown struct {
	at     page.Range
	offset uint64
}

// show finds the addresses of the pages data, ranges of offsets.
func show(views []view, data page.Set) (out []shown) {
	for _, v := range views {
		window := page.Range{Start: page.Addr(v.offset), End: page.Addr(v.offset + v.Bytes())}
		for _, d := range data.Remove(window) {
			at := page.Range{Start: v.Start + d.Start - window.Start, End: v.Start + d.End - window.Start}
			out = append(out, shown{at, uint64(d.Start)})
		}
	}
	return out
}

// dataRanges finds where a file has data: offsets, page aligned.
func dataRanges(f *os.File, size int64) (out page.Set, err error) {
	fd := int(f.Fd())
	for at := int64(0); at < size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return page.Set{}, os.NewSyscallError("lseek", err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err == unix.ENXIO {
			break // cut off meanwhile
		}
		if err != nil {
			return page.Set{}, os.NewSyscallError("lseek", err)
		}
		out.Add(page.Range{Start: page.Addr(start).Floor(), End: page.Addr(end).Ceil()})
		at = end
	}
	return out, nil
}
