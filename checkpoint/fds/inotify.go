package fds

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
)

func (e *examiner) describeInotify(f *file) error {
	f.open.Kind, f.kind = image.FileInotify, "inotify"
	f.what = fmt.Sprintf("inotify with %d watches", len(f.info.Watches))
	fd, err := e.dup(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if n, err := unix.IoctlGetInt(fd, unix.TIOCINQ); err != nil {
		return fmt.Errorf("read its queue: %w", err)
	} else if n > 0 {
		if e.content {
			f.refuse("has %d bytes of unread events, which cannot be carried: try again when the program has read them", n)
		} else {
			f.note("has %d bytes of unread events, which cannot be carried", n)
		}
	}
	for _, w := range f.info.Watches {
		path, err := e.watchPath(w)
		if err != nil {
			f.refuse("watch %d: %v", w.WD, err)
			continue
		}
		f.open.Inotify = append(f.open.Inotify, image.Watch{WD: w.WD, Path: path, Mask: w.Mask})
	}
	return e.owner(f, fd)
}

// mount is a line of mountinfo.
type mount struct {
	dev  uint64
	path string
}

// watchPath finds the path of a watched inode through its file handle.
func (e *examiner) watchPath(w watchInfo) (string, error) {
	if w.Handle == nil {
		return "", errors.New("the file system gives no handle to find its path")
	}
	if e.mounts == nil {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", e.pid))
		if err != nil {
			return "", err
		}
		e.mounts = parseMounts(string(b))
	}
	last := errors.New("its file system is not mounted here")
	for _, m := range e.mounts {
		if m.dev != w.Dev {
			continue
		}
		path, err := handlePath(m.path, w)
		if err == nil {
			return path, nil
		}
		last = err
	}
	return "", fmt.Errorf("the path of inode %d cannot be found: %w", w.Ino, last)
}

func handlePath(mountPoint string, w watchInfo) (string, error) {
	dir, err := unix.Open(mountPoint, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(dir)
	fd, err := unix.OpenByHandleAt(dir, unix.NewFileHandle(w.HandleType, w.Handle), unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	path, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	var st, named unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	// A bind mount of a part shows what lies outside of it as unreachable.
	if err := unix.Lstat(path, &named); err != nil || named.Dev != st.Dev || named.Ino != st.Ino {
		return "", fmt.Errorf("%s does not name it", path)
	}
	return path, nil
}

// parseMounts reads /proc/PID/mountinfo.
func parseMounts(s string) []mount {
	var out []mount
	for line := range strings.Lines(s) {
		f := strings.Fields(line)
		if len(f) < 5 {
			continue
		}
		a, b, ok := strings.Cut(f[2], ":")
		major, err1 := strconv.ParseUint(a, 10, 32)
		minor, err2 := strconv.ParseUint(b, 10, 32)
		if !ok || err1 != nil || err2 != nil {
			continue
		}
		out = append(out, mount{dev: unix.Mkdev(uint32(major), uint32(minor)), path: unescape(f[4])})
	}
	return out
}

// unescape undoes the \ooo of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
