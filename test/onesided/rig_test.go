package onesided_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
)

// The ends of vmtest.Pair.
const (
	nearAddr = "10.77.0.1"
	farAddr  = "10.77.0.2"
)

// rig is two devices with a lane between them: source lends itself to processes,
// and lane reads from the other.
type rig struct {
	t      testing.TB
	source *rdma.Device
	lane   *rdma.Lane
	pool   *transport.Pool
}

func newRig(t testing.TB) *rig {
	t.Helper()
	noResources(t)
	r := &rig{t: t, source: open(t, farAddr)}
	var err error
	if r.pool, err = transport.NewPool(64, pieceBytes); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.pool.Close(); err != nil {
			t.Error(err)
		}
	})
	other := open(t, nearAddr)
	id := transport.LaneID{Epoch: 1, Kind: transport.Bulk}
	over, over2 := transporttest.NewPair(id, nil, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	errs := make(chan error, 1)
	var peer *rdma.Lane
	go func() {
		var err error
		peer, err = rdma.Connect(ctx, over2, rdma.Config{Device: r.source, Pool: r.pool})
		errs <- err
	}()
	r.lane, err = rdma.Connect(ctx, over, rdma.Config{Device: other, Pool: r.pool})
	if err := errors.Join(err, <-errs); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.lane.Close(); peer.Close() })
	return r
}

const pieceBytes = 256 << 10

func open(t testing.TB, peer string) *rdma.Device {
	t.Helper()
	p, err := rdma.Find(netip.MustParseAddr(peer))
	if err != nil {
		t.Fatal(err)
	}
	d, err := rdma.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("close %s: %v", p.Device, err)
		}
	})
	return d
}

// adopt makes regions of what was registered.
func (r *rig) adopt(reg checkpoint.Registration) (out []*rdma.Region) {
	r.t.Helper()
	for _, e := range reg.Regions {
		g, err := r.source.Adopt(e.Range, e.Handle, e.Key)
		if err != nil {
			r.t.Fatal(err)
		}
		out = append(out, g)
	}
	return out
}

// compare reads all regions from the other device and compares them with what want
// says, and returns how many bytes that were.
func (r *rig) compare(reg checkpoint.Registration, want func(rg page.Range, buf []byte) error) (n int) {
	r.t.Helper()
	direct := make([]byte, pieceBytes)
	for _, e := range reg.Regions {
		for at := e.Start; at < e.End; {
			piece := page.Range{Start: at, End: min(e.End, at+pieceBytes)}
			b := r.pool.Get(int(piece.Bytes()), nil)
			err := r.lane.ReadRemote(r.t.Context(), e.Key, uint64(at), b)
			if err == nil {
				err = want(piece, direct[:piece.Bytes()])
			}
			if err != nil {
				b.Release()
				r.t.Fatalf("%v: %v", piece, err)
			}
			if !bytes.Equal(b.Bytes(), direct[:piece.Bytes()]) {
				r.t.Errorf("%v differs from what process_vm_readv says", piece)
			}
			b.Release()
			n += int(piece.Bytes())
			at = piece.End
		}
	}
	return n
}

func readOf(s *checkpoint.Session) func(rg page.Range, buf []byte) error {
	return func(rg page.Range, buf []byte) error { return s.ReadPages(0, []page.Range{rg}, buf) }
}

// resources is what the kernel has of device's objects.
func resources(t testing.TB, device string) map[string]uint64 {
	t.Helper()
	list, err := netlink.RdmaResourceList()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list {
		if r.Name == device {
			return r.RdmaResourceSummaryEntries
		}
	}
	t.Fatalf("no device %s", device)
	return nil
}

// noResources fails the test when it leaves an object on either device.
func noResources(t testing.TB) {
	t.Helper()
	for _, peer := range []string{nearAddr, farAddr} {
		p, err := rdma.Find(netip.MustParseAddr(peer))
		if err != nil {
			t.Fatal(err)
		}
		before := fmt.Sprint(resources(t, p.Device))
		t.Cleanup(func() {
			testutil.Eventually(t, 5*time.Second, func() error {
				if now := fmt.Sprint(resources(t, p.Device)); now != before {
					return fmt.Errorf("%s has %s, it had %s", p.Device, now, before)
				}
				return nil
			})
		})
	}
}

// program is test/programs/pinned.
type program struct {
	*testutil.Process
	t     testing.TB
	areas map[string]page.Range
	asked int
}

func pinned(t testing.TB) string { return testutil.CC(t, "pinned") }

func startPinned(t testing.TB, as *syscall.Credential, args ...string) *program {
	t.Helper()
	// By its path nobody else may reach it.
	f, err := os.Open(pinned(t))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("/proc/self/fd/3", args...)
	cmd.ExtraFiles = []*os.File{f}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	p := &program{testutil.StartCmd(t, cmd, testutil.DefaultLimit), t, map[string]page.Range{}, 0}
	p.WaitText("ready\n", 20*time.Second)
	for line := range strings.Lines(p.Text()) {
		var name string
		var at, n uint64
		if k, _ := fmt.Sscanf(line, "%s %x %d", &name, &at, &n); k == 3 {
			p.areas[name] = page.Range{Start: page.Addr(at), End: page.Addr(at + n)}
		}
	}
	return p
}

// verify has the program look at all that it has.
func (p *program) verify() {
	p.t.Helper()
	p.asked++
	p.Signal(unix.SIGUSR1)
	testutil.Eventually(p.t, 30*time.Second, func() error {
		if !strings.Contains(p.Text(), fmt.Sprintf("ok %d\n", p.asked)) {
			return fmt.Errorf("the program says:\n%s", p.Text())
		}
		return nil
	})
}

// freeze opens the process and stops it.
func freeze(t testing.TB, pid int) *checkpoint.Session {
	t.Helper()
	s, err := checkpoint.Open(pid, checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := s.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

// status is a line of /proc/PID/status.
func status(t testing.TB, pid int, key string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if k, v, _ := strings.Cut(line, ":"); k == key {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s in the status of process %d", key, pid)
	return ""
}

func kilobytes(t testing.TB, pid int, key string) (n int) {
	t.Helper()
	fmt.Sscan(status(t, pid, key), &n)
	return n
}

// outside is what others see of a process: descriptors, mappings, limits, masks.
func outside(t testing.TB, pid int) string {
	t.Helper()
	var b strings.Builder
	for _, name := range []string{"maps", "limits"} {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		b.Write(text)
	}
	fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, f := range fds {
		to, _ := os.Readlink(f)
		fmt.Fprintln(&b, filepath.Base(f), to)
	}
	for _, key := range []string{"VmPin", "VmLck", "SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Threads"} {
		fmt.Fprintln(&b, key, status(t, pid, key))
	}
	return b.String()
}
