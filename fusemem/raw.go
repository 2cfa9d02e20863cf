package fusemem

import (
	"sort"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// forever is how long the kernel may keep names and attributes: they never change.
const forever = 365 * 24 * time.Hour

// raw answers the kernel. Nothing in it stands on an earlier request.
type raw struct {
	fuse.RawFileSystem // ENOSYS for the rest, which the kernel takes as "not needed"
	*FS
}

func (r *raw) String() string { return "pageferry" }

// lasting tells for how long a node's attributes hold: those of what Status and Resident tell not
// at all.
func lasting(id uint64) time.Duration {
	if id == nodeStatus || id == nodeResident {
		return 0
	}
	return forever
}

func (r *raw) entry(id uint64, out *fuse.EntryOut) {
	r.layout.attr(id, &out.Attr)
	out.NodeId = id
	out.Generation = 1
	out.SetEntryTimeout(forever)
	out.SetAttrTimeout(lasting(id))
}

func (r *raw) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	d := r.layout.dirs[in.NodeId]
	if d == nil {
		return fuse.ENOTDIR
	}
	i, ok := d.byName[name]
	if !ok {
		// A negative entry, kept as long as any other: nothing is ever added.
		out.SetEntryTimeout(forever)
		return fuse.OK
	}
	r.entry(d.entries[i].id, out)
	return fuse.OK
}

func (r *raw) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if !r.layout.attr(in.NodeId, &out.Attr) {
		return fuse.ENOENT
	}
	out.SetTimeout(lasting(in.NodeId))
	return fuse.OK
}

func (r *raw) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.Flags&unix.O_ACCMODE != unix.O_RDONLY || in.Flags&unix.O_TRUNC != 0 {
		return fuse.EROFS
	}
	// A direct read that touches an unmapped page could only fail as a whole, where one through the
	// page cache gives what is mapped before it.
	if in.Flags&unix.O_DIRECT != 0 {
		return fuse.EINVAL
	}
	class, _, ok := r.layout.index(in.NodeId)
	switch {
	case !ok:
		return fuse.ENOENT
	case class == nodeStatus || class == nodeResident:
		out.OpenFlags = fuse.FOPEN_DIRECT_IO
		out.Fh = r.snapshots.open()
	default:
		out.OpenFlags = fuse.FOPEN_KEEP_CACHE
	}
	// No close(2) waits for us.
	out.OpenFlags |= fuse.FOPEN_NOFLUSH
	return fuse.OK
}

func (r *raw) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status { return fuse.ENOSYS }

func (r *raw) Release(_ <-chan struct{}, in *fuse.ReleaseIn) { r.snapshots.release(in.Fh) }

func (r *raw) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if r.layout.dirs[in.NodeId] == nil {
		return fuse.ENOTDIR
	}
	out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

func (r *raw) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return r.readDir(in, out, func(e fuse.DirEntry, _ bool) bool { return out.AddDirEntry(e) })
}

func (r *raw) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return r.readDir(in, out, func(e fuse.DirEntry, dots bool) bool {
		eo := out.AddDirLookupEntry(e)
		if eo == nil {
			return false
		}
		if !dots { // for these the kernel wants none (fs/fuse/readdir.c, fuse_direntplus_link)
			r.entry(e.Ino, eo)
		}
		return true
	})
}

// readDir gives the entries from in.Offset on, which counts them, as many as add takes.
func (r *raw) readDir(in *fuse.ReadIn, out *fuse.DirEntryList, add func(e fuse.DirEntry, dots bool) bool) fuse.Status {
	d := r.layout.dirs[in.NodeId]
	if d == nil {
		return fuse.ENOTDIR
	}
	for i := in.Offset; i < uint64(len(d.entries))+2; i++ {
		e := fuse.DirEntry{Mode: unix.S_IFDIR, Off: i + 1}
		switch i {
		case 0:
			e.Name, e.Ino = ".", d.id
		case 1:
			e.Name, e.Ino = "..", d.parent
		default:
			x := d.entries[i-2]
			e.Name, e.Ino = x.name, x.id
			if !x.dir {
				e.Mode = unix.S_IFREG
			}
		}
		if !add(e, i < 2) {
			break
		}
	}
	return fuse.OK
}

// Lseek is only asked for SEEK_DATA and SEEK_HOLE. What no mapping has is a hole of mem, though
// reading it fails: tools that copy sparse files copy the memory.
func (r *raw) Lseek(_ <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	size := r.layout.size(in.NodeId)
	if in.Whence != unix.SEEK_DATA && in.Whence != unix.SEEK_HOLE {
		return fuse.EINVAL
	}
	if in.Offset >= size {
		return fuse.Status(unix.ENXIO)
	}
	out.Offset = in.Offset
	if in.NodeId != nodeMem {
		if in.Whence == unix.SEEK_HOLE {
			out.Offset = size
		}
		return fuse.OK
	}
	vmas := r.cfg.VMAs
	for i := sort.Search(len(vmas), func(i int) bool { return uint64(vmas[i].End) > in.Offset }); ; i++ {
		if i == len(vmas) || uint64(vmas[i].Start) >= size {
			if in.Whence == unix.SEEK_DATA {
				return fuse.Status(unix.ENXIO)
			}
			return fuse.OK
		}
		if in.Whence == unix.SEEK_DATA {
			out.Offset = max(out.Offset, uint64(vmas[i].Start))
			return fuse.OK
		}
		if uint64(vmas[i].Start) > out.Offset {
			return fuse.OK
		}
		out.Offset = min(uint64(vmas[i].End), size)
	}
}

func (r *raw) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	*out = fuse.StatfsOut{Bsize: 4096, Frsize: 4096, NameLen: 255, Blocks: r.layout.memUsed / 4096}
	return fuse.OK
}

// What follows is refused by the kernel already, as long as nobody mounts it writable.

func (r *raw) SetAttr(<-chan struct{}, *fuse.SetAttrIn, *fuse.AttrOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Mknod(<-chan struct{}, *fuse.MknodIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Mkdir(<-chan struct{}, *fuse.MkdirIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Unlink(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EROFS }

func (r *raw) Rmdir(<-chan struct{}, *fuse.InHeader, string) fuse.Status { return fuse.EROFS }

func (r *raw) Rename(<-chan struct{}, *fuse.RenameIn, string, string) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Link(<-chan struct{}, *fuse.LinkIn, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Symlink(<-chan struct{}, *fuse.InHeader, string, string, *fuse.EntryOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Create(<-chan struct{}, *fuse.CreateIn, string, *fuse.CreateOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Tmpfile(<-chan struct{}, *fuse.CreateIn, *fuse.CreateOut) fuse.Status {
	return fuse.EROFS
}

func (r *raw) Write(<-chan struct{}, *fuse.WriteIn, []byte) (uint32, fuse.Status) {
	return 0, fuse.EROFS
}

func (r *raw) Fallocate(<-chan struct{}, *fuse.FallocateIn) fuse.Status { return fuse.EROFS }
