package appliance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// Verdict on one thing that a host offers or lacks.
type Verdict string

const (
	VerdictOK       Verdict = "ok"
	VerdictMissing  Verdict = "missing"  // and nothing moves without it
	VerdictOptional Verdict = "optional" // lacking, and some things will not work or be slower
)

// Finding is one line of the doctor's report.
type Finding struct {
	Name    string  `json:"name"`
	Verdict Verdict `json:"verdict"`
	Found   string  `json:"found"`
	Fix     string  `json:"fix,omitempty"`
}

// Diagnosis is what a host offers and lacks.
type Diagnosis struct {
	Kernel   string    `json:"kernel"`
	Machine  string    `json:"machine"`
	Ready    bool      `json:"ready"` // nothing needed is missing
	Findings []Finding `json:"findings"`
}

// Doctor looks at this host, and at the RDMA device that leads to each of the hosts to.
// It tries each thing rather than believe a version number, and leaves nothing behind.
func Doctor(ctx context.Context, to ...string) Diagnosis {
	var u unix.Utsname
	_ = unix.Uname(&u)
	d := Diagnosis{
		Kernel:  unix.ByteSliceToString(u.Release[:]),
		Machine: unix.ByteSliceToString(u.Machine[:]),
		Ready:   true,
	}
	for _, check := range []func() Finding{
		checkRoot, func() Finding { return checkMachine(d.Machine) }, func() Finding { return checkKernel(d.Kernel) },
		checkUserfaultfd, checkPagemapScan, checkTracking, checkPtrace, checkFreezer, checkPidfdGetfd, checkKcmp,
		checkTimeNamespace, checkPIDNamespace, checkSeccomp, checkMemory, checkMapCount, checkOpenFiles,
		checkFUSE, checkRDMA, checkSoftRoCE,
	} {
		d.Findings = append(d.Findings, check())
	}
	for _, host := range to {
		d.Findings = append(d.Findings, checkPath(ctx, host))
	}
	for _, p := range []struct{ program, pkg, use string }{
		{"redis-server", "redis-server", "the demo"},
		{"memcached", "memcached", "the tests"},
		{"python3", "python3", "the tests"},
		{"gcc", "gcc libc6-dev", "the tests"},
	} {
		d.Findings = append(d.Findings, checkProgram(p.program, p.pkg, p.use))
	}
	for _, f := range d.Findings {
		if f.Verdict == VerdictMissing {
			d.Ready = false
		}
	}
	return d
}

// found is ok where err is nil.
func found(name, what string, err error, otherwise Verdict, fix string) Finding {
	if err == nil {
		return Finding{Name: name, Verdict: VerdictOK, Found: what}
	}
	return Finding{Name: name, Verdict: otherwise, Found: err.Error(), Fix: fix}
}

func checkRoot() Finding {
	var err error
	if os.Geteuid() != 0 {
		err = fmt.Errorf("user %d", os.Geteuid())
	}
	return found("root", "yes", err, VerdictMissing, "run it with sudo")
}

func checkMachine(machine string) Finding {
	var err error
	if machine != "x86_64" {
		err = errors.New(machine)
	}
	return found("processor", machine, err, VerdictMissing, "only x86-64 is supported")
}

func checkKernel(release string) Finding {
	major, minor := kernelVersion(release)
	var err error
	if major < 5 || (major == 5 && minor < 14) {
		err = errors.New(release)
	}
	return found("kernel", release, err, VerdictMissing, "Linux 5.14 or later is needed; Debian 12 has 6.1")
}

func kernelVersion(release string) (major, minor int) {
	_, _ = fmt.Sscanf(release, "%d.%d", &major, &minor)
	return major, minor
}

func checkUserfaultfd() Finding {
	fd, err := sys.Userfaultfd(unix.O_CLOEXEC | unix.O_NONBLOCK)
	if err == nil {
		defer unix.Close(fd)
		var offered uint64
		const want = sys.UffdFeatureEventFork | sys.UffdFeatureEventRemap | sys.UffdFeatureEventRemove |
			sys.UffdFeatureEventUnmap | sys.UffdFeatureMissingShmem
		if offered, _, err = sys.UffdAPI(fd, 0); err == nil && offered&want != want {
			err = fmt.Errorf("lacks features %#x", want&^offered)
		}
	}
	return found("userfaultfd", "yes, with fork, remap, remove and unmap events", err, VerdictMissing,
		"a kernel with CONFIG_USERFAULTFD, and root")
}

func checkPagemapScan() Finding {
	f, err := os.Open("/proc/self/pagemap")
	if err == nil {
		defer f.Close()
		arg := sys.PMScanArg{ReturnMask: sys.PageIsPresent, CategoryAnyof: sys.PageIsPresent, Start: 0, End: page.Size, MaxPages: 1}
		_, err = sys.PagemapScan(int(f.Fd()), &arg, make([]sys.PageRegion, 1))
	}
	return found("PAGEMAP_SCAN", "yes", err, VerdictOptional,
		"Linux 6.7 or later; without it pages are found through /proc/PID/pagemap, slower")
}

func checkTracking() Finding { return tracking(dirty.Probe()) }

