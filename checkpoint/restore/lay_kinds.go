package restore

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/page"
)

// layKind is what of a mapping is settled when it is made. Two ranges of one kind
// that touch are one mapping.
type layKind struct {
	noReserve, growsDown bool
	// Of what is not anonymous: the file, as the source's host calls it, or the
	// object, and the address at which its first byte would be.
	path   string
	file   image.ObjectID
	shared image.ObjectID
	base   page.Addr
	// standIn is anonymous memory in the place of a file that is not here, or not
	// the same. Nothing of it is kept.
	standIn bool
}

// kindOf is that of v, which lies. id is its object, if it shows one.
func kindOf(v *image.VMA, id image.ObjectID) layKind {
	k := layKind{noReserve: v.Has("nr"), growsDown: v.Has("gd")}
	switch v.Kind {
	case image.VMAFile:
		k.path, k.file = v.Path, image.ObjectID{Dev: v.File.Dev, Ino: v.File.Ino}
	case image.VMAShared:
		k = layKind{shared: id}
	default:
		return k
	}
	k.base = v.Start - page.Addr(v.Offset)
	return k
}

// lies reports whether v is a mapping that pages can be landed in before the
// process stands.
func lies(v *image.VMA) bool {
	if v.Has("dp") || v.Has("ht") {
		return false
	}
	switch v.Kind {
	case image.VMAAnon:
		return !v.Shared
	case image.VMAFile:
		return !v.Shared && !v.Deleted
	case image.VMAShared:
		return v.Shared
	}
	return false
}

// isShared reports whether all who have the object see what is written.
func (k *layKind) isShared() bool { return k.shared != image.ObjectID{} }

// isBacked reports whether there is something where no page has landed.
func (k *layKind) isBacked() bool { return k.path != "" }

// offset is where in the file or object an address is.
func (k *layKind) offset(at page.Addr) uint64 { return uint64(at - k.base) }

// flags are those of mmap but for MAP_ANONYMOUS.
func (k *layKind) flags() uint64 {
	fl := uint64(unix.MAP_PRIVATE | unix.MAP_FIXED_NOREPLACE)
	if k.isShared() {
		fl = unix.MAP_SHARED | unix.MAP_FIXED_NOREPLACE
	}
	if k.noReserve {
		fl |= unix.MAP_NORESERVE
	}
	if k.growsDown {
		fl |= unix.MAP_GROWSDOWN
	}
	return fl
}

// files opens files for the mappings of a script, one at a time.
type files struct {
	s     *script
	file  *inject.Call
	path  string
	flags uint64
}

// open returns the call that opens path; what is open for another is closed.
func (f *files) open(path string, flags uint64) *inject.Call {
	if f.file == nil || f.path != path || f.flags != flags {
		on := f.s.object
		f.close()
		f.s.on(on)
		f.file = f.s.call(unix.SYS_OPENAT, atFDCWD, f.s.String(path), flags, 0)
		f.path, f.flags = path, flags
	}
	return f.file
}

func (f *files) close() {
	if f.file != nil {
		f.s.on(nil)
		f.s.call(unix.SYS_CLOSE, 0).Arg(0, f.file)
	}
	f.file = nil
}

// part is that of the script, for which no file may be open.
func (f *files) part(tid int) {
	if f.s.Size() < partBytes {
		return
	}
	on := f.s.object
	f.close()
	f.s.on(on)
	f.s.part(tid)
}

// mapLaid makes the mappings of one kind at rs, readable and writable.
func (s *Skeleton) mapLaid(sc *script, k layKind, rs []page.Range) {
	f := files{s: sc}
	const prot = unix.PROT_READ | unix.PROT_WRITE
	for _, r := range rs {
		sc.on(func() string { return fmt.Sprintf("mapping %v %s", r, k.path) })
		switch {
		case k.isShared():
			s.laid.objects[k.shared].mapAt(sc, r, k.offset(r.Start))
		case k.path != "":
			fd := f.open(k.path, unix.O_RDONLY|unix.O_CLOEXEC)
			sc.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), prot, k.flags(), 0, k.offset(r.Start)).Arg(4, fd)
		default:
			sc.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), prot, k.flags()|unix.MAP_ANONYMOUS, minus(1), 0)
		}
		f.part(s.target.pid)
	}
	f.close()
}

// wanted is what a layout asks for, by kind, and all of it.
func (s *Skeleton) wanted(l *image.Layout) (want map[layKind]page.Set, taken []page.Range, err error) {
	want = map[layKind]page.Set{}
	for i := range l.VMAs {
		v := &l.VMAs[i]
		if !lies(v) {
			continue
		}
		if v.Empty() || !v.Aligned() || v.End > userEnd {
			return nil, nil, fmt.Errorf("%w: mapping %v", image.ErrFormat, v.Range)
		}
		var id image.ObjectID
		if v.Kind == image.VMAShared {
			id = l.Memories[v.Memory].ID
		}
		k := kindOf(v, id)
		if v.Kind == image.VMAFile {
			if !s.isHere(v, k) {
				k = layKind{standIn: true, noReserve: true}
			}
		}
		set := want[k]
		set.Add(v.Range)
		want[k] = set
		taken = append(taken, v.Range)
	}
	return want, taken, nil
}

// fileName is a file of the source, by its name on both hosts.
type fileName struct {
	path string
	id   image.ObjectID
}

// isHere reports whether the file of v is here, and the same. Once said it stays:
// with another answer all that has landed would be gone, and the source not know of
// it. Rebuild looks again, and says what is wrong, if the process still has it then.
func (s *Skeleton) isHere(v *image.VMA, k layKind) bool {
	name := fileName{k.path, k.file}
	ok, known := s.laid.here[name]
	if !known {
		err := SameFile(v.Path, v.File)
		if err != nil {
			s.cfg.Log.Debug("its pages come later", "pid", s.pid, "mapping", v.Range, "file", v.Path, "err", err)
		}
		ok = err == nil
		if s.laid.here == nil {
			s.laid.here = map[fileName]bool{}
		}
		s.laid.here[name] = ok
	}
	return ok
}

// byKind gives the parts of the laid mappings in set to do, each kind once, in no order.
func (l *laid) byKind(set *page.Set, do func(k layKind, part page.Set) error) error {
	for k, s := range l.maps {
		if part := page.Intersection(&s, set); !part.Empty() {
			if err := do(k, part); err != nil {
				return err
			}
		}
	}
	return nil
}

// whole are all mappings, and occupied are also what holds objects.
func (l *laid) whole() (out []page.Range) {
	for _, s := range l.maps {
		out = append(out, s.Ranges()...)
	}
	return out
}

// backed are the mappings of files: what is not the process's own there is the
// file's.
func (l *laid) backed() (out page.Set) {
	for k, s := range l.maps {
		if k.isBacked() {
			out = page.Union(&out, &s)
		}
	}
	return out
}

// trappable are all others.
func (l *laid) trappable() page.Set {
	whole, backed := page.NewSet(l.whole()...), l.backed()
	return page.Difference(&whole, &backed)
}

func (l *laid) occupied() []page.Range {
	out := l.whole()
	for _, o := range l.objects {
		if !o.temp.Empty() {
			out = append(out, o.temp)
		}
	}
	return slices.Clip(out)
}
