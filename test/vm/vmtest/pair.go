package vmtest

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Device is a soft-RoCE device.
type Device struct {
	Name string     // as verbs know it
	Net  string     // the network device that it lies on
	Addr netip.Addr // of that; a GID of the device is made from it
	IPv6 netip.Addr // likewise
}

// mtu is the least of Ethernet with which soft-RoCE has an MTU of 4096.
const mtu = 4200

// Pair makes two soft-RoCE devices on the ends of one cable, in the guest alone,
// and takes them away at the end of the test. What one sends to the other's
// address goes over the cable, where netem can delay or lose it, although both
// are in one network namespace: soft-RoCE has its devices in the first alone.
// There is one pair at a time.
func Pair(t testing.TB) (a, b Device) {
	t.Helper()
	if !Inside() {
		t.Fatal("Pair is for a guest: call it from what vmtest.Run runs")
	}
	a = Device{"rxea", "va", netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd00:77::1")}
	b = Device{"rxeb", "vb", netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("fd00:77::2")}
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = a.Net, mtu
	cable := &netlink.Veth{LinkAttrs: attrs, PeerName: b.Net, PeerMTU: mtu}
	must("make a veth pair", netlink.LinkAdd(cable))
	// Addresses, routes and soft-RoCE devices go with it.
	t.Cleanup(func() { must("remove it", netlink.LinkDel(cable)) })

	// ip-sysctl: both ends take packets from an address that is also ours, and
	// answer for their own only.
	for _, s := range []string{"all/accept_local=1", "all/rp_filter=0", "all/arp_ignore=1", "all/arp_announce=2",
		a.Net + "/accept_local=1", a.Net + "/rp_filter=0", b.Net + "/accept_local=1", b.Net + "/rp_filter=0"} {
		var key, value string
		key, value = s[:len(s)-2], s[len(s)-1:]
		must(s, os.WriteFile("/proc/sys/net/ipv4/conf/"+key, []byte(value), 0))
	}
	for _, d := range []Device{a, b} {
		link, err := netlink.LinkByName(d.Net)
		must(d.Net, err)
		must(d.Net, netlink.AddrAdd(link, &netlink.Addr{IPNet: network(d.Addr, 24)}))
		// Nobody else can have it, so it need not be tentative (RFC 4862) for a second.
		must(d.Net, netlink.AddrAdd(link, &netlink.Addr{IPNet: network(d.IPv6, 64), Flags: unix.IFA_F_NODAD}))
		must(d.Net, netlink.LinkSetUp(link))
	}
	// An address of ours is found in the table "local" before any route is. So
	// that table comes last, but for packets that have come over the cable.
	rules(t, must, unix.AF_INET, a.Addr, b.Addr)
	rules(t, must, unix.AF_INET6, a.IPv6, b.IPv6)
	for i, way := range [][2]Device{{a, b}, {b, a}} {
		from, to := way[0], way[1]
		out, err := netlink.LinkByName(from.Net)
		must(from.Net, err)
		in, err := netlink.LinkByName(to.Net)
		must(to.Net, err)
		for _, ends := range [][2]netip.Addr{{from.Addr, to.Addr}, {from.IPv6, to.IPv6}} {
			src, dst := ends[0], ends[1]
			must("route to "+dst.String(), netlink.RouteAdd(&netlink.Route{
				LinkIndex: out.Attrs().Index, Table: firstTable + i, Scope: netlink.SCOPE_LINK,
				Dst: network(dst, dst.BitLen()), Src: src.AsSlice(),
			}))
			must("neighbour "+dst.String(), netlink.NeighAdd(&netlink.Neigh{
				LinkIndex: out.Attrs().Index, State: netlink.NUD_PERMANENT, IP: dst.AsSlice(), HardwareAddr: in.Attrs().HardwareAddr,
			}))
		}
	}
	for _, d := range []Device{a, b} {
		must("make "+d.Name, netlink.RdmaLinkAdd(d.Name, "rxe", d.Net))
	}
	return a, b
}

const (
	firstTable = 101
	lastRule   = 100 // where the table "local" goes
)

func network(a netip.Addr, bits int) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())}
}

// rules puts the routes to a and b, addresses of va and vb, before the table "local".
func rules(t testing.TB, must func(string, error), family int, a, b netip.Addr) {
	t.Helper()
	local := func(priority int) *netlink.Rule {
		r := netlink.NewRule()
		r.Priority, r.Table, r.Family = priority, unix.RT_TABLE_LOCAL, family
		return r
	}
	var list []*netlink.Rule
	for i, name := range []string{"va", "vb"} {
		r := local(10 + i)
		r.IifName = name
		list = append(list, r)
		to := []netip.Addr{b, a}[i]
		r = netlink.NewRule()
		r.Priority, r.Table, r.Family, r.Dst = 20+i, firstTable+i, family, network(to, to.BitLen())
		list = append(list, r)
	}
	list = append(list, local(lastRule))
	for _, r := range list {
		must(fmt.Sprintf("rule %d", r.Priority), netlink.RuleAdd(r))
		t.Cleanup(func() { must(fmt.Sprintf("remove rule %d", r.Priority), netlink.RuleDel(r)) })
	}
	first := local(0)
	must("remove the first rule", netlink.RuleDel(first))
	t.Cleanup(func() { must("put the first rule back", netlink.RuleAdd(first)) })
}
