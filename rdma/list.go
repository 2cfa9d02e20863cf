package rdma

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/Mellanox/rdmamap"
)

// Port is a port of an RDMA device that page lanes could go over, by one of its
// addresses.
type Port struct {
	Device   string
	Port     int // from 1
	Netdev   string
	GIDIndex int
	Addr     netip.Addr
	Soft     bool
	MTU      int   // see Path
	Problem  error // nil: programs can use it
}

func (p Port) String() string {
	kind := ""
	if p.Soft {
		kind = ", soft-RoCE"
	}
	s := fmt.Sprintf("%s port %d gid %d (%s on %s, mtu %d%s)", p.Device, p.Port, p.GIDIndex, p.Addr, p.Netdev, p.MTU, kind)
	if p.Problem != nil {
		s += ": " + p.Problem.Error()
	}
	return s
}

// List returns the RoCE v2 addresses of all RDMA devices in this network
// namespace, link-local ones left out, and the names of devices that have none. It needs
// no rights.
func List() (ports []Port, without []string) {
	names := rdmamap.GetRdmaDeviceList()
	slices.Sort(names)
	for _, name := range names {
		n := len(ports)
		for _, port := range rdmamap.GetPorts(name) {
			ports = append(ports, portsOf(name, port)...)
		}
		if len(ports) == n {
			without = append(without, name)
		}
	}
	return ports, without
}

func portsOf(name, port string) (ports []Port) {
	dir := filepath.Join(rdmamap.RdmaClassDir, name, "ports", port)
	entries, _ := os.ReadDir(filepath.Join(dir, "gids"))
	for _, e := range entries {
		gid, err := netip.ParseAddr(line(filepath.Join(dir, "gids", e.Name())))
		if err != nil || line(filepath.Join(dir, "gid_attrs", "types", e.Name())) != "RoCE v2" || gid.IsLinkLocalUnicast() {
			continue
		}
		p := Port{Device: name, Netdev: line(filepath.Join(dir, "gid_attrs", "ndevs", e.Name())), Addr: gid.Unmap(), Soft: isSoft(name)}
		p.Port, _ = strconv.Atoi(port)
		p.GIDIndex, _ = strconv.Atoi(e.Name())
		if i, err := net.InterfaceByName(p.Netdev); err == nil {
			p.MTU = packetMTU(i.MTU)
		}
		p.Problem = usable(device{name: name, port: p.Port})
		ports = append(ports, p)
	}
	slices.SortFunc(ports, func(a, b Port) int { return a.GIDIndex - b.GIDIndex })
	return ports
}
