package fusemem

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// maxRequest is how many bytes the kernel asks for at once, at most: 256 pages unless
// fs.fuse.max_pages_limit says otherwise, in bytes a MiB.
const maxRequest = 1 << 20

// scratch are buffers for READs that do not begin at a page. The page cache never makes one.
var scratch = sync.Pool{New: func() any { b := make([]byte, maxRequest+page.Size); return &b }}

// extent is what a node's pages come from.
type extent struct {
	source page.Source
	base   page.Num // of the node's first page
	prio   page.Priority
}

func (f *FS) extent(id uint64) (extent, bool) {
	class, i, ok := f.layout.index(id)
	if !ok {
		return extent{}, false
	}
	switch class {
	case nodeMem:
		return extent{f.cfg.Memory, 0, page.Reader}, true
	case nodeVMA:
		return extent{f.cfg.Memory, f.cfg.VMAs[i].Start.Page(), page.Reader}, true
	case nodeFile:
		return extent{f.cfg.Files[i].Source, 0, page.Reader}, true
	case nodeMapFile:
		return extent{f.cfg.Files[i].Source, 0, page.Demand}, true
	case nodeImage:
		return extent{f.cfg.Image, 0, page.Demand}, true
	}
	return extent{}, false
}

// Read answers a READ. buf is from go-fuse's pool and goes to the kernel as it is.
func (r *raw) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	var text []byte
	var err error
	switch in.NodeId {
	case nodeMaps:
		text = cut(r.layout.maps, in.Offset, len(buf))
	case nodeStatus:
		text, err = r.snapshots.read(in.Fh, in.Offset, len(buf), r.status)
	case nodeResident:
		text, err = r.snapshots.read(in.Fh, in.Offset, len(buf), func() ([]byte, error) {
			return bytes.Clone(r.cfg.Resident()), nil
		})
	default:
		return r.readPages(cancel, in, buf)
	}
	if err != nil {
		r.cfg.Log.Warn("a file of the mount cannot be made", "node", in.NodeId, "err", err)
		return nil, fuse.EIO
	}
	return fuse.ReadResultData(text), fuse.OK
}

func (f *FS) status() ([]byte, error) {
	b, err := json.MarshalIndent(f.cfg.Status(), "", "  ")
	if err != nil {
		return nil, fmt.Errorf("status: %w", err)
	}
	return append(b, '\n'), nil
}

func (r *raw) readPages(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	x, ok := r.extent(in.NodeId)
	if !ok {
		return nil, fuse.EIO
	}
	size := r.layout.size(in.NodeId)
	if in.Offset >= size || len(buf) == 0 {
		return fuse.ReadResultData(nil), fuse.OK
	}
	n := int(min(uint64(len(buf)), size-in.Offset))
	skip := int(in.Offset % page.Size)
	pages := (skip + n + page.Size - 1) / page.Size
	first := page.Num(in.Offset >> page.Shift)
	if in.NodeId == nodeMem && !r.mapped(first, pages) {
		return nil, fuse.EIO
	}

	if l, ok := x.source.(Lender); ok {
		if lent := l.Lend(x.base+first, pages); lent != nil {
			// What is not there cannot be answered with by who is being killed: see touchBuffers.
			_ = unix.Madvise(lent, unix.MADV_POPULATE_READ)
			r.answered(n)
			return fuse.ReadResultData(lent[skip : skip+n]), fuse.OK
		}
	}
	into := buf[:min(cap(buf), pages*page.Size)]
	if len(into) < pages*page.Size || skip > 0 {
		s := scratch.Get().(*[]byte)
		defer scratch.Put(s)
		if len(*s) < pages*page.Size {
			*s = make([]byte, pages*page.Size)
		}
		into = (*s)[:pages*page.Size]
	}

	rd := &reading{fs: r.FS, node: in.NodeId, first: first, pages: pages, interrupt: cancel, thread: in.Pid, prio: x.prio}
	interrupted, err := rd.ask(x, into)
	switch {
	case err == nil:
	case interrupted && !isClosed(r.closing):
		r.stats.interrupted.Add(1)
		return nil, fuse.EINTR
	default:
		r.stats.failed.Add(1)
		if !errors.Is(err, ErrUnmapped) {
			r.cfg.Log.Debug("a read of the mount failed", "node", in.NodeId, "page", first, "pages", pages, "err", err)
		}
		return nil, fuse.EIO
	}
	r.answered(n)
	if skip > 0 || &into[0] != &buf[0] {
		copy(buf, into[skip:skip+n])
	}
	return fuse.ReadResultData(buf[:n]), fuse.OK
}

func (f *FS) answered(bytes int) {
	f.stats.reads.Add(1)
	f.stats.bytes.Add(uint64(bytes))
}

// ask has the Source give the pages, and reports whether they are wanted no more.
func (r *reading) ask(x extent, into []byte) (interrupted bool, err error) {
	r.fs.reads.add(r)
	defer r.end()
	defer r.fs.reads.remove(r)
	err = x.source.ReadPages(r, x.base+r.first, into, x.prio)
	return r.Err() != nil, err
}

// mapped reports whether mappings cover all of these pages.
func (f *FS) mapped(first page.Num, pages int) bool {
	vmas := f.cfg.VMAs
	at, end := first.Addr(), (first + page.Num(pages)).Addr()
	for i := sort.Search(len(vmas), func(i int) bool { return vmas[i].End > at }); at < end; i++ {
		if i == len(vmas) || vmas[i].Start > at {
			return false
		}
		at = vmas[i].End
	}
	return true
}

// reads is the table of READs of pages that wait for their Source.
type reads struct {
	mu sync.Mutex
	m  []*reading // guarded by mu; each knows its place
}

func (t *reads) add(r *reading) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r.place = len(t.m)
	t.m = append(t.m, r)
}

func (t *reads) remove(r *reading) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last := len(t.m) - 1
	t.m[r.place] = t.m[last]
	t.m[r.place].place = r.place
	t.m[last] = nil
	t.m = t.m[:last]
}

// any reports whether a READ is under way of some of the pages [first, end) of a node.
func (t *reads) any(node uint64, first, end page.Num) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.ContainsFunc(t.m, func(r *reading) bool {
		return r.node == node && r.first < end && first < r.first+page.Num(r.pages)
	})
}

// free returns the first run of pages in [first, end) of a node of which no READ is under way.
func (t *reads) free(node uint64, first, end page.Num) (from, to page.Num) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for moved := true; moved; { // past READs, in whatever order they are
		moved = false
		for _, r := range t.m {
			if r.node == node && r.first <= first && first < r.first+page.Num(r.pages) {
				first, moved = r.first+page.Num(r.pages), true
			}
		}
	}
	if first >= end {
		return end, end
	}
	for _, r := range t.m {
		if r.node == node && first < r.first && r.first < end {
			end = r.first
		}
	}
	return first, end
}
