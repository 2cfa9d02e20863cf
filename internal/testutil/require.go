package testutil

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Requirement is something that a test needs of the host. Compare by Name.
type Requirement struct {
	// Name says what is needed.
	Name string
	// Check returns nil if the host has it, else why not and how to get it.
	// It is called once per test binary and Name.
	Check func() error
}

var checked sync.Map // name -> error or nil, as a *error

// Require ends the test as skipped if the host lacks something it needs. With
// PAGEFERRY_REQUIRE_ALL=1 it fails instead. Call it before anything else.
func Require(t testing.TB, needs ...Requirement) {
	t.Helper()
	for _, n := range needs {
		v, ok := checked.Load(n.Name)
		if !ok {
			err := n.Check()
			v, _ = checked.LoadOrStore(n.Name, &err)
		}
		err := *v.(*error)
		if err == nil {
			continue
		}
		reason := fmt.Sprintf("needs %s: %v", n.Name, err)
		record(Entry{Test: testName(t), Skipped: true, Reason: reason})
		if os.Getenv(envRequireAll) == "1" {
			t.Fatalf("%s (skips are failures, because %s=1)", reason, envRequireAll)
		}
		t.Skip(reason)
	}
	record(Entry{Test: testName(t)})
}

// testName is the test's name, with its package where that can be told.
func testName(t testing.TB) string {
	exe := filepath.Base(os.Args[0])
	return strings.TrimSuffix(exe, ".test") + "." + t.Name()
}

// Root is an effective uid of 0 with CAP_SYS_ADMIN and CAP_SYS_PTRACE.
var Root = Requirement{"root", func() error {
	if os.Geteuid() != 0 {
		return errors.New("run the tests as root (sudo -E make test)")
	}
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	var eff uint64
	for line := range strings.Lines(string(b)) {
		if s, ok := strings.CutPrefix(line, "CapEff:"); ok {
			if _, err := fmt.Sscanf(strings.TrimSpace(s), "%x", &eff); err != nil {
				return err
			}
		}
	}
	for _, c := range []int{unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE} {
		if eff>>c&1 == 0 {
			return fmt.Errorf("capability %d is missing (a container? give it --privileged)", c)
		}
	}
	return nil
}}

// Userfaultfd is a kernel with userfaultfd(2), and the right to trap faults of
// the kernel itself with it.
var Userfaultfd = Requirement{"userfaultfd", func() error {
	// The file is there exactly where the system call is (kernel 5.2).
	if _, err := os.Stat("/proc/sys/vm/unprivileged_userfaultfd"); err != nil {
		return fmt.Errorf("kernel without CONFIG_USERFAULTFD: %w", err)
	}
	return Root.Check()
}}

// FUSE is a /dev/fuse that can be opened.
var FUSE = Requirement{"FUSE", func() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/fuse: %w (modprobe fuse)", err)
	}
	return unix.Close(fd)
}}

// CgroupV2 is a writable cgroup v2 tree with the freezer; see [CgroupRoot].
var CgroupV2 = Requirement{"cgroup v2", func() error {
	root, err := cgroupRoot()
	if err != nil {
		return err
	}
	return unix.Access(root, unix.W_OK)
}}

// Namespaces is the right to make network, pid, mount, IPC and UTS namespaces.
var Namespaces = Requirement{"namespaces", func() error {
	for _, ns := range []string{"net", "pid", "mnt", "ipc", "uts", "time"} {
		if _, err := os.Stat("/proc/self/ns/" + ns); err != nil {
			return fmt.Errorf("kernel without %s namespaces: %w", ns, err)
		}
	}
	return Root.Check()
}}

// AMD64 is a 64-bit x86 processor.
var AMD64 = Requirement{"x86-64", func() error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("this is %s", runtime.GOARCH)
	}
	return nil
}}

// Program is an executable of that name in PATH, or where system programs live.
func Program(name string) Requirement {
	return Requirement{"program " + name, func() error {
		_, err := lookPath(name)
		return err
	}}
}

// lookPath is exec.LookPath that also knows the sbin directories, which sudo
// and su leave out of PATH on some systems.
func lookPath(name string) (string, error) {
	p, err := exec.LookPath(name)
	if err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%s is not installed (make test installs it): %w", name, err)
}

// Memory is that many bytes of available memory.
func Memory(bytes uint64) Requirement {
	return Requirement{fmt.Sprintf("%d MiB of memory", bytes>>20), func() error {
		b, err := os.ReadFile("/proc/meminfo")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(b)) {
			var kib uint64
			if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 {
				if kib<<10 < bytes {
					return fmt.Errorf("only %d MiB are available", kib>>10)
				}
				return nil
			}
		}
		return errors.New("/proc/meminfo has no MemAvailable")
	}}
}

// CgroupRoot is where the cgroup v2 tree is mounted. It needs [CgroupV2].
func CgroupRoot(t testing.TB) string {
	t.Helper()
	root, err := cgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func cgroupRoot() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("no cgroup v2 tree at /sys/fs/cgroup or /sys/fs/cgroup/unified")
}
