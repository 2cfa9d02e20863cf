package restore

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

// helperFDs is the least number of a descriptor that is there for the rebuild
// only. They lie above all that the process will have.
const helperFDs = 1000

// sharedObject is a shared memory object that the process has mapped: made once
// in the process, mapped wherever the image says, sealed at last.
type sharedObject struct {
	index int // in Image.Memories
	mem   *image.SharedMemory
	vmas  []*image.VMA
	// fd is the number in the process of a memfd, and readOnly of a second
	// description of it that cannot be written through; 0 where not needed.
	fd, readOnly int
	// file is ours of a memfd, to fill and to seal it.
	file *os.File
	// laid is what has pages of it already; nil where it is made anew.
	laid *laidObject
	// temp is where an object without a descriptor is mapped whole until all
	// its mappings are made. Empty where its one mapping will do.
	temp page.Range
	// staged are mappings that must be written to before they get their final,
	// read-only form, or go away.
	staged []*image.VMA
	sealed bool
}

// sharedObjects finds the objects that the process maps.
func sharedObjects(img *image.Image, p *image.Process, m *image.Memory) (all []*sharedObject, err error) {
	by := map[int]*sharedObject{}
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if v.Kind != image.VMAShared {
			continue
		}
		o := by[v.Memory]
		if o == nil {
			o = &sharedObject{index: v.Memory, mem: &img.Memories[v.Memory]}
			by[v.Memory], all = o, append(all, o)
		}
		o.vmas = append(o.vmas, v)
		if v.Window || v.Shared && v.Prot&unix.PROT_WRITE == 0 && len(m.Eager.Intersect(v.Range)) > 0 {
			o.staged = append(o.staged, v)
		}
	}
	for _, o := range all {
		if o.mem.Huge != 0 {
			return nil, about(fmt.Errorf("%w: huge pages of hugetlbfs", ErrUnsupported), "%v", o)
		}
	}
	return all, nil
}

// placeObjects says where objects are held: by descriptors from next on, or mapped
// whole. taken is added to by the ranges of such temporary mappings.
func placeObjects(all []*sharedObject, next int, taken *[]page.Range) error {
	for _, o := range all {
		if o.mem.Memfd {
			o.fd, next = next, next+1
			for _, v := range o.vmas {
				if v.Shared && !v.Window && !v.Has("mw") && o.readOnly == 0 {
					o.readOnly, next = next, next+1
				}
			}
			continue
		}
		if o.laid != nil {
			continue
		}
		if v := o.vmas[0]; len(o.vmas) == 1 && v.Offset == 0 && v.Bytes() >= uint64(o.mem.Size) && len(o.mem.Chunks) == 0 {
			continue
		}
		size := page.Addr(o.mem.Size).Ceil()
		for _, v := range o.vmas {
			size = max(size, page.Addr(v.Offset+v.Bytes()))
		}
		r, ok := hole(uint64(size), *taken)
		if !ok {
			return about(fmt.Errorf("%w: no room for %d bytes", ErrUnsupported, size), "%v", o)
		}
		o.temp, *taken = r, append(*taken, r)
	}
	return nil
}

func (o *sharedObject) String() string { return fmt.Sprintf("%s, number %d", describe(o.mem), o.index) }

func describe(m *image.SharedMemory) string {
	kind := "shared memory"
	if m.Memfd {
		kind = "memfd"
	}
	return fmt.Sprintf("%s %q of %d bytes", kind, m.Name, m.Size)
}

// createMemfd makes a memfd with that number.
func createMemfd(s *script, m *image.SharedMemory, number int) {
	fl := uint64(unix.MFD_CLOEXEC)
	if sealable(m) { // else it is born with its one seal
		fl |= unix.MFD_ALLOW_SEALING
	}
	fd := s.call(unix.SYS_MEMFD_CREATE, s.String(m.Name), fl)
	s.call(unix.SYS_DUP3, 0, uint64(number), unix.O_CLOEXEC).Arg(0, fd)
	s.call(unix.SYS_CLOSE, 0).Arg(0, fd)
	s.call(unix.SYS_FTRUNCATE, uint64(number), uint64(m.Size))
}

// createShared makes an object that has no descriptor, mapped whole at r.
func createShared(s *script, r page.Range, noReserve bool) {
	fl := uint64(unix.MAP_SHARED | unix.MAP_ANONYMOUS | unix.MAP_FIXED_NOREPLACE)
	if noReserve {
		fl |= unix.MAP_NORESERVE
	}
	s.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), unix.PROT_READ|unix.PROT_WRITE, fl, minus(1), 0)
}

