package restore

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
)

// laidObject is an object of shared memory that was made before the image. It is
// held in the process by a descriptor or by a mapping of its own, so that it
// outlives the mappings that show it: those are made and unmade as the source's
// are, and all of them anew by Rebuild.
//
// Its pages are known by the address that they landed at: the last one, where that
// was done by several mappings.
type laidObject struct {
	mem       image.SharedMemory
	noReserve bool
	fd        int        // number in the process of a memfd
	temp      page.Range // where another is mapped whole
	file      *os.File   // ours: what is stale is punched out through it
}

func (o *laidObject) String() string { return describe(&o.mem) }

// sealable reports whether seals can be added to it: that is settled at its birth.
func sealable(m *image.SharedMemory) bool { return m.Seals != unix.F_SEAL_SEAL }

// fits reports whether m is what o was made as. A memfd can be cut to another size.
func (o *laidObject) fits(m *image.SharedMemory) bool {
	if o.mem.Memfd != m.Memfd || o.mem.Huge != m.Huge {
		return false
	}
	if !m.Memfd {
		return o.mem.Size == m.Size
	}
	return o.mem.Name == m.Name && sealable(&o.mem) == sealable(m)
}

// mapAt makes a mapping of the object, readable and writable.
func (o *laidObject) mapAt(sc *script, r page.Range, offset uint64) {
	if o.mem.Memfd {
		sc.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), unix.PROT_READ|unix.PROT_WRITE,
			unix.MAP_SHARED|unix.MAP_FIXED_NOREPLACE, uint64(o.fd), offset)
		return
	}
	// With an old size of 0 mremap maps the same pages once more.
	sc.call(unix.SYS_MREMAP, uint64(o.temp.Start)+offset, 0, r.Bytes(), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(r.Start))
}

