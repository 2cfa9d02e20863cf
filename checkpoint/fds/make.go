package fds

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
)

// maker makes open files in this process, to be handed over.
type maker struct {
	r       *RestoreContext
	log     *slog.Logger
	made    map[int]int // Image.Files -> our descriptor
	lost    map[int]int // unix sockets whose peer is gone -> the peer that is to go
	temps   []int       // more of ours to close
	pipes   map[int]*pipeEnds
	deleted map[FileKey]int
	memfds  map[int]int
	resets  map[int]*resetter // by address family
	created []string
}

func newMaker(r *RestoreContext) *maker {
	log := r.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &maker{
		r: r, log: log.With("pid", r.PID),
		made: make(map[int]int), lost: make(map[int]int), pipes: make(map[int]*pipeEnds),
		deleted: make(map[FileKey]int), memfds: make(map[int]int), resets: make(map[int]*resetter),
	}
}

func (m *maker) close() {
	for _, fd := range m.made {
		unix.Close(fd)
	}
	for _, fd := range m.lost {
		unix.Close(fd)
	}
	for _, fd := range m.temps {
		unix.Close(fd)
	}
	for _, r := range m.resets {
		unix.Close(r.listener)
	}
}

// make makes Image.Files[i].
func (m *maker) make(i int) error {
	f := &m.r.Image.Files[i]
	var fd int
	var err error
	switch f.Kind {
	case image.FileRegular, image.FileDirectory:
		fd, err = m.openPath(f)
	case image.FileDevice:
		fd, err = openDevice(f)
	case image.FilePipe, image.FileFIFO:
		fd, err = m.pipeEnd(f)
	case image.FileEventFD:
		fd, err = makeEventFD(f.EventFD)
	case image.FileEpoll:
		fd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	case image.FileTimerFD:
		fd, err = makeTimerFD(f.TimerFD)
	case image.FileSignalFD:
		var set unix.Sigset_t
		set.Val[0] = f.SignalFD
		fd, err = unix.Signalfd(-1, &set, unix.SFD_CLOEXEC)
	case image.FileInotify:
		fd, err = makeInotify(f)
	case image.FileMemFD:
		fd, err = m.openMemory(f)
	case image.FileSocket:
		fd, err = m.makeSocket(i, f)
	default:
		return fmt.Errorf("open file of kind %d", f.Kind)
	}
	if err != nil {
		return err
	}
	if old, ok := m.made[i]; ok && old != fd {
		unix.Close(old)
	}
	m.made[i] = fd
	return setStatus(fd, f.Flags)
}

// settable are the status flags that fcntl(F_SETFL) changes. O_ASYNC is set in
// the target.
const settable = unix.O_APPEND | unix.O_NONBLOCK | unix.O_NOATIME | unix.O_DIRECT

// setStatus gives an open file the status flags that it had.
func setStatus(fd, want int) error {
	if want&unix.O_PATH != 0 {
		return nil
	}
	have, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	if (have^want)&settable == 0 {
		return nil
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETFL, have&^settable|want&settable); err != nil {
		return fmt.Errorf("set flags %#o: %w", want&settable, err)
	}
	return nil
}

// openFlags are what open(2) is called with to get an open file of those flags.
func openFlags(flags int) int {
	return flags&^(unix.O_CREAT|unix.O_EXCL|unix.O_TRUNC|unix.O_ASYNC|oTmpfile) | unix.O_NOCTTY | unix.O_CLOEXEC
}

// openPath opens what has a name in a file system, or makes a deleted file anew.
func (m *maker) openPath(f *image.OpenFile) (int, error) {
	if f.Deleted {
		return m.openDeleted(f)
	}
	path := f.Path
	if rest, ok := strings.CutPrefix(path, "/proc/self"); ok && (rest == "" || rest[0] == '/') {
		path = "/proc/" + strconv.Itoa(m.r.PID) + rest
	}
	flags := openFlags(f.Flags)
	if f.Flags&unix.O_PATH == 0 {
		flags |= unix.O_NONBLOCK // should it be a FIFO here, this must not wait
	}
	if f.Flags&unix.O_PATH != 0 && f.ID.Mode&unix.S_IFMT == unix.S_IFLNK {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Open(path, flags, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return -1, fmt.Errorf("open %s: it does not exist on this host: %w", path, err)
		}
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	if err := m.checkFile(fd, path, f); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if f.Pos != 0 && f.Flags&unix.O_PATH == 0 {
		if _, err := unix.Seek(fd, f.Pos, unix.SEEK_SET); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("offset %d of %s: %w", f.Pos, path, err)
		}
	}
	return fd, nil
}

