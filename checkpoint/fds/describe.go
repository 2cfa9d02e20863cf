package fds

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

// oTmpfile is the bit of O_TMPFILE that is not O_DIRECTORY; the kernel leaves it
// in the flags of the file.
const oTmpfile = unix.O_TMPFILE &^ unix.O_DIRECTORY

// describe fills f.open, f.kind, f.what and says what cannot be carried. An
// error means that the state could not be read.
func (e *examiner) describe(f *file) error {
	f.what = f.link
	for i := range f.info.Locks {
		l := f.info.Locks[i].Lock
		switch l.Kind {
		case "FLOCK", "POSIX", "OFDLCK":
			l.FD = f.nums[0]
			f.open.Locks = append(f.open.Locks, l)
		default:
			f.refuse("holds a lock of kind %s, which cannot be carried", l.Kind)
		}
	}
	if f.open.Flags&unix.O_PATH != 0 {
		f.open.Kind, f.kind = image.FileRegular, "path"
		return e.describePath(f)
	}
	switch f.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if strings.HasPrefix(f.link, "/memfd:") && f.st.Nlink == 0 {
			return e.describeMemFD(f)
		}
		if !strings.HasPrefix(f.link, "/") {
			break
		}
		f.open.Kind, f.kind = image.FileRegular, "file"
		return e.describePath(f)
	case unix.S_IFDIR:
		f.open.Kind, f.kind = image.FileDirectory, "directory"
		return e.describePath(f)
	case unix.S_IFCHR, unix.S_IFBLK:
		e.describeDevice(f)
		return nil
	case unix.S_IFIFO:
		return e.describePipe(f)
	case unix.S_IFSOCK:
		return e.describeSocket(f)
	}
	return e.describeAnon(f)
}

// anonymous names the anon inodes that cannot be carried, and why.
var anonymous = map[string]string{
	"[io_uring]":         "an io_uring instance: its queues and requests in flight cannot be carried",
	"[userfaultfd]":      "a userfaultfd: page faults of the process are served by a program",
	"[perf_event]":       "a performance counter",
	"[fanotify]":         "a fanotify group",
	"[pidfd]":            "a pidfd: it names a process that does not move along",
	"[secretmem]":        "secret memory",
	"[seccomp notify]":   "a seccomp listener",
	"[landlock-ruleset]": "a landlock ruleset",
	"[fscontext]":        "a mount under construction",
	"[mount]":            "a detached mount",
	"[kvm-vm]":           "a virtual machine",
	"[kvm-vcpu]":         "a virtual processor",
	"bpf-map":            "a BPF map",
	"bpf-prog":           "a BPF program",
	"bpf_link":           "a BPF link",
	"bpf_iter":           "a BPF iterator",
	"btf":                "BPF type information",
}

func (e *examiner) describeAnon(f *file) error {
	name := strings.TrimPrefix(f.link, "anon_inode:")
	switch name {
	case "[eventfd]":
		f.open.Kind, f.kind = image.FileEventFD, "eventfd"
		f.open.EventFD = &image.EventFD{Count: f.info.EventCount, Semaphore: f.info.Semaphore}
		f.what = fmt.Sprintf("eventfd with count %d", f.info.EventCount)
	case "[eventpoll]":
		f.open.Kind, f.kind = image.FileEpoll, "epoll"
		f.what = fmt.Sprintf("epoll with %d registrations", len(f.info.Epoll))
	case "[timerfd]":
		f.open.Kind, f.kind = image.FileTimerFD, "timerfd"
		if f.info.Value == 0 && f.info.Interval > 0 && e.content {
			if err := e.settleTimer(f); err != nil {
				return err
			}
		}
		f.open.TimerFD = &image.TimerFD{
			Clock: f.info.Clock, SetFlags: f.info.SetFlags, Ticks: f.info.Ticks,
			ValueNS: int64(f.info.Value), IntervalNS: int64(f.info.Interval),
		}
		f.what = fmt.Sprintf("timerfd of clock %d", f.info.Clock)
	case "[signalfd]":
		f.open.Kind, f.kind = image.FileSignalFD, "signalfd"
		f.open.SignalFD = f.info.SigMask
		f.what = fmt.Sprintf("signalfd of mask %#x", f.info.SigMask)
	case "inotify":
		return e.describeInotify(f)
	default:
		f.kind = strings.Trim(name, "[]")
		why, ok := anonymous[name]
		switch {
		case ok:
		case strings.HasPrefix(f.link, "net:[") || strings.Contains(f.link, ":["):
			why = "a namespace or another object of the kernel (" + f.link + ")"
		default:
			why = "of a kind that is not known here"
		}
		f.refuse("%s", why)
		return nil
	}
	return e.owner(f, -1)
}

