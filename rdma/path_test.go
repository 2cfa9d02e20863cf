package rdma

import (
	"bufio"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/Mellanox/rdmamap"
)

// unpack makes a tree of files of a recording, which has a line "NAME: CONTENT"
// or "NAME -> TARGET" for each, and points rdmamap to it. rxe.txt was recorded on
// kernel 6.12; the others were put together after the kernel's description.
func unpack(t *testing.T, recording string) string {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", recording))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	root := t.TempDir()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, target, ok := strings.Cut(s.Text(), " -> "); ok {
			file := filepath.Join(root, name)
			err = errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.Symlink(target, file))
		} else if name, content, ok := strings.Cut(s.Text(), ": "); ok {
			file := filepath.Join(root, name)
			err = errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content+"\n"), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	class, verbs := rdmamap.RdmaClassDir, rdmamap.RdmaUverbsDir
	t.Cleanup(func() { rdmamap.RdmaClassDir, rdmamap.RdmaUverbsDir = class, verbs })
	rdmamap.RdmaClassDir = filepath.Join(root, "class/infiniband")
	rdmamap.RdmaUverbsDir = filepath.Join(root, "class/infiniband_verbs")
	return root
}

func TestFind(t *testing.T) {
	const peer = "10.0.0.9"
	for name, c := range map[string]struct {
		recording string
		route     route
		err       error
		want      Path
		advice    string
	}{
		"soft": {"rxe.txt", route{netdev: "va", local: netip.MustParseAddr("10.0.0.1"), mtu: 4200, maxMTU: 65535}, nil,
			Path{Device: "rxea", Port: 1, GIDIndex: 1, Soft: true, MTU: 4096}, ""},
		"soft, IPv6": {"rxe.txt", route{netdev: "va", local: netip.MustParseAddr("fd00::1"), mtu: 1500, maxMTU: 65535}, nil,
			Path{Device: "rxea", Port: 1, GIDIndex: 2, Soft: true, MTU: 1024}, "ip link set va mtu 4200"},
		"MTU that cannot grow": {"rxe.txt", route{netdev: "va", local: netip.MustParseAddr("10.0.0.1"), mtu: 1500, maxMTU: 1500}, nil,
			Path{Device: "rxea", Port: 1, GIDIndex: 1, Soft: true, MTU: 1024}, ""},
		"card with two ports, v1 before v2": {"mlx5.txt", route{netdev: "eth1", local: netip.MustParseAddr("192.168.7.2"), mtu: 9000, maxMTU: 9978}, nil,
			Path{Device: "mlx5_0", Port: 2, GIDIndex: 3, MTU: 4096}, ""},
		"VLAN of a card": {"mlx5.txt", route{netdev: "eth1.5", local: netip.MustParseAddr("192.168.5.2"), mtu: 1500, maxMTU: 1500}, nil,
			Path{Device: "mlx5_0", Port: 2, GIDIndex: 5, MTU: 1024}, ""},
		"address that has no GID": {"rxe.txt", route{netdev: "va", local: netip.MustParseAddr("10.0.0.7"), mtu: 1500}, ErrNoGID,
			Path{Device: "rxea", Port: 1, Soft: true, MTU: 1024}, ""},
		"only v1": {"mlx5.txt", route{netdev: "eth1", local: netip.MustParseAddr("192.168.7.3"), mtu: 1500}, ErrNoGID,
			Path{Device: "mlx5_0", Port: 2, MTU: 1024}, ""},
		"port down": {"mlx5.txt", route{netdev: "eth0", local: netip.MustParseAddr("192.168.6.2"), mtu: 1500}, ErrPortDown,
			Path{Device: "mlx5_0", Port: 1, GIDIndex: 1, MTU: 1024}, ""},
		"no uverbs": {"nouverbs.txt", route{netdev: "va", local: netip.MustParseAddr("10.0.0.1"), mtu: 1500}, ErrNoUverbs,
			Path{Device: "rxea", Port: 1, GIDIndex: 0, Soft: true, MTU: 1024}, ""},
		"other network device": {"rxe.txt", route{netdev: "eth7", local: netip.MustParseAddr("10.0.0.1"), mtu: 1500}, ErrNoDevice, Path{MTU: 1024}, ""},
		"nothing":              {"nothing.txt", route{netdev: "eth0", local: netip.MustParseAddr("10.0.0.1"), mtu: 1500}, ErrNoDevice, Path{MTU: 1024}, ""},
		"this host":            {"rxe.txt", route{netdev: "lo", local: netip.MustParseAddr("10.0.0.1"), mtu: 65536, loopback: true}, ErrNoRoute, Path{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			unpack(t, c.recording)
			got, err := find(netip.MustParseAddr(peer), func(netip.Addr) (route, error) { return c.route, nil })
			if !errors.Is(err, c.err) {
				t.Errorf("error is %v, want %v", err, c.err)
			}
			if (got.Advice != "") != (c.advice != "") || !strings.Contains(got.Advice, c.advice) {
				t.Errorf("advice %q, want %q in it", got.Advice, c.advice)
			}
			c.want.Netdev, c.want.Local, c.want.Remote = c.route.netdev, c.route.local, netip.MustParseAddr(peer)
			got.Advice = ""
			if got != c.want {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
		})
	}
}

// TestRoute asks this host's kernel.
func TestRoute(t *testing.T) {
	r, err := kernelRoute(netip.MustParseAddr("127.0.0.1"))
	if err != nil || r.netdev != "lo" || !r.loopback || r.mtu < 1500 || r.local != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := Find(netip.MustParseAddr("127.0.0.1")); !errors.Is(err, ErrNoRoute) {
		t.Errorf("this host: %v", err)
	}
	if _, err := Find(netip.Addr{}); !errors.Is(err, ErrNoRoute) {
		t.Errorf("no address: %v", err)
	}
}

func TestCounters(t *testing.T) {
	unpack(t, "rxe.txt")
	c, err := Counters("rxea", 1)
	if err != nil || c["sent_pkts"] != 42 {
		t.Errorf("%v, %v", c, err)
	}
	if _, err := Counters("rxeb", 1); err == nil {
		t.Error("counters of a device that is not there")
	}
}

func TestPacketMTU(t *testing.T) {
	for netdev, want := range map[int]int{9000: 4096, 4200: 4096, 4192: 4096, 4191: 2048, 1500: 1024, 1280: 1024, 576: 256, 68: 256} {
		if got := packetMTU(netdev); got != want {
			t.Errorf("%d: %d, want %d", netdev, got, want)
		}
	}
}
