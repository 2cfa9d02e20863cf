package fusemem

import (
	"crypto/sha256"
	"fmt"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Node ids follow from the order of the configuration alone, so that a new pager gives each inode
// that the kernel knows the same meaning.
const (
	nodeRoot     = fuse.FUSE_ROOT_ID
	nodeMem      = 2
	nodeMaps     = 3
	nodeStatus   = 4
	nodeResident = 5
	nodeVMADir   = 6
	nodeFilesDir = 7
	nodeMapDir   = 8
	nodeImage    = 9

	// Below these there is one node for each index.
	nodeVMA     = 1 << 32 // vma/<start>-<end>
	nodeFile    = 2 << 32 // files/<path>
	nodeMapFile = 3 << 32 // map/<i>
	nodeSubDir  = 4 << 32 // directories below files

	nodeClass = 0xffffffff << 32
)

// layout is the tree, made once and never changed.
type layout struct {
	cfg     *Config
	dirs    map[uint64]*dir
	maps    []byte
	digest  string
	mounted time.Time
	memUsed uint64 // bytes that the mappings cover
}

type dir struct {
	id, parent uint64
	entries    []entry
	byName     map[string]int
	subdirs    uint32
}

type entry struct {
	name string
	id   uint64
	dir  bool
}

func (d *dir) add(name string, id uint64, isDir bool) {
	d.byName[name] = len(d.entries)
	d.entries = append(d.entries, entry{name, id, isDir})
	if isDir {
		d.subdirs++
	}
}

func newLayout(cfg *Config) *layout {
	l := &layout{cfg: cfg, dirs: map[uint64]*dir{}, mounted: time.Now()}
	root := l.dir(nodeRoot, nodeRoot)
	root.add("mem", nodeMem, false)
	root.add("maps", nodeMaps, false)
	root.add("status", nodeStatus, false)
	root.add("resident", nodeResident, false)
	root.add("vma", nodeVMADir, true)
	root.add("files", nodeFilesDir, true)
	root.add("map", nodeMapDir, true)

	vmas := l.dir(nodeVMADir, nodeRoot)
	for i, v := range cfg.VMAs {
		vmas.add(fmt.Sprintf("%08x-%08x", uint64(v.Start), uint64(v.End)), nodeVMA+uint64(i), false)
		l.maps = appendMapsLine(l.maps, v)
		l.memUsed += v.Bytes()
	}

	l.dir(nodeFilesDir, nodeRoot)
	mapDir := l.dir(nodeMapDir, nodeRoot)
	for i, f := range cfg.Files {
		mapDir.add(strconv.Itoa(i), nodeMapFile+uint64(i), false)
		l.addFile(i, f.Path)
	}
	if cfg.Image != nil {
		mapDir.add("image", nodeImage, false)
	}

	h := sha256.New()
	h.Write(l.maps)
	for _, f := range cfg.Files {
		fmt.Fprintf(h, "%q %d %d %v\n", f.Path, f.Size, f.ModTime.UnixNano(), f.Mode)
	}
	fmt.Fprintln(h, cfg.Image != nil)
	l.digest = fmt.Sprintf("%x", h.Sum(nil)[:8])
	return l
}

func (l *layout) dir(id, parent uint64) *dir {
	d := &dir{id: id, parent: parent, byName: map[string]int{}}
	l.dirs[id] = d
	return d
}

// addFile puts file i at its path below files. Where something is there already (two files of one
// name, one deleted; a directory where once a file was), the name gets a suffix.
func (l *layout) addFile(i int, name string) {
	d := l.dirs[nodeFilesDir]
	parts := strings.Split(strings.TrimPrefix(path.Clean("/"+name), "/"), "/")
	for _, p := range parts[:len(parts)-1] {
		k, ok := d.byName[p]
		for n := 1; ok && !d.entries[k].dir; n++ {
			p = fmt.Sprintf("%s~%d", p, n)
			k, ok = d.byName[p]
		}
		if ok {
			d = l.dirs[d.entries[k].id]
			continue
		}
		id := nodeSubDir + uint64(len(l.dirs))
		d.add(p, id, true)
		d = l.dir(id, d.id)
	}
	base := parts[len(parts)-1]
	if base == "" {
		base = "unnamed"
	}
	unique := base
	for n := 1; ; n++ {
		if _, ok := d.byName[unique]; !ok {
			break
		}
		unique = fmt.Sprintf("%s~%d", base, n)
	}
	d.add(unique, nodeFile+uint64(i), false)
}

// appendMapsLine writes a line as the kernel does (fs/proc/task_mmu.c, show_map_vma): the path
// begins at column 73, newlines in it are escaped.
func appendMapsLine(b []byte, v VMA) []byte {
	at := len(b)
	b = fmt.Appendf(b, "%08x-%08x %s %08x %02x:%02x %d ", uint64(v.Start), uint64(v.End), v.Perms, v.Offset,
		unix.Major(v.Dev), unix.Minor(v.Dev), v.Ino)
	if v.Path != "" {
		for len(b)-at < 73 {
			b = append(b, ' ')
		}
		b = append(b, strings.ReplaceAll(v.Path, "\n", `\012`)...)
	}
	return append(b, '\n')
}

// index takes a node id apart. ok is false where there is no such node.
func (l *layout) index(id uint64) (class uint64, i int, ok bool) {
	class, i = id&nodeClass, int(id&^nodeClass)
	switch class {
	case 0:
		return id, 0, id >= nodeRoot && id <= nodeImage && (id != nodeImage || l.cfg.Image != nil)
	case nodeVMA:
		ok = i < len(l.cfg.VMAs)
	case nodeFile, nodeMapFile:
		ok = i < len(l.cfg.Files)
	case nodeSubDir:
		ok = l.dirs[id] != nil
	}
	return class, i, ok
}

// size is the size of a file whose pages a Source gives, and 0 for others.
func (l *layout) size(id uint64) uint64 {
	switch class, i, _ := l.index(id); class {
	case nodeMem:
		return memSize
	case nodeImage:
		return imageSize
	case nodeMaps:
		return uint64(len(l.maps))
	case nodeVMA:
		return l.cfg.VMAs[i].Bytes()
	case nodeFile, nodeMapFile:
		return uint64(l.cfg.Files[i].Size)
	}
	return 0
}

// attr fills in what stat(2) shows, and reports whether the node is there.
func (l *layout) attr(id uint64, out *fuse.Attr) bool {
	class, i, ok := l.index(id)
	if !ok {
		return false
	}
	*out = fuse.Attr{Ino: id, Mode: unix.S_IFREG | 0o400, Nlink: 1, Size: l.size(id), Blksize: 4096}
	when := l.mounted
	out.Blocks = (out.Size + 511) / 512
	switch class {
	case nodeMem, nodeImage:
		out.Blocks = l.memUsed / 512
	case nodeFile, nodeMapFile:
		when = l.cfg.Files[i].ModTime
		if l.cfg.Files[i].Mode&0o111 != 0 {
			out.Mode |= 0o100
		}
	}
	if d := l.dirs[id]; d != nil {
		out.Mode, out.Nlink = unix.S_IFDIR|0o500, 2+d.subdirs
	}
	out.SetTimes(&when, &when, &when)
	return true
}