// tracking names the method by which written pages are found, the first of tried
// that works, and what the better ones lack.
func tracking(tried []dirty.Support) Finding {
	var lacking []string
	for _, s := range tried {
		if s.Err != nil {
			lacking = append(lacking, fmt.Sprintf("%s: %v", s.Method, s.Err))
			continue
		}
		f := Finding{Name: "dirty tracking", Verdict: VerdictOK, Found: string(s.Method)}
		if len(lacking) > 0 {
			f.Verdict = VerdictOptional
			f.Found += ", not " + strings.Join(lacking, ", nor ")
			f.Fix = trackingFix[s.Method]
		}
		return f
	}
	return Finding{Name: "dirty tracking", Verdict: VerdictOptional, Found: strings.Join(lacking, ", "),
		Fix: "migrate with --mode postcopy or stop"}
}

// trackingFix says what the methods cost that are not the best.
var trackingFix = map[dirty.Method]string{
	dirty.SoftDirty: "Linux 6.7 or later with CONFIG_USERFAULTFD; with soft-dirty a process stands still for some milliseconds in each round",
	dirty.Hash:      "Linux 6.7 or later with CONFIG_USERFAULTFD; until then all memory is read again in each round, also in the last one, while the process stands still",
}

func checkPtrace() Finding {
	scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope")
	switch s := strings.TrimSpace(string(scope)); {
	case err != nil:
		return Finding{Name: "ptrace", Verdict: VerdictOK, Found: "not restricted"}
	case s == "3":
		return Finding{Name: "ptrace", Verdict: VerdictMissing, Found: "kernel.yama.ptrace_scope is 3: forbidden until the next boot",
			Fix: "set kernel.yama.ptrace_scope to 2 or less in /etc/sysctl.d and reboot"}
	default:
		return Finding{Name: "ptrace", Verdict: VerdictOK, Found: "kernel.yama.ptrace_scope is " + s + ", which root may pass"}
	}
}

func checkFreezer() Finding {
	root, err := cgroup.Root()
	if err == nil {
		// The root has no cgroup.freeze; every child has (cgroup-v2.rst).
		try := filepath.Join(root.Dir(), fmt.Sprintf("pageferry-doctor-%d", os.Getpid()))
		if err = os.Mkdir(try, 0o755); err == nil {
			_, err = os.Stat(filepath.Join(try, "cgroup.freeze"))
			_ = os.Remove(try)
		}
	}
	return found("cgroup v2 freezer", "yes, at "+root.Dir(), err, VerdictMissing,
		"boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2 none /sys/fs/cgroup/unified")
}

func checkPidfdGetfd() Finding {
	pfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err == nil {
		defer unix.Close(pfd)
		var fd int
		if fd, err = unix.PidfdGetfd(pfd, pfd, 0); err == nil {
			unix.Close(fd)
		}
	}
	return found("pidfd_getfd", "yes", err, VerdictMissing, "Linux 5.6 or later")
}

func checkKcmp() Finding {
	const kcmpVM = 1 // <linux/kcmp.h>
	_, err := sys.Kcmp(os.Getpid(), os.Getpid(), kcmpVM, 0, 0)
	return found("kcmp", "yes", err, VerdictMissing, "a kernel with CONFIG_KCMP")
}

func checkTimeNamespace() Finding {
	_, err := os.Stat("/proc/self/ns/time")
	return found("time namespaces", "yes", err, VerdictOptional,
		"a kernel with CONFIG_TIME_NS; without it a process that uses the monotonic clock sees it jump")
}

func checkPIDNamespace() Finding {
	_, err := os.Stat("/proc/self/ns/pid")
	return found("pid namespaces", "yes", err, VerdictOptional,
		"a kernel with CONFIG_PID_NS; without it a process whose pid is taken cannot arrive")
}

func checkSeccomp() Finding {
	data, err := os.ReadFile("/proc/self/status")
	if err == nil && !strings.Contains(string(data), "Seccomp:\t0") && strings.Contains(string(data), "Seccomp:") {
		err = errors.New("this shell runs under a seccomp filter, which the daemon would inherit")
	}
	return found("seccomp", "no filter", err, VerdictOptional, "start the daemon from outside the container, or with seccomp=unconfined")
}

func checkMemory() Finding {
	free, err := availableMemory()
	if err == nil && free < 512<<20 {
		err = fmt.Errorf("%s available", mib(free))
	}
	return found("memory", mib(free)+" available", err, VerdictOptional, "free some: an arriving process needs its own size, and 96 MiB more")
}

func checkMapCount() Finding {
	n, err := readNumber("/proc/sys/vm/max_map_count")
	if err == nil && n < 65530 {
		err = fmt.Errorf("vm.max_map_count is %d", n)
	}
	return found("mappings", fmt.Sprintf("vm.max_map_count is %d", n), err, VerdictOptional,
		"sysctl vm.max_map_count=262144: a process may have as many mappings as at its source")
}

func checkOpenFiles() Finding {
	var l unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l)
	if err == nil && l.Max < 4096 {
		err = fmt.Errorf("at most %d", l.Max)
	}
	return found("open files", "at most "+strconv.FormatUint(l.Max, 10), err, VerdictOptional, "ulimit -n 65536, or LimitNOFILE= in the unit")
}

func checkFUSE() Finding {
	err, takeOver := fusemem.Probe()
	fix := "modprobe fuse"
	if err == nil && takeOver != nil {
		err, fix = takeOver, "Linux 6.9 or later"
	}
	return found("FUSE", "yes, and a mount outlives who serves it", err, VerdictOptional,
		fix+"; without it the files of a process must be on both hosts, and its memory is not shown as one")
}

func checkProgram(program, pkg, use string) Finding {
	path, err := exec.LookPath(program)
	if err != nil {
		err = errors.New("not installed")
	}
	return found(program, path, err, VerdictOptional, "apt install "+pkg+"; only "+use+" needs it")
}
