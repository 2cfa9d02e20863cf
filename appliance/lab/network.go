package lab

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// node is one end of the links: a host, or the lab itself.
type node struct {
	name string
	addr netip.Addr
	ns   netns.NsHandle
}

// connect joins every two nodes by a veth pair. Each node has one address, on
// its loopback, and a route to each other node through the link to it.
func (l *Lab) connect() error {
	nodes := []node{{"lab", l.addr, l.net}}
	for _, h := range l.hosts {
		nodes = append(nodes, node{h.name, h.addr, h.net})
	}
	for i := range nodes {
		if err := nodes[i].assign(); err != nil {
			return fmt.Errorf("%s: %w", nodes[i].name, err)
		}
		for j := range i {
			if err := join(nodes[i], nodes[j], l.cfg.MTU); err != nil {
				return fmt.Errorf("%s to %s: %w", nodes[i].name, nodes[j].name, err)
			}
		}
	}
	return nil
}

func (n node) handle() (*netlink.Handle, error) { return netlink.NewHandleAt(n.ns) }

func (n node) net32() *net.IPNet {
	return &net.IPNet{IP: net.IP(n.addr.AsSlice()), Mask: net.CIDRMask(32, 32)}
}

func (n node) assign() error {
	h, err := n.handle()
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := h.LinkSetUp(lo); err != nil {
		return err
	}
	return h.AddrAdd(lo, &netlink.Addr{IPNet: n.net32()})
}

func join(a, b node, mtu int) error {
	ha, err := a.handle()
	if err != nil {
		return err
	}
	defer ha.Close()
	hb, err := b.handle()
	if err != nil {
		return err
	}
	defer hb.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "to-"+b.name, mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "to-" + a.name, PeerNamespace: netlink.NsFd(int(b.ns)), PeerMTU: uint32(mtu)}
	if err := ha.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth: %w", err)
	}
	for _, end := range []struct {
		h        *netlink.Handle
		from, to node
	}{{ha, a, b}, {hb, b, a}} {
		link, err := end.h.LinkByName("to-" + end.to.name)
		if err != nil {
			return err
		}
		if err := end.h.LinkSetUp(link); err != nil {
			return err
		}
		if err := end.h.RouteAdd(&netlink.Route{
			LinkIndex: link.Attrs().Index, Dst: end.to.net32(), Src: net.IP(end.from.addr.AsSlice()), Scope: netlink.SCOPE_LINK,
		}); err != nil {
			return fmt.Errorf("route to %s: %w", end.to.name, err)
		}
	}
	return nil
}
