package fds

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// maxContent is the most bytes of deleted files and of memory that no mapping
// shows, which one process's image carries. They stand still while it is read.
const maxContent = 64 << 20

// pieceBytes is how content is read and how long a chunk can be.
const pieceBytes = 1 << 20

// describeDeleted is for a file that has no name any more: its content moves.
func (e *examiner) describeDeleted(f *file) error {
	f.open.Deleted = true
	switch {
	case f.st.Mode&unix.S_IFMT != unix.S_IFREG:
		f.refuse("was deleted and is not a regular file")
		return nil
	case f.st.Nlink != 0:
		f.refuse("was deleted under this name but has another one, which is not known")
		return nil
	case f.open.Flags&unix.O_PATH != 0:
		f.refuse("was deleted and is open as a path only")
		return nil
	}
	if e.deleted[f.key()] {
		return nil // opened twice: the first one carries it
	}
	if e.deleted == nil {
		e.deleted = make(map[FileKey]bool)
	}
	e.deleted[f.key()] = true
	ranges, ok, err := e.dataRanges(f, nil)
	if err != nil {
		return err
	}
	if !ok {
		f.refuse("was deleted and holds more than %d MiB", maxContent>>20)
		return nil
	}
	if e.content {
		f.open.Content, err = e.readContent(f, ranges)
	}
	return err
}

// describeMemFD is for a memfd, mapped or not.
func (e *examiner) describeMemFD(f *file) error {
	f.open.Kind, f.kind = image.FileMemFD, "memfd"
	name := strings.TrimSuffix(strings.TrimPrefix(f.link, "/memfd:"), " (deleted)")
	f.what = "memfd " + name
	fd, err := e.dup(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		f.refuse("looks like a memfd and is none")
		return nil
	}
	if i, ok := e.memories[f.key()]; ok {
		f.open.Memory = i
		return e.fillUncovered(f, i)
	}
	if i, ok := e.ownMemories[f.key()]; ok {
		f.open.Memory = i
		return nil
	}
	m := image.SharedMemory{Memfd: true, Name: name, Size: f.st.Size, Seals: seals}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return fmt.Errorf("look at its file system: %w", err)
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		f.refuse("a memfd of huge pages that is not mapped")
		return nil
	}
	// What a mapping shows travels with the pages.
	mapped, err := e.mappedOf(f)
	if err != nil {
		return err
	}
	ranges, ok, err := e.dataRanges(f, mapped)
	if err != nil {
		return err
	}
	// Larger ones that nobody has mapped travel with the pages, too; see
	// checkpoint.Session.Windows.
	if !ok && (e.content || f.st.Size <= image.MaxInlineMemory) {
		f.refuse("holds more than %d MiB that no mapping shows", maxContent>>20)
		return nil
	}
	if e.content {
		if m.Chunks, err = e.readContent(f, ranges); err != nil {
			return err
		}
	}
	f.open.Memory = e.memoryBase + len(e.newMemories)
	e.newMemories = append(e.newMemories, m)
	if e.ownMemories == nil {
		e.ownMemories = make(map[FileKey]int)
	}
	e.ownMemories[f.key()] = f.open.Memory
	return nil
}

// mappedOf lists the parts of a memfd that a running process has mapped. Capture
// knows those of a frozen one from its caller.
func (e *examiner) mappedOf(f *file) ([]page.Range, error) {
	if e.content {
		return nil, nil
	}
	if e.maps == nil {
		var err error
		if e.maps, err = proc.ReadMaps(e.pid); err != nil {
			return nil, err
		}
	}
	var out []page.Range
	for i := range e.maps {
		if m := &e.maps[i]; m.Dev == f.st.Dev && m.Ino == f.st.Ino {
			out = append(out, page.Range{Start: page.Addr(m.Offset), End: page.Addr(m.Offset) + m.End - m.Start})
		}
	}
	sortRanges(out)
	return out, nil
}

func sortRanges(rs []page.Range) {
	slices.SortFunc(rs, func(a, b page.Range) int { return cmp.Compare(a.Start, b.Start) })
}

