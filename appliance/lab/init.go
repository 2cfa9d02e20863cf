package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// initArg0 is how this program knows that it is the init of a host.
const (
	initArg0  = "pageferry-lab-host"
	initReady = "ready"
)

// hostSetup is what a host's init is told, as JSON in its argument.
type hostSetup struct {
	Hostname string `json:"hostname"`
}

// The first thread, which is the init's face to others (/proc/PID), is the one that leaves
// its cgroup namespace and mounts: unshare(2) is of one thread.
func init() {
	if isInit() {
		runtime.LockOSThread()
	}
}

func isInit() bool { return len(os.Args) == 2 && os.Args[0] == initArg0 }

// Main returns at once in any process but the init of a host, which it is, and
// which never returns. Call it before anything else.
func Main() {
	if !isInit() {
		return
	}
	before := map[string]bool{}
	for dev := range mountedFUSE() {
		before[dev] = true
	}
	ready := os.NewFile(4, "ready")
	if err := setUp(os.Args[1]); err != nil {
		fmt.Fprintln(ready, err)
		os.Exit(1)
	}
	fmt.Fprintln(ready, initReady)
	ready.Close()
	os.Exit(reap(os.NewFile(3, "hold"), before))
}

// setUp turns the new namespaces into a host.
func setUp(arg string) error {
	var s hostSetup
	if err := json.Unmarshal([]byte(arg), &s); err != nil {
		return err
	}
	// The cgroup namespace's root is the cgroup at the time of unshare, and
	// clone(2) would make the namespace before it enters the cgroup.
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		fs, target string
		flags      uintptr
		data       string
	}{
		{"proc", "/proc", safe, ""},
		{"sysfs", "/sys", safe, ""},
		{"cgroup2", "/sys/fs/cgroup", safe, ""},
		{"tmpfs", "/run", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"tmpfs", "/var/lib", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		err := unix.Mount(m.fs, m.target, m.fs, m.flags, m.data)
		if err == unix.EBUSY { // the very same, where the network is shared
			_ = unix.Unmount(m.target, unix.MNT_DETACH)
			err = unix.Mount(m.fs, m.target, m.fs, m.flags, m.data)
		}
		if err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fs, m.target, err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

// reap is what an init does until hold ends. before are the FUSE file systems that it has
// found.
func reap(hold *os.File, before map[string]bool) int {
	// A process that somebody stops or interrupts by name is not this one.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	end := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, hold)
		close(end)
	}()
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 && !errors.Is(err, unix.EINTR) {
				break
			}
		}
		select {
		case <-child:
		case <-end:
			abortFUSE(before)
			return 0
		}
	}
}

// abortFUSE kills all processes of the host, and then aborts what they have mounted: one
// that waits for a file of a mount whose server was killed with it could not end, and nor
// could the init then. To abort is for all mount namespaces: what was there before the host
// is somebody else's.
func abortFUSE(before map[string]bool) {
	_ = unix.Kill(-1, unix.SIGKILL)
	for dev, at := range mountedFUSE() {
		if !before[dev] {
			_ = unix.Unmount(at, unix.MNT_FORCE) // busy or not
		}
	}
}

// mountedFUSE yields the devices of FUSE file systems, and where those are mounted
// (proc_pid_mountinfo(5)).
func mountedFUSE() iter.Seq2[string, string] {
	return func(yield func(dev, at string) bool) {
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			i := slices.Index(f, "-")
			if i < 5 || len(f) <= i+1 || f[i+1] != "fuse" && !strings.HasPrefix(f[i+1], "fuse.") {
				continue
			}
			if !yield(f[2], f[4]) {
				return
			}
		}
	}
}
