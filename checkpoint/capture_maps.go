package checkpoint

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/checkpoint/fds"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// mappings fills in the VMAs and the shared memory objects behind them.
func (c *capture) mappings() error {
	c.objects = map[fds.FileKey]int{}
	c.p.VMAs = make([]image.VMA, 0, len(c.maps))
	for i := range c.maps {
		m := &c.maps[i]
		v := image.VMA{Range: m.Range, Prot: m.Prot, Shared: m.Shared, Offset: m.Offset, Path: m.Name,
			Deleted: m.Deleted, Memory: -1, Flags: m.Flags}
		_, v.Window = c.s.windowAt(v.Range)
		if err := c.classify(m, &v); err != nil {
			return err
		}
		c.p.VMAs = append(c.p.VMAs, v)
	}
	slices.SortFunc(c.p.VMAs, func(a, b image.VMA) int { return cmp.Compare(a.Start, b.Start) })
	return c.executable()
}

// unmovable are mappings whose content is not the process's, by their flag.
var unmovable = map[string]string{
	"ht": "huge pages of hugetlbfs", "io": "memory of a device", "pf": "memory of a device", "ss": "a shadow stack",
}

// classify says of what kind a mapping is, and refuses what cannot be carried.
func (c *capture) classify(m *proc.Mapping, v *image.VMA) error {
	switch {
	case m.Name == "[vdso]":
		v.Kind = image.VMAVDSO
		return nil
	case strings.HasPrefix(m.Name, "[vvar"):
		v.Kind = image.VMAVVAR
		return nil
	case m.Name == "[vsyscall]":
		v.Kind = image.VMAVsyscall
		return nil
	}
	for _, f := range m.Flags {
		if what, bad := unmovable[f]; bad {
			c.refuse("mapping %v %s is %s", m.Range, m.Name, what)
			return nil
		}
	}
	if m.Ino == 0 {
		if m.Name != "" && m.Name[0] == '/' || strings.HasPrefix(m.Name, "anon_inode:") {
			c.refuse("mapping %v %s belongs to a driver", m.Range, m.Name)
			return nil
		}
		v.Kind = image.VMAAnon
		v.Name = bracketed(m.Name, "[anon:")
		return nil
	}
	return c.classifyFile(m, v)
}

// bracketed is what stands between prefix and the closing bracket.
func bracketed(s, prefix string) string {
	if rest, ok := strings.CutPrefix(s, prefix); ok {
		return strings.TrimSuffix(rest, "]")
	}
	return ""
}

func (c *capture) classifyFile(m *proc.Mapping, v *image.VMA) error {
	// /dev/zero mapped shared is a shared memory object; the kernel shows the
	// object, deleted at birth, where it shows the device of a private one.
	switch {
	case strings.HasPrefix(m.Name, "/memfd:") && m.Deleted:
		v.Kind = image.VMAShared
		return c.object(m, v, true, strings.TrimPrefix(m.Name, "/memfd:"))
	case m.Name == "/dev/zero" && m.Deleted, strings.HasPrefix(m.Name, "[anon_shmem:"):
		v.Kind = image.VMAShared
		v.Name = bracketed(m.Name, "[anon_shmem:")
		return c.object(m, v, false, "")
	case strings.HasPrefix(m.Name, "/SYSV") && m.Deleted:
		c.refuse("mapping %v is System V shared memory", m.Range)
		return nil
	case strings.HasPrefix(m.Name, "/secretmem") && m.Deleted:
		c.refuse("mapping %v is secret memory, which nobody else can read", m.Range)
		return nil
	case !strings.HasPrefix(m.Name, "/"):
		c.refuse("mapping %v %s belongs to a driver", m.Range, m.Name)
		return nil
	}
	id, err := c.s.survey.fileID(m)
	if err != nil {
		return err
	}
	v.File = id
	switch id.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFCHR:
		if m.Name != "/dev/zero" || m.Shared {
			c.refuse("mapping %v is of the device %s", m.Range, m.Name)
		}
		v.Kind = image.VMADevice
		return nil
	default:
		c.refuse("mapping %v of %s is neither a file nor memory", m.Range, m.Name)
		return nil
	}
	switch {
	case m.Shared && m.Deleted:
		c.refuse("mapping %v shares the deleted file %s", m.Range, m.Name)
	case m.Shared:
		v.Kind = image.VMAFileShared
	case m.Deleted:
		// The destination has no such file: it becomes ordinary memory, all of
		// it content.
		v.Kind = image.VMAAnon
		c.orphans = append(c.orphans, page.Range{Start: v.Start, End: min(v.End, v.Start+inFile(v, id.Size))})
	default:
		v.Kind = image.VMAFile
	}
	c.mapsFile(m, v)
	return nil
}