// checkFile makes sure that what was opened can stand for what was open at the
// source: the very same file, or one of the same kind and size. A log that is
// only appended to may differ.
func (m *maker) checkFile(fd int, path string, f *image.OpenFile) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != f.ID.Mode&unix.S_IFMT {
		return fmt.Errorf("%s is of another kind on this host than at the source: %w", path, unix.ESTALE)
	}
	if st.Dev == f.ID.Dev && st.Ino == f.ID.Ino || st.Size == f.ID.Size {
		return nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || f.Flags&unix.O_PATH != 0 {
		return nil
	}
	if f.Flags&unix.O_ACCMODE == unix.O_WRONLY && f.Flags&unix.O_APPEND != 0 {
		return nil
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err == nil {
		switch fs.Type {
		case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC:
			return nil
		}
	}
	return fmt.Errorf("%s has %d bytes on this host and %d at the source: copy it or share it first: %w", path, st.Size, f.ID.Size, unix.ESTALE)
}

// openDeleted makes a file without a name, once for all open files of it.
func (m *maker) openDeleted(f *image.OpenFile) (int, error) {
	key := FileKey{f.ID.Dev, f.ID.Ino}
	src, ok := m.deleted[key]
	if !ok {
		var err error
		if src, err = m.makeDeleted(f); err != nil {
			return -1, fmt.Errorf("make deleted file %s anew: %w", f.Path, err)
		}
		m.deleted[key] = src
		m.temps = append(m.temps, src)
	}
	return reopen(src, f)
}

func (m *maker) makeDeleted(f *image.OpenFile) (int, error) {
	mode := f.ID.Mode & 0o7777
	dir := filepath.Dir(f.Path)
	fd, err := unnamed(dir)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		m.log.Warn("the directory of a deleted file does not exist here", "path", f.Path)
		fd, err = unnamed("/tmp")
	}
	if err != nil {
		return -1, err
	}
	if err := fill(fd, f.ID.Size, f.Content); err != nil {
		unix.Close(fd)
		return -1, err
	}
	if err := errors.Join(unix.Fchown(fd, int(f.UID), int(f.GID)), unix.Fchmod(fd, mode)); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// unnamed makes a file without a name on the file system of dir.
func unnamed(dir string) (int, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil || !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return fd, err
	}
	t, err := os.CreateTemp(dir, ".pageferry-*")
	if err != nil {
		return -1, err
	}
	defer t.Close()
	if err := os.Remove(t.Name()); err != nil {
		return -1, err
	}
	return unix.FcntlInt(t.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

func fill(fd int, size int64, content []image.Chunk) error {
	if err := unix.Ftruncate(fd, size); err != nil {
		return err
	}
	for _, c := range content {
		for at := 0; at < len(c.Data); {
			n, err := unix.Pwrite(fd, c.Data[at:], c.Offset+int64(at))
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil {
				return err
			}
			at += n
		}
	}
	return nil
}

// reopen opens one of our files anew, with the flags and offset of f.
func reopen(fd int, f *image.OpenFile) (int, error) {
	return reopenAt("/proc/self/fd/"+strconv.Itoa(fd), f)
}

func reopenAt(path string, f *image.OpenFile) (int, error) {
	fd, err := unix.Open(path, openFlags(f.Flags)&^unix.O_NOFOLLOW, 0)
	if err != nil {
		return -1, fmt.Errorf("open it anew: %w", err)
	}
	if f.Pos != 0 {
		if _, err := unix.Seek(fd, f.Pos, unix.SEEK_SET); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("offset %d: %w", f.Pos, err)
		}
	}
	return fd, nil
}

func openDevice(f *image.OpenFile) (int, error) {
	want, ok := plainDevices[f.Rdev]
	if !ok {
		return -1, fmt.Errorf("device %d:%d cannot be carried", unix.Major(f.Rdev), unix.Minor(f.Rdev))
	}
	for _, path := range []string{f.Path, want} {
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil || st.Rdev != f.Rdev || st.Mode&unix.S_IFMT != unix.S_IFCHR {
			continue
		}
		fd, err := unix.Open(path, openFlags(f.Flags), 0)
		if err != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
		return fd, nil
	}
	return -1, fmt.Errorf("open %s: not the same device here: %w", want, unix.ENODEV)
}

// openMemory opens a memfd: one that the target has mapped, or a new one.
func (m *maker) openMemory(f *image.OpenFile) (int, error) {
	s := &m.r.Image.Memories[f.Memory]
	if n, ok := m.r.MemoryFD[f.Memory]; ok {
		return reopenAt(fmt.Sprintf("/proc/%d/fd/%d", m.r.PID, n), f)
	}
	src, ok := m.memfds[f.Memory]
	if !ok {
		var err error
		if src, err = makeMemory(s); err != nil {
			return -1, fmt.Errorf("memfd %s: %w", s.Name, err)
		}
		m.memfds[f.Memory] = src
		m.temps = append(m.temps, src)
	}
	return reopen(src, f)
}

func makeMemory(s *image.SharedMemory) (int, error) {
	fd, err := unix.MemfdCreate(s.Name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, err
	}
	err = fill(fd, s.Size, s.Chunks)
	if err == nil && s.Seals != 0 {
		if _, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, s.Seals); err != nil {
			err = fmt.Errorf("seals %#x: %w", s.Seals, err)
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
