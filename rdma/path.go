package rdma

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Path is the RDMA device that reaches a peer, and how.
type Path struct {
	Netdev   string // the network device of the route
	Device   string // the RDMA device, "mlx5_0" or "rxe0"
	Port     int    // of Device, from 1
	GIDIndex int    // of the RoCE v2 GID that is Local
	Local    netip.Addr
	Remote   netip.Addr
	Soft     bool // soft-RoCE: no card, the kernel does the work
	// MTU is the payload in bytes of an RDMA packet that the network device has
	// room for. The device may be set to less: see Device.MTU.
	MTU int
	// Advice says what would make the path better, or is "".
	Advice string
}

func (p Path) String() string {
	kind := "RDMA"
	if p.Soft {
		kind = "soft-RoCE"
	}
	return fmt.Sprintf("%s device %s port %d gid %d (%s over %s, mtu %d)", kind, p.Device, p.Port, p.GIDIndex, p.Local, p.Netdev, p.MTU)
}

// What can be missing on the way to a peer. Errors of Find wrap one of these.
var (
	// ErrNoRoute: the kernel knows no route to the peer, or it is this host.
	ErrNoRoute = errors.New("rdma: no route over a network device")
	// ErrNoDevice: the route's network device has no RDMA device. Soft-RoCE can
	// be made on most: see MakeSoft.
	ErrNoDevice = errors.New("rdma: no RDMA device")
	// ErrNoGID: the RDMA device has no RoCE v2 GID for the route's address.
	ErrNoGID = errors.New("rdma: no RoCE v2 GID")
	// ErrPortDown: the RDMA device's port is not active.
	ErrPortDown = errors.New("rdma: port is down")
	// ErrNoUverbs: programs have no way to the RDMA device.
	ErrNoUverbs = errors.New("rdma: no uverbs device")
)

// Find returns the path to peer. It needs no rights. Where something is missing
// the error says what and how to get it, and Path is filled as far as it was known.
func Find(peer netip.Addr) (Path, error) { return find(peer.Unmap(), kernelRoute) }

// route is what the kernel says of the way to an address.
type route struct {
	netdev      string
	local       netip.Addr
	mtu, maxMTU int // of the network device; maxMTU is 0 where it is not known
	loopback    bool
}

func find(peer netip.Addr, ask func(netip.Addr) (route, error)) (Path, error) {
	p := Path{Remote: peer}
	r, err := ask(peer)
	if err != nil {
		return p, fmt.Errorf("%w to %s: %w", ErrNoRoute, peer, err)
	}
	p.Netdev, p.Local = r.netdev, r.local
	if r.loopback {
		return p, fmt.Errorf("%w: %s is an address of this host", ErrNoRoute, peer)
	}
	p.MTU = packetMTU(r.mtu)
	dev, err := deviceFor(r.netdev, r.local)
	p.Device, p.Port, p.GIDIndex, p.Soft = dev.name, dev.port, dev.gidIndex, dev.soft
	if err != nil {
		return p, err
	}
	if p.MTU < maxPacketMTU && r.maxMTU >= jumboMTU {
		p.Advice = fmt.Sprintf("RDMA packets hold %d bytes and could hold %d, if the network takes it: ip link set %s mtu %d, on both hosts",
			p.MTU, maxPacketMTU, r.netdev, jumboMTU)
	}
	return p, nil
}

const (
	maxPacketMTU = 4096
	// headRoom is what a packet may have besides its payload: iboe_get_mtu in
	// the kernel's include/rdma/ib_addr.h.
	headRoom = 40 + 8 + 12 + 4 + 28 + 4
	// jumboMTU carries maxPacketMTU, with room to spare, as the man page of
	// rdma-link and everybody else round it.
	jumboMTU = 4200
)

// packetMTU is the largest packet payload that a network device of that MTU
// carries: the InfiniBand ones are powers of two from 256 to 4096.
func packetMTU(netdev int) int {
	for m := maxPacketMTU; m > 256; m /= 2 {
		if netdev-headRoom >= m {
			return m
		}
	}
	return 256
}

func kernelRoute(peer netip.Addr) (route, error) {
	list, err := netlink.RouteGet(net.IP(peer.AsSlice()))
	if err != nil {
		return route{}, err
	}
	if len(list) == 0 {
		return route{}, errors.New("the kernel returned none")
	}
	link, err := netlink.LinkByIndex(list[0].LinkIndex)
	if err != nil {
		return route{}, err
	}
	a := link.Attrs()
	r := route{netdev: a.Name, mtu: a.MTU, loopback: a.Flags&net.FlagLoopback != 0}
	r.local, _ = netip.AddrFromSlice(list[0].Src)
	r.local = r.local.Unmap()
	r.maxMTU, err = maxLinkMTU(a.Index)
	return r, err
}

// maxLinkMTU is the MTU up to which a network device can be set, IFLA_MAX_MTU of
// rtnetlink(7), or 0 where the kernel does not say.
func maxLinkMTU(index int) (int, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	answers, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return 0, err
	}
	for _, b := range answers {
		if len(b) < msg.Len() {
			continue
		}
		attrs, err := nl.ParseRouteAttr(b[msg.Len():])
		if err != nil {
			return 0, err
		}
		for _, a := range attrs {
			if a.Attr.Type == unix.IFLA_MAX_MTU && len(a.Value) >= 4 {
				if n := int(nl.NativeEndian().Uint32(a.Value)); n > 0 {
					return n, nil
				}
				return math.MaxInt32, nil // no limit
			}
		}
	}
	return 0, nil
}
