package checkpoint

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Layout describes those of maps, mappings of the running process, in which pages
// can be landed before the image comes, and room says where in them: what lies
// behind the end of an object has no page. What is gone meanwhile is left out.
//
// They are described as Capture would: private mappings, anonymous and of files,
// and shared ones of shared memory that is not so small that the image carries it,
// windows among them.
func (s *Session) Layout(maps []proc.Mapping) (l *image.Layout, room page.Set, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l = &image.Layout{VMAs: make([]image.VMA, 0, len(maps))}
	index := map[image.ObjectID]int{}
	for i := range maps {
		m := &maps[i]
		v := image.VMA{Range: m.Range, Prot: m.Prot, Shared: m.Shared, Offset: m.Offset, Memory: -1, Flags: settledFlags(m)}
		r, ok, err := v.Range, true, error(nil)
		switch {
		case m.Has("dp"), m.Has("io"), m.Has("pf"), m.Has("ht"):
			ok = false
		case m.Ino == 0:
			v.Kind, v.Offset = image.VMAAnon, 0
			ok = !m.Shared
		case m.Shared:
			v.Kind = image.VMAShared
			r, ok, err = s.layShared(l, index, m, &v)
		default:
			v.Kind, v.Path = image.VMAFile, fileid.Original(m.Name)
			ok, err = s.layFile(m, &v)
		}
		if errors.Is(err, fs.ErrNotExist) {
			ok, err = false, nil // unmapped, or its neighbour was joined to it
		}
		if err != nil {
			return nil, page.Set{}, &Error{"lay out", s.pid, err}
		}
		if ok {
			l.VMAs = append(l.VMAs, v)
			room.Add(r)
		}
	}
	slices.SortFunc(l.VMAs, func(a, b image.VMA) int { return cmp.Compare(a.Start, b.Start) })
	return l, room, nil
}

// settledFlags are those of a mapping that are settled when it is made.
func settledFlags(m *proc.Mapping) (out []string) {
	for _, f := range []string{"nr", "gd"} {
		if m.Has(f) {
			out = append(out, f)
		}
	}
	return out
}

// layFile describes a private mapping of a file. One of a deleted file or a device
// becomes ordinary memory.
func (s *Session) layFile(m *proc.Mapping, v *image.VMA) (ok bool, err error) {
	if m.Deleted || !strings.HasPrefix(m.Name, "/") || s.survey == nil {
		return false, nil
	}
	v.File, err = s.survey.fileID(m)
	return v.File.Mode&unix.S_IFMT == unix.S_IFREG, err
}

// layShared describes a shared mapping of shared memory, and its object once.
func (s *Session) layShared(l *image.Layout, index map[image.ObjectID]int, m *proc.Mapping, v *image.VMA) (r page.Range, ok bool, err error) {
	o := image.SharedMemory{}
	switch {
	case strings.HasPrefix(m.Name, "/memfd:") && m.Deleted:
		o.Memfd, o.Name = true, strings.TrimPrefix(m.Name, "/memfd:")
	case m.Name == "/dev/zero" && m.Deleted, strings.HasPrefix(m.Name, "[anon_shmem:"):
	default:
		return r, false, nil
	}
	f, err := s.OpenMapped(m.Range)
	if err != nil {
		return r, false, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return r, false, os.NewSyscallError("fstat", err)
	}
	if st.Ino != m.Ino {
		return r, false, nil // another mapping by now
	}
	o.ID, o.Size = image.ObjectID{Dev: st.Dev, Ino: st.Ino}, st.Size
	i, known := index[o.ID]
	if !known {
		if o.Size <= image.MaxInlineMemory {
			return r, false, nil
		}
		if o.Memfd {
			if o.Seals, err = unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0); err != nil {
				return r, false, nil // of a kind that has none
			}
		}
		i = len(l.Memories)
		index[o.ID], l.Memories = i, append(l.Memories, o)
	}
	size := page.Addr(l.Memories[i].Size).Ceil()
	if page.Addr(v.Offset) >= size {
		return r, false, nil
	}
	v.Memory = i
	_, v.Window = s.windowAt(v.Range)
	return page.Range{Start: v.Start, End: min(v.End, v.Start+size-page.Addr(v.Offset))}, true, nil
}