// make makes the objects, before anything is mapped.
func (o *sharedObject) make(s *script) {
	s.on(o.String)
	switch {
	case !o.mem.Memfd:
		if !o.temp.Empty() && o.laid == nil {
			createShared(s, o.temp, o.vmas[0].Has("nr"))
		}
		return
	case o.laid != nil:
		s.call(unix.SYS_DUP3, uint64(o.laid.fd), uint64(o.fd), unix.O_CLOEXEC)
		s.call(unix.SYS_CLOSE, uint64(o.laid.fd))
		s.call(unix.SYS_FTRUNCATE, uint64(o.fd), uint64(o.mem.Size))
	default:
		createMemfd(s, o.mem, o.fd)
	}
	if o.readOnly != 0 {
		ro := s.call(unix.SYS_OPENAT, atFDCWD, s.String(fmt.Sprintf("/proc/self/fd/%d", o.fd)), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		s.call(unix.SYS_DUP3, 0, uint64(o.readOnly), unix.O_CLOEXEC).Arg(0, ro)
		s.call(unix.SYS_CLOSE, 0).Arg(0, ro)
	}
}

// fill writes the content that the image carries, from outside, and seals what
// must be sealed before it is mapped. mem is the process's memory.
func (o *sharedObject) fill(pidfd int, mem *os.File) error {
	if !o.mem.Memfd {
		for _, c := range o.mem.Chunks {
			if _, err := mem.WriteAt(c.Data, int64(o.temp.Start)+c.Offset); err != nil {
				return about(err, "%v", o)
			}
		}
		return nil
	}
	if len(o.mem.Chunks) == 0 && o.mem.Seals == 0 {
		return nil
	}
	fd, err := unix.PidfdGetfd(pidfd, o.fd, 0)
	if err != nil {
		return about(fmt.Errorf("pidfd_getfd: %w", err), "%v", o)
	}
	o.file = os.NewFile(uintptr(fd), o.mem.Name)
	for _, c := range o.mem.Chunks {
		if _, err := o.file.WriteAt(c.Data, c.Offset); err != nil {
			return about(err, "%v", o)
		}
	}
	if o.sealsEarly() {
		return o.seal()
	}
	return nil
}

// sealsEarly reports whether it must be sealed before it is mapped.
func (o *sharedObject) sealsEarly() bool {
	return o.mem.Seals&unix.F_SEAL_WRITE != 0 && len(o.staged) == 0
}

// seal adds the seals, once.
func (o *sharedObject) seal() error {
	if o.sealed || o.file == nil || o.mem.Seals == 0 || o.mem.Seals == unix.F_SEAL_SEAL {
		return nil
	}
	if _, err := unix.FcntlInt(o.file.Fd(), unix.F_ADD_SEALS, o.mem.Seals); err != nil {
		return about(fmt.Errorf("seals %#x: %w", o.mem.Seals, err), "%v", o)
	}
	o.sealed = true
	return nil
}

// mapInto maps the object wherever the process had it.
func (o *sharedObject) mapInto(s *script, tid int) {
	for _, v := range o.vmas {
		s.on(func() string { return fmt.Sprintf("mapping %v of %v", v.Range, o) })
		prot := uint64(v.Prot)
		stage := o.isStaged(v)
		if stage {
			prot |= unix.PROT_READ | unix.PROT_WRITE
		}
		switch {
		case o.mem.Memfd:
			fd := o.fd
			if v.Shared && !v.Has("mw") && !stage && !o.sealed {
				fd = o.readOnly
			}
			s.call(unix.SYS_MMAP, uint64(v.Start), v.Bytes(), prot, mmapFlags(v), uint64(fd), v.Offset)
		case o.temp.Empty():
			s.call(unix.SYS_MMAP, uint64(v.Start), v.Bytes(), prot, mmapFlags(v)|unix.MAP_ANONYMOUS, minus(1), 0)
		default:
			// With an old size of 0 mremap maps the same pages once more.
			s.call(unix.SYS_MREMAP, uint64(o.temp.Start)+v.Offset, 0, v.Bytes(),
				unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(v.Start))
			if prot != unix.PROT_READ|unix.PROT_WRITE {
				s.call(unix.SYS_MPROTECT, uint64(v.Start), v.Bytes(), prot)
			}
		}
		s.part(tid)
	}
	if !o.temp.Empty() {
		s.on(o.String)
		s.call(unix.SYS_MUNMAP, uint64(o.temp.Start), o.temp.Bytes())
	}
}

func (o *sharedObject) isStaged(v *image.VMA) bool {
	for _, w := range o.staged {
		if w == v {
			return true
		}
	}
	return false
}

// finish gives staged mappings their final form, when their content is there.
func (o *sharedObject) finish(s *script) {
	for _, v := range o.staged {
		s.on(func() string { return fmt.Sprintf("mapping %v of %v", v.Range, o) })
		if v.Window {
			s.call(unix.SYS_MUNMAP, uint64(v.Start), v.Bytes())
			continue
		}
		if o.mem.Memfd && !v.Has("mw") {
			s.call(unix.SYS_MMAP, uint64(v.Start), v.Bytes(), uint64(v.Prot),
				unix.MAP_SHARED|unix.MAP_FIXED, uint64(o.readOnly), v.Offset)
			dress(s, v)
		} else {
			s.call(unix.SYS_MPROTECT, uint64(v.Start), v.Bytes(), uint64(v.Prot))
		}
	}
	if o.keeps() {
		s.on(nil)
		s.call(unix.SYS_CLOSE, uint64(o.readOnly))
	}
}

// keeps reports whether readOnly is needed until finish.
func (o *sharedObject) keeps() bool { return o.readOnly != 0 && len(o.staged) > 0 }

func closeObjects(os []*sharedObject) error {
	var all []error
	for _, o := range os {
		if o.file != nil {
			all = append(all, o.file.Close())
			o.file = nil
		}
	}
	return errors.Join(all...)
}
