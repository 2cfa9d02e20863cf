package checkpoint

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"github.com/pageferry/pageferry/checkpoint/fileid"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// mappedFiles are the files that a frozen process has mapped privately, the
// executable among them, in the order in which its mappings show them: those of
// Image.MappedFiles. Who finds the process frozen finds them again in that order.
// Ones that were deleted count, for a file may be deleted between the two looks.
type mappedFiles struct {
	list   []mappedFile
	index  map[mappedKey]int
	exe    int           // in list, -1 where there is none
	opened chan struct{} // closed when all are
}

type mappedFile struct {
	name     string // as in maps, without " (deleted)"; of a copy that this host keeps, that of the original
	deleted  bool
	dev, ino uint64
	link     string // of /proc, that leads to it
	file     *os.File
	err      error // why there is no file
}

// mappedKey tells files apart by what maps say. Where mappings of one device show
// inodes of several (subvolumes, overlays), the name does.
type mappedKey struct {
	dev, ino uint64
	name     string
}

func keyOf(m *proc.Mapping) mappedKey { return mappedKey{m.Dev, m.Ino, m.Name} }

// privateFile reports whether m may be a private mapping of a regular file, by what
// it is called.
func privateFile(m *proc.Mapping) bool {
	if m.Ino == 0 || m.Shared || !strings.HasPrefix(m.Name, "/") {
		return false
	}
	for _, other := range []string{"/memfd:", "/SYSV", "/secretmem"} {
		if m.Deleted && strings.HasPrefix(m.Name, other) {
			return false
		}
	}
	return !m.Deleted || m.Name != "/dev/zero"
}

// listMappedFiles lists the files of maps, all that the process has, and begins to open
// them. It stands still. describe looks at the file of a mapping. A file that cannot be
// looked at or opened is in the list all the same.
func listMappedFiles(pid int, maps []proc.Mapping, describe func(*proc.Mapping) (image.FileID, error)) *mappedFiles {
	fs := &mappedFiles{index: map[mappedKey]int{}, exe: -1, opened: make(chan struct{})}
	other := map[mappedKey]bool{}
	for i := range maps {
		m := &maps[i]
		k := keyOf(m)
		if _, ok := fs.index[k]; ok || other[k] || !privateFile(m) {
			continue
		}
		id, err := describe(m)
		if err == nil && id.Mode&unix.S_IFMT != unix.S_IFREG {
			other[k] = true
			continue
		}
		fs.index[k] = len(fs.list)
		fs.list = append(fs.list, mappedFile{name: fileid.Original(m.Name), deleted: m.Deleted, dev: id.Dev, ino: id.Ino, link: mapFile(pid, m.Range), err: err})
	}
	fs.addExe(pid)
	go fs.open()
	return fs
}

// addExe finds the executable, which a program may have unmapped.
func (fs *mappedFiles) addExe(pid int) {
	link := exeLink(pid)
	name, err := os.Readlink(link)
	if err != nil {
		return
	}
	var st unix.Stat_t
	if err = unix.Stat(link, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		return
	}
	for i := range fs.list {
		if o := &fs.list[i]; err == nil && o.err == nil && o.dev == st.Dev && o.ino == st.Ino {
			fs.exe = i
			return
		}
	}
	f := mappedFile{dev: st.Dev, ino: st.Ino, link: link, err: err}
	f.name, f.deleted, _ = fileid.ExeName(name)
	fs.exe, fs.list = len(fs.list), append(fs.list, f)
}

func exeLink(pid int) string { return fmt.Sprintf("/proc/%d/exe", pid) }

// open opens what is in the list: 12 us a file, for which nobody needs to wait that
// the process does.
func (fs *mappedFiles) open() {
	defer close(fs.opened)
	for i := range fs.list {
		if f := &fs.list[i]; f.err == nil {
			f.err = f.open()
		}
	}
}

func (f *mappedFile) open() (err error) {
	if f.file, err = os.Open(f.link); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.file.Fd()), &st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if st.Dev != f.dev || st.Ino != f.ino { // it runs again
		return errors.New("another file is mapped there by now")
	}
	return nil
}

func (fs *mappedFiles) close() {
	<-fs.opened
	for i := range fs.list {
		if f := fs.list[i].file; f != nil {
			_ = f.Close()
		}
	}
}

// listFiles lists the files that the image will name.
func (c *capture) listFiles() {
	c.files = listMappedFiles(c.s.pid, c.maps, c.s.survey.fileID)
	c.s.setFiles(c.files)
	c.img.MappedFiles = make([]image.MappedFile, len(c.files.list))
	for i := range c.files.list {
		c.img.MappedFiles[i] = image.MappedFile{Path: c.files.list[i].name, Deleted: c.files.list[i].deleted}
	}
}

// mapsFile notes that v is a private mapping of a file.
func (c *capture) mapsFile(m *proc.Mapping, v *image.VMA) {
	if i, ok := c.files.index[keyOf(m)]; ok {
		c.img.MappedFiles[i].File = v.File
		if v.Kind == image.VMAFile {
			v.MappedFile, v.Path = i+1, c.files.list[i].name
		}
	}
}

// executable describes that, where no mapping does.
func (c *capture) executable() error {
	i := c.files.exe
	if c.p.ExeFile = i + 1; i < 0 {
		return nil
	}
	if c.files.list[i].deleted {
		c.p.Exe = c.files.list[i].name
	}
	if c.img.MappedFiles[i].File != (image.FileID{}) {
		return nil
	}
	id, err := c.s.survey.describe(exeLink(c.s.pid), true)
	c.img.MappedFiles[i].File = id
	return err
}

// setFiles replaces what readFile reads; nil ends it.
func (s *Session) setFiles(fs *mappedFiles) {
	if old := s.files.Swap(fs); old != nil {
		old.close()
	}
}

// readFile is ReadPages of a file.
func (s *Session) readFile(i int, rs []page.Range, buf []byte) error {
	fs := s.files.Load()
	if fs == nil {
		return &Error{"read a file of", s.pid, ErrState}
	}
	if i >= len(fs.list) {
		return &Error{"read a file of", s.pid, fmt.Errorf("%w: file %d of %d", ErrState, i, len(fs.list))}
	}
	<-fs.opened
	f := &fs.list[i]
	err := f.err
	for _, r := range rs {
		if err == nil {
			err = f.read(r, buf[:r.Bytes()])
			buf = buf[r.Bytes():]
		}
	}
	if err != nil {
		return &Error{"read a file of", s.pid, fmt.Errorf("file %d, %s: %w", i, f.name, err)}
	}
	return nil
}

// read fills buf with what lies at r. What the file lacks is zero.
func (f *mappedFile) read(r page.Range, buf []byte) error {
	n := 0
	if r.End <= math.MaxInt64 {
		var err error
		if n, err = f.file.ReadAt(buf, int64(r.Start)); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	clear(buf[n:])
	return nil
}