// settleTimer lets the kernel catch up with a periodic timer that has fired and
// was not read since: only then is it known when it will fire next.
func (e *examiner) settleTimer(f *file) error {
	fd, err := e.dup(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	f.info.Ticks, f.info.Value, err = settle(fd)
	return err
}

// settle is settleTimer's work on a descriptor of this process.
func settle(fd int) (ticks uint64, value time.Duration, err error) {
	var v unix.ItimerSpec
	if err := unix.TimerfdGettime(fd, &v); err != nil {
		return 0, 0, fmt.Errorf("read timer: %w", err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return 0, 0, err
	}
	in, err := parseFDInfo(b)
	if err != nil {
		return 0, 0, err
	}
	if in.Value == 0 {
		// It has fired again between the two looks, and that is in the ticks. It
		// must not seem to be disarmed.
		return in.Ticks, in.Interval, nil
	}
	return in.Ticks, in.Value, nil
}

// owner reads who gets the signals of an asynchronous file.
func (e *examiner) owner(f *file, fd int) error {
	if fd < 0 {
		var err error
		if fd, err = e.dup(f); err != nil {
			return err
		}
		defer unix.Close(fd)
	}
	o, err := sys.GetOwner(fd)
	if err != nil {
		return fmt.Errorf("read owner: %w", err)
	}
	sig, err := unix.FcntlInt(uintptr(fd), unix.F_GETSIG, 0)
	if err != nil {
		return fmt.Errorf("read owner's signal: %w", err)
	}
	if o.PID == 0 && sig == 0 {
		if f.open.Flags&unix.O_ASYNC != 0 {
			f.note("O_ASYNC without an owner")
		}
		return nil
	}
	f.open.Owner = &image.Owner{Type: int(o.Type), Signal: sig}
	if o.PID == 0 {
		return nil
	}
	pid, ok := e.innerPID(int(o.Type), int(o.PID))
	if !ok {
		f.refuse("its signals go to process %d, which does not move along", o.PID)
		return nil
	}
	f.open.Owner.PID = pid
	return nil
}

// innerPID translates a pid that we see, which must be of this process, to its
// own pid namespace.
func (e *examiner) innerPID(kind, pid int) (int, bool) {
	switch kind {
	case sys.F_OWNER_TID, sys.F_OWNER_PID:
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", e.pid, pid))
		if err != nil {
			return 0, false
		}
		return lastOf(string(b), "NSpid:")
	case sys.F_OWNER_PGRP:
		if pgrp, err := unix.Getpgid(e.pid); err != nil || pgrp != pid {
			return 0, false
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.pid))
		if err != nil {
			return 0, false
		}
		return lastOf(string(b), "NSpgid:")
	}
	return 0, false
}

func lastOf(status, key string) (int, bool) {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			f := strings.Fields(rest)
			var n int
			if len(f) == 0 {
				return 0, false
			}
			if _, err := fmt.Sscan(f[len(f)-1], &n); err != nil {
				return 0, false
			}
			return n, n > 0
		}
	}
	return 0, false
}