// punch takes pages out of the object: it reads zeros there, and a trap sees who
// does. It does not depend on any mapping.
func (o *laidObject) punch(k *layKind, pages *page.Set) error {
	for _, r := range pages.Ranges() {
		err := unix.Fallocate(int(o.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(k.offset(r.Start)), int64(r.Bytes()))
		if err != nil {
			return about(fmt.Errorf("give up pages %v: %w", r, err), "%v", o)
		}
	}
	return nil
}

func (o *laidObject) close() error {
	if o == nil || o.file == nil {
		return nil
	}
	err := o.file.Close()
	o.file = nil
	return err
}

// layObjects makes the objects that a layout names and that are not there, away from
// taken, and cuts those that are to their size. fresh are the new ones: openObjects
// makes them usable when the script has run.
func (s *Skeleton) layObjects(sc *script, layout *image.Layout, taken []page.Range) (fresh []*laidObject, err error) {
	numbers := map[int]bool{}
	for _, o := range s.laid.objects {
		numbers[o.fd] = true
	}
	noReserve := make([]bool, len(layout.Memories))
	for i := range layout.VMAs {
		if v := &layout.VMAs[i]; v.Kind == image.VMAShared {
			noReserve[v.Memory] = noReserve[v.Memory] || v.Has("nr")
		}
	}
	for i := range layout.Memories {
		m := &layout.Memories[i]
		if o := s.laid.objects[m.ID]; o != nil {
			if m.Memfd && o.mem.Size != m.Size {
				sc.on(o.String)
				sc.call(unix.SYS_FTRUNCATE, uint64(o.fd), uint64(m.Size))
				o.mem.Size = m.Size
				s.laid.cut(m)
			}
			continue
		}
		o := &laidObject{mem: *m, noReserve: noReserve[i]}
		sc.on(o.String)
		if m.Memfd {
			for o.fd = helperFDs; numbers[o.fd]; o.fd++ {
			}
			numbers[o.fd] = true
			createMemfd(sc, m, o.fd)
		} else {
			at, ok := hole(uint64(page.Addr(m.Size).Ceil()), append(s.laid.occupied(), taken...))
			if !ok {
				return nil, about(fmt.Errorf("%w: no room for %d bytes", ErrUnsupported, m.Size), "%v", o)
			}
			o.temp = at
			createShared(sc, at, o.noReserve)
		}
		fresh = append(fresh, o)
		s.laid.objects[m.ID] = o
	}
	return fresh, nil
}

// outdated are the objects that mems does not name, or names as something else.
func (l *laid) outdated(mems []image.SharedMemory) map[image.ObjectID]*laidObject {
	out := maps.Clone(l.objects)
	for i := range mems {
		if o := out[mems[i].ID]; o != nil && o.fits(&mems[i]) {
			delete(out, mems[i].ID)
		}
	}
	return out
}

// letGo takes what holds the object out of the process.
func (o *laidObject) letGo(sc *script) {
	sc.on(o.String)
	if o.mem.Memfd {
		sc.call(unix.SYS_CLOSE, uint64(o.fd))
	} else {
		sc.call(unix.SYS_MUNMAP, uint64(o.temp.Start), o.temp.Bytes())
	}
}

// openObjects opens what a script has made.
func (s *Skeleton) openObjects(fresh []*laidObject) error {
	if len(fresh) == 0 {
		return nil
	}
	pidfd, err := unix.PidfdOpen(s.target.pid, 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(pidfd)
	for _, o := range fresh {
		if o.mem.Memfd {
			fd, err := unix.PidfdGetfd(pidfd, o.fd, 0)
			if err != nil {
				return about(fmt.Errorf("pidfd_getfd: %w", err), "%v", o)
			}
			o.file = os.NewFile(uintptr(fd), o.mem.Name)
			continue
		}
		path := fmt.Sprintf("/proc/%d/map_files/%x-%x", s.target.pid, uint64(o.temp.Start), uint64(o.temp.End))
		if o.file, err = os.OpenFile(path, os.O_RDWR, 0); err != nil {
			return about(err, "%v", o)
		}
	}
	return nil
}

// evade moves what holds objects out of the way of taken, to where nothing of
// apart is.
func (s *Skeleton) evade(sc *script, taken, apart []page.Range) error {
	for _, o := range s.laid.objects {
		if o.temp.Empty() || !overlapsAny(o.temp, taken) {
			continue
		}
		to, ok := hole(o.temp.Bytes(), append(append(s.laid.occupied(), apart...), taken...))
		if !ok {
			return about(fmt.Errorf("%w: no room to move it", ErrUnsupported), "%v", o)
		}
		sc.on(o.String)
		sc.call(unix.SYS_MREMAP, uint64(o.temp.Start), o.temp.Bytes(), o.temp.Bytes(), unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(to.Start))
		o.temp = to
	}
	return nil
}

// cut notes that what lies behind the end of m is not there any more.
func (l *laid) cut(m *image.SharedMemory) {
	end := page.Addr(m.Size).Ceil()
	for k, there := range l.maps {
		if k.shared != m.ID {
			continue
		}
		var behind page.Set
		for _, r := range there.Ranges() {
			behind.Add(page.Range{Start: max(r.Start, k.base+end), End: r.End})
		}
		l.pages = page.Difference(&l.pages, &behind)
	}
}

// overwrite notes that pages are being landed: what has landed of the same pages of
// an object by other mappings is not there any more.
func (l *laid) overwrite(pages *page.Set) {
	var over page.Set
	_ = l.byKind(pages, func(k layKind, part page.Set) error {
		for other, there := range l.maps {
			if !k.isShared() || other.shared != k.shared || other.base == k.base {
				continue
			}
			for _, r := range part.Ranges() {
				same := page.Range{Start: r.Start - k.base + other.base, End: r.End - k.base + other.base}
				for _, r := range there.Intersect(same) {
					over.Add(r)
				}
			}
		}
		return nil
	})
	l.pages = page.Difference(&l.pages, &over)
}

// close lets go of what is ours of the objects.
func (l *laid) close() error {
	var all []error
	for _, o := range l.objects {
		all = append(all, o.close())
	}
	return errors.Join(all...)
}

// adoptObjects gives each of objects what was laid for it, and lets go of what
// nobody takes.
func (r *rebuild) adoptObjects(sc *script, objects []*sharedObject) error {
	left := r.laid.objects
	r.laid.objects = map[image.ObjectID]*laidObject{}
	for _, o := range objects {
		if l := left[o.mem.ID]; l != nil && o.takes(l) {
			delete(left, o.mem.ID)
			r.laid.objects[o.mem.ID] = l
			o.laid, o.temp = l, l.temp
		}
	}
	var all []error
	for _, l := range left {
		if l.mem.Memfd { // a mapping is cleared away with all others
			l.letGo(sc)
		}
		all = append(all, l.close())
	}
	return errors.Join(all...)
}

// takes reports whether l can become the object. What the image carries of its
// content has no holes, for which small ones are made anew; and what is stale could
// not be punched out of one that is sealed before that is known.
func (o *sharedObject) takes(l *laidObject) bool {
	if !l.fits(o.mem) || o.mem.Size <= image.MaxInlineMemory || o.sealsEarly() {
		return false
	}
	for _, v := range o.vmas {
		if !l.mem.Memfd && (v.Has("nr") != l.noReserve || v.Offset >= l.temp.Bytes()) {
			return false
		}
	}
	return true
}

// owned are the addresses by which the image knows the pages of the object, as far
// as they showed the same before it: those of the first shared mapping with each.
func (r *rebuild) owned(o *sharedObject) (out page.Set) {
	rest := page.NewSet(page.Range{End: math.MaxUint64 &^ (page.Size - 1)})
	vmas := slices.Clone(o.vmas)
	slices.SortStableFunc(vmas, func(a, b *image.VMA) int { // what another mapping shows is not a window's
		switch {
		case a.Window == b.Window:
			return 0
		case a.Window:
			return 1
		}
		return -1
	})
	for _, v := range vmas {
		if !v.Shared {
			continue
		}
		k := kindOf(v, o.mem.ID)
		was := r.laid.maps[k]
		window := page.Range{Start: page.Addr(v.Offset), End: page.Addr(v.Offset + v.Bytes())}
		for _, w := range rest.Remove(window) {
			for _, at := range was.Intersect(page.Range{Start: k.base + w.Start, End: k.base + w.End}) {
				out.Add(at)
			}
		}
	}
	return out
}

// settleObjects gives up what has landed of objects and is known by another address
// in the image, or not at all: that may bring the page itself.
func (r *rebuild) settleObjects() error {
	var keep page.Set
	for _, o := range r.objects {
		if o.laid != nil {
			own := r.owned(o)
			keep = page.Union(&keep, &own)
		}
	}
	landed := r.laid.pages
	return r.laid.byKind(&landed, func(k layKind, part page.Set) error {
		if !k.isShared() {
			return nil
		}
		stale := page.Difference(&part, &keep)
		r.laid.pages = page.Difference(&r.laid.pages, &stale)
		if o := r.laid.objects[k.shared]; o != nil {
			return o.punch(&k, &stale)
		}
		return nil
	})
}