// fillUncovered carries what of a mapped memfd lies outside its mappings: the
// page stream has only what is mapped.
func (e *examiner) fillUncovered(f *file, index int) error {
	if !e.content || f.st.Size <= image.MaxInlineMemory || e.uncovered[index] != nil {
		return nil // small ones are carried whole by whoever found the mapping
	}
	var mapped []page.Range
	for i := range e.vmas {
		v := &e.vmas[i]
		if v.Kind == image.VMAShared && v.Memory == index {
			mapped = append(mapped, page.Range{Start: page.Addr(v.Offset), End: page.Addr(v.Offset) + v.End - v.Start})
		}
	}
	sortRanges(mapped)
	ranges, ok, err := e.dataRanges(f, mapped)
	if err != nil || len(ranges) == 0 {
		return err
	}
	if !ok {
		f.refuse("holds more than %d MiB that no mapping shows", maxContent>>20)
		return nil
	}
	chunks, err := e.readContent(f, ranges)
	if err != nil {
		return err
	}
	if e.uncovered == nil {
		e.uncovered = make(map[int][]image.Chunk)
	}
	e.uncovered[index] = chunks
	return nil
}

// byteRange is a part of a file.
type byteRange struct{ start, end int64 }

// reopen opens the file anew for reading, so that its offset is not touched.
func (e *examiner) reopen(f *file) (int, error) {
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/fd/%d", e.pid, f.nums[0]), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("open its content: %w", err)
	}
	return fd, nil
}

// dataRanges lists where a file has data outside of the ranges given, which are
// in order. ok is whether that fits into what the image may still carry.
func (e *examiner) dataRanges(f *file, without []page.Range) (out []byteRange, ok bool, err error) {
	fd, err := e.reopen(f)
	if err != nil {
		return nil, false, err
	}
	defer unix.Close(fd)
	total := int64(0)
	add := func(start, end int64) {
		if start < end {
			out = append(out, byteRange{start, end})
			total += end - start
		}
	}
	for at := int64(0); at < f.st.Size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		end := f.st.Size
		if err != nil {
			start = at // a file system without holes
		} else if end, err = unix.Seek(fd, start, unix.SEEK_HOLE); err != nil {
			end = f.st.Size
		}
		end = min(end, f.st.Size)
		at = end
		for _, r := range without {
			if int64(r.End) <= start || int64(r.Start) >= end {
				continue
			}
			add(start, int64(r.Start))
			start = max(start, int64(r.End))
		}
		add(start, end)
	}
	return out, e.carried+total <= maxContent, nil
}

var zeroPage [page.Size]byte

// readContent reads ranges and leaves out pages of zeros.
func (e *examiner) readContent(f *file, ranges []byteRange) ([]image.Chunk, error) {
	fd, err := e.reopen(f)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var out []image.Chunk
	longest := int64(0)
	for _, r := range ranges {
		longest = max(longest, r.end-r.start)
	}
	buf := make([]byte, min(longest, pieceBytes))
	for _, r := range ranges {
		for at := r.start; at < r.end; {
			n, err := unix.Pread(fd, buf[:min(int64(len(buf)), r.end-at)], at)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("read its content at %d: %w", at, err)
			}
			if n == 0 {
				break
			}
			out = appendNonZero(out, at, buf[:n])
			at += int64(n)
			e.carried += int64(n)
		}
	}
	return out, nil
}

func appendNonZero(out []image.Chunk, at int64, b []byte) []image.Chunk {
	begin := -1
	flush := func(end int) {
		if begin >= 0 {
			out = append(out, image.Chunk{Offset: at + int64(begin), Data: bytes.Clone(b[begin:end])})
			begin = -1
		}
	}
	for i := 0; i < len(b); i += page.Size {
		piece := b[i:min(i+page.Size, len(b))]
		if bytes.Equal(piece, zeroPage[:len(piece)]) {
			flush(i)
		} else if begin < 0 {
			begin = i
		}
	}
	flush(len(b))
	return out
}