// plainDevices hold no state: any open of the same number is as good.
var plainDevices = map[uint64]string{
	unix.Mkdev(1, 3): "/dev/null",
	unix.Mkdev(1, 5): "/dev/zero",
	unix.Mkdev(1, 7): "/dev/full",
	unix.Mkdev(1, 8): "/dev/random",
	unix.Mkdev(1, 9): "/dev/urandom",
}

func (e *examiner) describeDevice(f *file) {
	f.open.Kind, f.kind = image.FileDevice, "device"
	f.open.Rdev = f.st.Rdev
	f.open.Path = strings.TrimSuffix(f.link, " (deleted)")
	major, minor := unix.Major(f.st.Rdev), unix.Minor(f.st.Rdev)
	if f.st.Mode&unix.S_IFMT == unix.S_IFBLK {
		f.refuse("block device %d:%d", major, minor)
		return
	}
	if _, ok := plainDevices[f.st.Rdev]; ok {
		return
	}
	switch {
	case major == 136, major == 4, major == 5, major == 3, major == 2:
		f.kind = "tty"
		f.refuse("a terminal: start the program without one (setsid, nohup, a service) to move it")
	case major == 10 && minor == 229:
		f.refuse("a FUSE connection: the process serves a file system")
	case major == 10 && minor == 200:
		f.refuse("a network tunnel device")
	case major == 10 && minor == 126:
		f.refuse("a userfaultfd device")
	default:
		f.refuse("device %d:%d is hardware or holds state in the kernel", major, minor)
	}
}

// describePath is for what has a name in a file system.
func (e *examiner) describePath(f *file) error {
	path, deleted := strings.CutSuffix(f.link, " (deleted)")
	f.open.Path = path
	f.open.Flags &^= oTmpfile
	if f.st.Mode&unix.S_IFMT == unix.S_IFDIR && f.open.Flags&unix.O_PATH == 0 {
		f.open.Flags |= unix.O_DIRECTORY
	}
	if !filepath.IsAbs(path) {
		f.refuse("its path cannot be reached from here: %s", f.link)
		return nil
	}
	if own, rest, ok := procPath(path); ok {
		if own != e.pid {
			f.refuse("a file about another process")
			return nil
		}
		f.open.Path = "/proc/self" + rest
		return nil
	}
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	same := err == nil && st.Dev == f.st.Dev && st.Ino == f.st.Ino
	if f.st.Nlink == 0 && !same || deleted && !same {
		return e.describeDeleted(f)
	}
	var fs unix.Statfs_t
	if !same && unix.Statfs(fmt.Sprintf("/proc/%d/fd/%d", e.pid, f.nums[0]), &fs) == nil && fs.Type == mqueueMagic {
		f.refuse("a POSIX message queue")
		return nil
	}
	switch {
	case same:
	case err == nil:
		f.refuse("%s now names another file than the open one", path)
	case err == unix.ENOENT || err == unix.ENOTDIR:
		f.refuse("%s does not exist here: it lies in another mount namespace or was moved", path)
	default:
		return fmt.Errorf("look at %s: %w", path, err)
	}
	return nil
}

// mqueueMagic is MQUEUE_MAGIC of ipc/mqueue.c.
const mqueueMagic = 0x19800202

// procPath splits "/proc/PID/rest".
func procPath(path string) (pid int, rest string, ok bool) {
	s, ok := strings.CutPrefix(path, "/proc/")
	if !ok {
		return 0, "", false
	}
	digits, rest, _ := strings.Cut(s, "/")
	n := 0
	for _, c := range []byte(digits) {
		if c < '0' || c > '9' || n > 1<<22 {
			return 0, "", false
		}
		n = n*10 + int(c-'0')
	}
	if digits == "" {
		return 0, "", false
	}
	if rest != "" {
		rest = "/" + rest
	}
	return n, rest, true
}
