package rdma

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport"
)

const nobodyEnv = "PAGEFERRY_RDMA_NOBODY"

// TestGuestNobody is the body of testRights, as a user without rights.
func TestGuestNobody(t *testing.T) {
	what := os.Getenv(nobodyEnv)
	if what == "" {
		return
	}
	p, err := Find(netip.MustParseAddr(farAddr)) // needs no rights
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(p)
	if what == "open" {
		if !errors.Is(err, syscall.EACCES) || !strings.Contains(err.Error(), "/dev/infiniband") {
			t.Errorf("open: %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	pool, err := transport.NewPool(16, 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.use(pool); !errors.Is(err, syscall.ENOMEM) || !strings.Contains(err.Error(), "ulimit -l") {
		t.Errorf("register 1 MiB: %v", err)
	}
	if err := errors.Join(d.Close(), pool.Close()); err != nil {
		t.Error(err)
	}
}

// testRights: without the right to the device, or to lock so much memory, the
// error says which it is.
func testRights(t *testing.T) {
	testutil.Require(t, twoDevices)
	noResources(t)
	p, err := Find(netip.MustParseAddr(farAddr))
	if err != nil {
		t.Fatal(err)
	}
	node := uverbsOf(p.Device)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 256 << 10, Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	defer unix.Setrlimit(unix.RLIMIT_MEMLOCK, &old)
	for what, mode := range map[string]os.FileMode{"lock": 0o666, "open": 0o600} {
		t.Run(what, func(t *testing.T) {
			if err := os.Chmod(node, mode); err != nil {
				t.Fatal(err)
			}
			defer os.Chmod(node, 0o666)
			cmd := exec.Command("/proc/self/exe", "-test.run=^TestGuestNobody$") // by its path nobody else may reach it
			cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s", nobodyEnv, what), "PAGEFERRY_LEDGER=")
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