// inFile is how much of a mapping lies inside a file of size bytes.
func inFile(v *image.VMA, size int64) page.Addr {
	if size <= int64(v.Offset) {
		return 0
	}
	return page.Addr(uint64(size) - v.Offset).Ceil()
}

// object notes the shared memory object that m is a mapping of.
func (c *capture) object(m *proc.Mapping, v *image.VMA, memfd bool, name string) error {
	f, err := c.s.openMapped(m.Range)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	key := fds.FileKey{Dev: st.Dev, Ino: st.Ino}
	if i, ok := c.objects[key]; ok {
		v.Memory = i
		return nil
	}
	o := image.SharedMemory{Memfd: memfd, Name: name, Size: st.Size, ID: image.ObjectID{Dev: key.Dev, Ino: key.Ino}}
	if memfd {
		if o.Seals, err = unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil {
			return fmt.Errorf("read the seals of memfd %s: %w", name, os.NewSyscallError("fcntl", err))
		}
	}
	data, err := dataRanges(f, st.Size)
	if err != nil {
		return fmt.Errorf("find the content of shared memory %v %s: %w", m.Range, m.Name, err)
	}
	i := len(c.img.Memories)
	if st.Size <= image.MaxInlineMemory {
		if o.Chunks, err = readChunks(f, data, st.Size); err != nil {
			return fmt.Errorf("read shared memory %v %s: %w", m.Range, m.Name, err)
		}
		data = nil
	}
	c.img.Memories = append(c.img.Memories, o)
	c.data = append(c.data, data)
	c.objects[key], v.Memory = i, i
	return nil
}

// dataRanges lists where a file has data: ranges of offsets, page aligned.
func dataRanges(f *os.File, size int64) (out []page.Range, err error) {
	fd := int(f.Fd())
	for at := int64(0); at < size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			break
		}
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		end, err := unix.Seek(fd, start, unix.SEEK_HOLE)
		if err != nil {
			return nil, os.NewSyscallError("lseek", err)
		}
		out = append(out, page.Range{Start: page.Addr(start).Floor(), End: page.Addr(end).Ceil()})
		at = end
	}
	return out, nil
}

func readChunks(f *os.File, data []page.Range, size int64) ([]image.Chunk, error) {
	var out []image.Chunk
	for _, r := range data {
		b := make([]byte, min(int64(r.End), size)-int64(r.Start))
		n, err := f.ReadAt(b, int64(r.Start))
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		out = append(out, image.Chunk{Offset: int64(r.Start), Data: b[:n]})
	}
	return out, nil
}

// mergeChunks merges two lists that are in order and do not overlap.
func mergeChunks(a, b []image.Chunk) []image.Chunk {
	out := append(slices.Clone(a), b...)
	slices.SortFunc(out, func(x, y image.Chunk) int { return int(x.Offset - y.Offset) })
	return out
}

// openMapped opens the file behind a mapping anew.
func (s *Session) openMapped(r page.Range) (*os.File, error) {
	f, err := s.OpenMapped(r)
	if err != nil {
		return nil, gone(s.pid, fmt.Errorf("open what is mapped at %v: %w", r, err))
	}
	return f, nil
}
