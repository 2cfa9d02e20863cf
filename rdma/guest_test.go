package rdma

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/transport/transporttest"
	"github.com/pageferry/pageferry/wire"
)

// The two ends of a wire between two network devices of this host, each with an
// RDMA device: vmtest.Pair.
const (
	nearAddr = "10.77.0.1"
	farAddr  = "10.77.0.2"
	nearIPv6 = "fd00:77::1"
	farIPv6  = "fd00:77::2"
)

// TestInGuest runs on two soft-RoCE devices, whatever this host has.
func TestInGuest(t *testing.T) {
	testutil.NoLeaks(t)
	vmtest.Run(t, 12*time.Minute, func(t *testing.T) {
		vmtest.Pair(t)
		for _, c := range []struct {
			name string
			test func(t *testing.T)
		}{
			{"Lane", testLane},
			{"Soft", testSoft},
			{"ReadRemote", testReadRemote},
			{"ForeignMemory", testForeignMemory},
			{"Refused", testRefused},
			{"Killed", testKilled},
			{"DeviceGone", testDeviceGone},
			{"Rights", testRights},
			{"Lossy", testLossy},
			{"IPv6", testIPv6},
			{"LaneIPv6", func(t *testing.T) { laneBetween(t, nearIPv6, farIPv6) }},
		} {
			t.Run(c.name, c.test)
		}
	})
}

// twoDevices is the guest: rxe devices need the first network namespace, so both
// ends are in it.
var twoDevices = testutil.Requirement{Name: "two RDMA devices over one wire", Check: func() error {
	for _, a := range []string{nearAddr, farAddr} {
		if _, err := Find(netip.MustParseAddr(a)); err != nil {
			return err
		}
	}
	return nil
}}

func open(t testing.TB, peer string) *Device {
	t.Helper()
	p, err := Find(netip.MustParseAddr(peer))
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(p)
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

// connected makes two lanes over a pair in memory.
func connected(t testing.TB, id transport.LaneID, a, b Config) (x, y *Lane) {
	t.Helper()
	over, over2 := transporttest.NewPair(id, nil, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	errs := make(chan error, 1)
	go func() {
		var err error
		y, err = Connect(ctx, over2, b)
		errs <- err
	}()
	x, err := Connect(ctx, over, a)
	if err := errors.Join(err, <-errs); err != nil {
		t.Fatal(err)
	}
	return x, y
}

// resources is what the kernel has of device's objects, as "rdma resource" shows.
func resources(t testing.TB, device string) string {
	t.Helper()
	list, err := netlink.RdmaResourceList()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range list {
		if r.Name == device {
			return fmt.Sprint(r.RdmaResourceSummaryEntries)
		}
	}
	return ""
}

// noResources fails the test when it leaves an object on either device. Call it
// before anything is opened.
func noResources(t testing.TB) {
	for _, peer := range []string{nearAddr, farAddr} {
		p, err := Find(netip.MustParseAddr(peer))
		if err != nil {
			t.Fatal(err)
		}
		before := resources(t, p.Device)
		t.Cleanup(func() {
			testutil.Eventually(t, 5*time.Second, func() error {
				if now := resources(t, p.Device); now != before {
					return fmt.Errorf("%s has %s, it had %s", p.Device, now, before)
				}
				return nil
			})
		})
	}
}

func testLane(t *testing.T) { laneBetween(t, nearAddr, farAddr) }

// laneBetween is the conformance suite over lanes between two addresses of the pair.
func laneBetween(t *testing.T, near, far string) {
	testutil.Require(t, twoDevices)
	transporttest.Patience(3 * time.Minute) // emulated, and the host may be at other tests
	transporttest.Run(t, func(t *testing.T, id transport.LaneID, poolA, poolB *transport.Pool) *transporttest.Pair {
		noResources(t)
		a := Config{Device: open(t, far), Pool: poolA}
		b := Config{Device: open(t, near), Pool: poolB}
		x, y := connected(t, id, a, b)
		return &transporttest.Pair{
			A: x, B: y,
			Raw:   x.sendRaw,
			Die:   func() { die(x) },
			Stall: func() { stall(t, a.Device, b.Device) }, StallBound: 15 * time.Second,
		}
	})
}

// sendRaw puts b, of frames that may be damaged or cut off, into the stream.
func (l *Lane) sendRaw(b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := writer{l: l}
	for len(b) > 0 {
		head, payload := len(b), 0
		if h, err := wire.ParseHeader(b[:min(len(b), wire.HeaderSize)]); err == nil {
			head = min(head, wire.HeaderSize+int(h.MetaLen))
			payload = min(len(b)-head, int(h.PayloadLen))
		}
		w.write(b[:head])
		if payload > 0 && (w.b != nil || w.begin()) {
			w.in++
			w.write(b[head : head+payload])
		}
		b = b[head+payload:]
	}
	w.finish()
	return w.err
}

// die ends l without a goodbye.
func die(l *Lane) {
	l.mu.Lock()
	l.fail(errors.New("died"))
	l.mu.Unlock()
}

// stall makes the wire lose everything, for the rest of the test.
func stall(t testing.TB, devices ...*Device) {
	for _, d := range devices {
		link, err := netlink.LinkByName(d.Path().Netdev)
		if err != nil {
			t.Fatal(err)
		}
		lossy := netlink.NewNetem(netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
			netlink.NetemQdiscAttrs{Loss: 100})
		if err := netlink.QdiscAdd(lossy); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := netlink.QdiscDel(lossy); err != nil {
				t.Error(err)
			}
		})
	}
}

func testSoft(t *testing.T) {
	testutil.Require(t, twoDevices)
	if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "soft0", MTU: 1500}}); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("soft0")
	if err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(link)
	addr, _ := netlink.ParseAddr("10.9.0.1/24")
	if err := errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link)); err != nil {
		t.Fatal(err)
	}
	peer := netip.MustParseAddr("10.9.0.7")
	p, err := Find(peer)
	if !errors.Is(err, ErrNoDevice) || p.Netdev != "soft0" {
		t.Fatalf("before: %+v, %v", p, err)
	}
	s, err := MakeSoft(t.Context(), p.Netdev)
	if err != nil {
		t.Fatal(err)
	}
	if p, err = Find(peer); err != nil || p.Device != s.Name() || !p.Soft || p.MTU != 1024 || p.Advice == "" {
		t.Errorf("with %s: %+v, %v", s.Name(), p, err)
	}
	d, err := Open(p)
	if err != nil {
		t.Fatal(err)
	}
	if d.MTU() != p.MTU {
		t.Errorf("the device says MTU %d, the path %d", d.MTU(), p.MTU)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if _, err := MakeSoft(t.Context(), p.Netdev); !errors.Is(err, ErrNoSoftRoCE) || !errors.Is(err, os.ErrExist) {
		t.Errorf("a second one: %v", err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := Find(peer); !errors.Is(err, ErrNoDevice) {
		t.Errorf("after: %v", err)
	}
}
