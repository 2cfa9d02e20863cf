package appliance

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/migrate"
)

func testAdmission() (*admission, migrate.Offer) {
	a := newAdmission(HostFacts{Machine: "x86_64", PageSize: 4096, XFeatures: 0xe7, XSize: 2696,
		Abilities: []string{"userfaultfd", "pidfd-getfd", "cgroup-freezer"},
		Missing:   map[string]string{"time-namespace": "needs CONFIG_TIME_NS", "fuse": "no module"}}, Config{Limits: Limits{Incoming: 2, MemoryReserve: 1 << 30}})
	a.memory = func() (uint64, error) { return 4 << 30, nil }
	a.pidBusy = func(pid int) bool { return pid == 77 }
	a.hasAddress = func(ip netip.Addr) bool { return ip == netip.MustParseAddr("10.0.0.1") }
	a.portFree = func(_ string, ap netip.AddrPort) error {
		if ap.Port() == 6379 {
			return unix.EADDRINUSE
		}
		return nil
	}
	return a, migrate.Offer{Mode: migrate.ModePostCopy, Machine: "x86_64", PageSize: 4096, XFeatures: 0x7, XSize: 2696,
		MemoryBytes: 1 << 30, PID: 42, Listeners: []string{"tcp 0.0.0.0:80", "udp 10.0.0.1:53"}, Directories: []string{"/"}}
}

