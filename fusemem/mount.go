package fusemem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const (
	// FirstFD is the lowest number of the device's descriptor, so that it can keep its number from
	// one pager to the next, as those of fault can.
	FirstFD = 1000

	// fsName is the file system's subtype: mountinfo calls it fuse.pageferry.
	fsName = "pageferry"
)

// source is what mountinfo shows as the mount's source. It tells Takeover whether it was given the
// same configuration.
func (f *FS) source() string { return fsName + "-" + f.layout.digest }

// Mount makes the mount. Somebody must call Run before anybody can use it; on failure nothing is
// left.
func Mount(cfg Config) (*FS, error) {
	f, err := newFS(cfg)
	if err != nil {
		return nil, err
	}
	if _, err := findMount(f.cfg.Dir); err == nil {
		return nil, fmt.Errorf("fusemem: something is mounted on %s already; Unmount it first", f.cfg.Dir)
	}
	if err := f.openDevice(); err != nil {
		return nil, err
	}
	opts := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,max_read=%d", f.device, maxRequest)
	const flags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOATIME
	if err := unix.Mount(f.source(), f.cfg.Dir, "fuse."+fsName, flags, opts); err != nil {
		unix.Close(f.device)
		return nil, fmt.Errorf("fusemem: mount on %s: %w", f.cfg.Dir, err)
	}
	if err := f.attach(); err != nil {
		return nil, errors.Join(err, Unmount(f.cfg.Dir), unix.Close(f.device))
	}
	return f, nil
}

// attach has go-fuse answer the kernel's INIT, on a descriptor of its own: it closes that when the
// mount has ended, while ours keeps its number until we close it.
func (f *FS) attach() error {
	m, err := findMount(f.cfg.Dir)
	if err != nil {
		return err
	}
	f.dev = m.minor
	fd, err := unix.FcntlInt(uintptr(f.device), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("fusemem: %w", err)
	}
	if f.server, err = fuse.NewServer(f.raw(), fmt.Sprintf("/dev/fd/%d", fd), f.options()); err != nil {
		return fmt.Errorf("fusemem: %w", err)
	}
	f.warm()
	f.readAhead()
	return nil
}

func (f *FS) warm() {
	if !touchBuffers(f.server) {
		f.cfg.Log.Warn("go-fuse is another than was known: a program may get SIGBUS where its pager is killed")
	}
}

func (f *FS) openDevice() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fusemem: /dev/fuse: %w (modprobe fuse)", err)
	}
	defer unix.Close(fd)
	if f.device, err = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, FirstFD); err != nil {
		return fmt.Errorf("fusemem: a number for the device: %w", err)
	}
	return nil
}

// SetReadAhead sets how far the kernel reads ahead in files that are opened from now on: each open
// file keeps what it was opened with (mm/readahead.c, file_ra_state_init). A page fault reads as
// much around its page, so a process maps what it opened while this was small, and people's tools
// open what is read from beginning to end while it is large.
func (f *FS) SetReadAhead(kb int) error {
	// INIT cannot say more than 128 KiB.
	file := fmt.Sprintf("/sys/class/bdi/0:%d/read_ahead_kb", f.dev)
	if err := os.WriteFile(file, []byte(strconv.Itoa(kb)), 0); err != nil {
		return fmt.Errorf("fusemem: read-ahead: %w", err)
	}
	return nil
}

// readAhead sets the configured one. It is not for lack of it that a mount fails.
func (f *FS) readAhead() {
	if err := f.SetReadAhead(f.cfg.ReadAheadKB); err != nil {
		f.cfg.Log.Warn("reads from beginning to end are slower", "err", err)
	}
}

// Mounted reports whether one of our mounts is on dir. It does not touch it.
func Mounted(dir string) bool {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return false
	}
	m, err := findMount(dir)
	return err == nil && m.fsType == "fuse."+fsName
}

// Unmount ends the mount on dir whatever its state, with nobody to serve it as well, and whoever
// uses it: their accesses fail. It is no error if there is none. It never touches what the mount
// shows.
func Unmount(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("fusemem: %w", err)
	}
	for range 16 { // mounts upon mounts, at most
		m, e := findMount(dir)
		switch {
		case errors.Is(e, ErrNotMounted) || e == nil && m.fsType != "fuse."+fsName:
			return nil
		case e != nil:
			return e
		}
		// MNT_FORCE aborts the connection even where the mount is busy.
		err = unix.Unmount(dir, unix.MNT_FORCE|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		}
		if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: somebody was faster
			break
		}
	}
	return fmt.Errorf("fusemem: unmount %s: %w", dir, err)
}

// Probe tells what this host lacks, by a mount on a directory of its own that it makes and removes:
// mount is why there can be no mount, takeOver why none can be taken over (a *sys.NotSupported).
func Probe() (mount, takeOver error) {
	dir, err := os.MkdirTemp("", "pageferry-probe-")
	if err != nil {
		return fmt.Errorf("fusemem: %w", err), nil
	}
	defer os.Remove(dir)
	f, err := Mount(Config{Dir: dir, Memory: nothing{}})
	if err != nil {
		return err, nil
	}
	return f.Close(), f.CanTakeOver()
}

// nothing is a Source without pages.
type nothing struct{}

func (nothing) ReadPages(context.Context, page.Num, []byte, page.Priority) error { return ErrUnmapped }

// abort ends the connection of a mount that has no mount point any more, through fusectl
// (Documentation/filesystems/fuse), which is mounted for it where it is not.
func abort(dev uint32) error {
	const usual = "/sys/fs/fuse/connections"
	name := filepath.Join(strconv.Itoa(int(dev)), "abort")
	if err := os.WriteFile(filepath.Join(usual, name), []byte("1"), 0); err == nil {
		return nil
	}
	dir, err := os.MkdirTemp("", "pageferry-fusectl-")
	if err != nil {
		return fmt.Errorf("fusemem: abort: %w", err)
	}
	defer os.Remove(dir)
	if err := unix.Mount("fusectl", dir, "fusectl", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("fusemem: abort: mount of fusectl: %w", err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	err = os.WriteFile(filepath.Join(dir, name), []byte("1"), 0)
	if err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("fusemem: abort: %w", err)
	}
	return nil
}

// mountPoint is a line of mountinfo.
type mountPoint struct {
	minor          uint32
	fsType, source string
}

// ErrNotMounted is returned where there should be a mount and is none.
var ErrNotMounted = errors.New("nothing is mounted there")

// findMount looks for what is mounted on dir, the topmost. It does not look at dir itself, which
// would ask whoever serves it.
func findMount(dir string) (mountPoint, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mountPoint{}, fmt.Errorf("fusemem: %w", err)
	}
	escape := strings.NewReplacer("\\", `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`)
	dir = escape.Replace(dir)
	found, err := mountPoint{}, ErrNotMounted
	for line := range strings.Lines(string(b)) {
		head, tail, ok := strings.Cut(line, " - ") // proc_pid_mountinfo(5)
		h, t := strings.Fields(head), strings.Fields(tail)
		if !ok || len(h) < 5 || len(t) < 2 || h[4] != dir {
			continue
		}
		_, minor, _ := strings.Cut(h[2], ":")
		n, _ := strconv.ParseUint(minor, 10, 32)
		found, err = mountPoint{uint32(n), t[0], t[1]}, nil
	}
	return found, err
}
