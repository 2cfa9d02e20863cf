package rdma

import (
	"bytes"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/transport"
	"github.com/pageferry/pageferry/wire"
)

// testIPv6: where the route to the peer is one of IPv6 the lane's packets are, too.
func testIPv6(t *testing.T) {
	testutil.Require(t, twoDevices)
	noResources(t)
	a, b := open(t, farIPv6), open(t, nearIPv6)
	for d, want := range map[*Device]Path{
		a: {Netdev: "va", Device: "rxea", Local: netip.MustParseAddr(nearIPv6)},
		b: {Netdev: "vb", Device: "rxeb", Local: netip.MustParseAddr(farIPv6)},
	} {
		p := d.Path()
		if p.Netdev != want.Netdev || p.Device != want.Device || p.Local != want.Local || netip.AddrFrom16(d.limits.GID) != want.Local || p.GIDIndex < 1 {
			t.Errorf("%+v with GID %x, want %+v", p, d.limits.GID, want)
		}
	}
	pool := newPool(t, 8, 64<<10)
	x, y := connected(t, bulkID, Config{Device: a, Pool: pool}, Config{Device: b, Pool: newPool(t, 8, 64<<10)})
	defer y.Close()
	defer x.Close()
	mem, r := region(t, y.dev, 1<<20)
	before := ipv6Packets(t)
	for _, l := range [][2]*Lane{{x, y}, {y, x}} {
		for i, n := range []int{100, 4096, 64 << 10} {
			out := l[0].cfg.Pool.Get(n, nil)
			copy(out.Bytes(), mem[i*(64<<10):])
			want := bytes.Clone(out.Bytes())
			if err := l[0].Send(transport.Frame{Type: wire.TypePages, Meta: []byte("meta"), Payload: out}); err != nil {
				t.Fatal(err)
			}
			f, err := l[1].Recv()
			if err != nil || string(f.Meta) != "meta" || !bytes.Equal(f.Payload.Bytes(), want) {
				t.Errorf("%d bytes: %v", n, err)
			}
			f.Payload.Release()
		}
	}
	for _, n := range []int{1, 4096, 64 << 10} {
		in := pool.Get(n, nil)
		if err := x.ReadRemote(t.Context(), r.Key(), r.Address()+77, in); err != nil || !bytes.Equal(in.Bytes(), mem[77:77+n]) {
			t.Errorf("read of %d bytes: %v", n, err)
		}
		in.Release()
	}
	if sent := ipv6Packets(t) - before; sent < 3*17 { // three times 64 KiB and more, in packets of 4 KiB
		t.Errorf("%d packets of IPv6 were sent", sent)
	}
}

// ipv6Packets is how many have come in over the cable.
func ipv6Packets(t *testing.T) (n uint64) {
	t.Helper()
	for _, netdev := range []string{"va", "vb"} {
		text, err := os.ReadFile("/proc/net/dev_snmp6/" + netdev)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "Ip6InReceives" {
				v, err := strconv.ParseUint(f[1], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				n += v
			}
		}
	}
	return n
}