func TestAdmissionNamesEachReason(t *testing.T) {
	a, good := testAdmission()
	if err := a.check(good); err != nil {
		t.Fatalf("what can be taken is refused: %v", err)
	}
	for _, c := range []struct {
		name string
		edit func(*migrate.Offer)
		want string
	}{
		{"mode", func(o *migrate.Offer) { o.Mode = "precpy" }, `mode "precpy"`},
		{"page size", func(o *migrate.Offer) { o.PageSize = 65536 }, "65536"},
		{"machine", func(o *migrate.Offer) { o.Machine = "aarch64" }, "aarch64"},
		{"xfeatures", func(o *migrate.Offer) { o.XFeatures |= 1 << 18 }, "AMX tiles"},
		{"xsize", func(o *migrate.Offer) { o.XSize = 832 }, "832"},
		{"ability", func(o *migrate.Offer) { o.Requires = []string{"time-namespace"} }, "CONFIG_TIME_NS"},
		{"unknown ability", func(o *migrate.Offer) { o.Requires = []string{"levitation"} }, "levitation"},
		{"plain", func(o *migrate.Offer) { o.PlainPages = true }, "page_lanes"},
		{"trap", func(o *migrate.Offer) { o.Trap = "fuse" }, "fuse"},
		{"memory", func(o *migrate.Offer) { o.MemoryBytes = 3 << 30 }, "4.0 GiB are free"},
		{"overflow", func(o *migrate.Offer) { o.MemoryBytes = math.MaxUint64 - arrivalOverhead }, "are free"},
		{"address", func(o *migrate.Offer) { o.Listeners = []string{"tcp 10.9.9.9:80"} }, "--address 10.9.9.9=NEW"},
		{"new address", func(o *migrate.Offer) {
			o.Listeners, o.Addresses = []string{"tcp 10.0.0.1:80"}, map[string]string{"10.0.0.1": "10.9.9.9"}
		}, "10.9.9.9:80"},
		{"no address", func(o *migrate.Offer) {
			o.Listeners, o.Addresses = []string{"tcp 10.0.0.1:80"}, map[string]string{"10.0.0.1": "here"}
		}, "no address"},
		{"port there", func(o *migrate.Offer) {
			o.Listeners, o.Addresses = []string{"tcp 10.9.9.9:6379"}, map[string]string{"10.9.9.9": "10.0.0.1"}
		}, "10.0.0.1:6379, which is taken"},
		{"port", func(o *migrate.Offer) { o.Listeners = []string{"tcp [::]:6379"} }, "taken"},
		{"nonsense", func(o *migrate.Offer) { o.Listeners = []string{"tcp"} }, "not understood"},
		{"file", func(o *migrate.Offer) { o.Files = []string{"/no/such/file"} }, "/no/such/file"},
		{"file is a directory", func(o *migrate.Offer) { o.Files = []string{"/"} }, "directory here"},
		{"mapped file", func(o *migrate.Offer) { o.MappedFiles = []string{"/no/such/library"} }, "had FUSE: no module"},
		{"directory", func(o *migrate.Offer) { o.Directories = []string{"/dev/null"} }, "no directory here"},
		{"pid", func(o *migrate.Offer) { o.PIDNamespace, o.PID = "host", 77 }, "77 is taken"},
		{"pidns", func(o *migrate.Offer) { o.PIDNamespace = "x" }, `"x"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := good
			c.edit(&o)
			err := a.check(o)
			var r *migrate.Refusal
			if !errors.As(err, &r) || len(r.Reasons) != 1 || !strings.Contains(r.Reasons[0], c.want) {
				t.Errorf("got %v, want one reason with %q", err, c.want)
			}
		})
	}
	mapped := good
	mapped.Listeners, mapped.Addresses = []string{"tcp 10.9.9.9:80"}, map[string]string{"10.9.9.9": "10.0.0.1"}
	if err := a.check(mapped); err != nil {
		t.Errorf("refused over the address that its listener has at the source: %v", err)
	}
	a.mapsFiles = true
	lacking := good
	lacking.MappedFiles = []string{"/no/such/library"}
	if err := a.check(lacking); err != nil {
		t.Errorf("refused over a file that the source can give: %v", err)
	}
	lacking.MappedBytes = []uint64{3 << 30, 1 << 60}
	if err := a.check(lacking); err == nil || !strings.Contains(err.Error(), "3.0 GiB of that for files") {
		t.Errorf("files that are not here, and no memory for them: %v", err)
	}
	lacking.MappedFiles[0] = "/proc/self/exe"
	if err := a.check(lacking); err != nil {
		t.Errorf("refused for the size of a file that is here: %v", err)
	}
	lacking.MappedFiles[0], a.keepsFiles = "/no/such/library", true
	if err := a.check(lacking); err != nil {
		t.Errorf("refused for the size of a file that is kept on the disk: %v", err)
	}
	a.keepsFiles = false
	lacking.MappedBytes, lacking.Trap = nil, "uffd"
	if err := a.check(lacking); err == nil || !strings.Contains(err.Error(), "/no/such/library") || !strings.Contains(err.Error(), "--trap auto") {
		t.Errorf("a file that is missing, and is not to be had from the source: %v", err)
	}
	a.mapsFiles = false
	a.claimed = func() uint64 { return 5 << 29 }
	if a.check(good) == nil {
		t.Error("memory that is promised to another is given away")
	}
	a.claimed, a.running = func() uint64 { return 0 }, func() int { return 2 }
	if err := a.check(good); err == nil || !strings.Contains(err.Error(), "limits.incoming") {
		t.Errorf("above the limit: %v", err)
	}
	bad := good
	bad.Machine, bad.PageSize = "x", 1
	var r *migrate.Refusal
	if err := a.check(bad); !errors.As(err, &r) || len(r.Reasons) != 3 {
		t.Errorf("want all three reasons at once: %v", err)
	}
}

func TestPortFree(t *testing.T) {
	l, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	if err := errors.Join(unix.Bind(l, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(l, 1)); err != nil {
		t.Fatal(err)
	}
	sa, err := unix.Getsockname(l)
	if err != nil {
		t.Fatal(err)
	}
	ap := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(sa.(*unix.SockaddrInet4).Port))
	if portFree("tcp", ap) == nil {
		t.Error("a port that somebody listens on is free")
	}
	if err := portFree("udp", ap); err != nil {
		t.Errorf("UDP is not TCP: %v", err)
	}
	unix.Close(l)
	if err := portFree("tcp", ap); err != nil {
		t.Errorf("the port that nobody listens on any more: %v", err)
	}
}

func TestCgroupHeadroom(t *testing.T) {
	dir := t.TempDir()
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	put("self", "4:memory:/x\n0::/a/b\n")
	put("cg/a/b/memory.max", "max\n")
	put("cg/a/b/memory.current", "5\n")
	put("cg/a/memory.max", "1000\n")
	put("cg/a/memory.current", "400\n")
	if got := cgroupHeadroom(filepath.Join(dir, "self"), []string{filepath.Join(dir, "cg")}); got != 600 {
		t.Errorf("got %d, want what is left in the parent", got)
	}
	put("cg/a/memory.current", "1400\n")
	if got := cgroupHeadroom(filepath.Join(dir, "self"), []string{filepath.Join(dir, "cg")}); got != 0 {
		t.Errorf("above its limit: %d", got)
	}
	if got := cgroupHeadroom(filepath.Join(dir, "none"), nil); got != math.MaxUint64 {
		t.Errorf("no cgroup: %d", got)
	}
	if _, err := availableMemory(); err != nil {
		t.Error(err)
	}
	if got := fmt.Sprint(mib(3<<29), mib(5<<20)); got != "1.5 GiB5 MiB" && got != "1.5 GiB 5 MiB" {
		t.Error(got)
	}
}
