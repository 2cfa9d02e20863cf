package rdma

import (
	"cmp"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/Mellanox/rdmamap"
)

// device is a port of an RDMA device and one of its GIDs, as sysfs shows them:
// Documentation/ABI/stable/sysfs-class-infiniband in the kernel's source.
type device struct {
	name           string
	port, gidIndex int
	soft           bool
}

// deviceFor finds the port with a RoCE v2 GID that is addr, on netdev. With an
// error it returns the device that comes nearest.
func deviceFor(netdev string, addr netip.Addr) (best device, err error) {
	best, err = device{}, fmt.Errorf("%w for %s: soft-RoCE can be made on it, with rdma link add NAME type rxe netdev %s", ErrNoDevice, netdev, netdev)
	names := rdmamap.GetRdmaDeviceList()
	slices.Sort(names)
	for _, name := range names {
		ports := rdmamap.GetPorts(name)
		slices.Sort(ports)
		for _, port := range ports {
			d, here, ok := gidOn(name, port, netdev, addr)
			switch {
			case ok:
				return d, usable(d)
			case here:
				best, err = d, fmt.Errorf("%w of %s port %s for %s, the address of the route over %s: is the address on that device, and up?",
					ErrNoGID, name, port, addr, netdev)
			}
		}
	}
	return best, err
}

// gidOn looks through the GIDs of a port. here says that the port is on netdev,
// ok that d is a RoCE v2 GID that equals addr.
func gidOn(name, port, netdev string, addr netip.Addr) (d device, here, ok bool) {
	d = device{name: name, soft: isSoft(name)}
	d.port, _ = strconv.Atoi(port)
	dir := filepath.Join(rdmamap.RdmaClassDir, name, "ports", port)
	entries, _ := os.ReadDir(filepath.Join(dir, "gids"))
	indices := make([]int, 0, len(entries))
	for _, e := range entries {
		if i, err := strconv.Atoi(e.Name()); err == nil {
			indices = append(indices, i)
		}
	}
	slices.SortFunc(indices, cmp.Compare[int])
	for _, i := range indices {
		n := strconv.Itoa(i)
		// An empty entry of the table has attributes that cannot be read.
		if line(filepath.Join(dir, "gid_attrs", "ndevs", n)) != netdev {
			continue
		}
		here = true
		gid, err := netip.ParseAddr(line(filepath.Join(dir, "gids", n)))
		if err == nil && gid.Unmap() == addr && line(filepath.Join(dir, "gid_attrs", "types", n)) == "RoCE v2" {
			d.gidIndex = i
			return d, true, true
		}
	}
	return d, here, false
}

// usable returns nil or why no program can use d.
func usable(d device) error {
	state := line(filepath.Join(rdmamap.RdmaClassDir, d.name, "ports", strconv.Itoa(d.port), "state"))
	if !strings.HasSuffix(state, "ACTIVE") {
		return fmt.Errorf("%w: port %d of %s is %q", ErrPortDown, d.port, d.name, state)
	}
	if uverbsOf(d.name) != "" {
		return nil
	}
	return fmt.Errorf("%w for %s: modprobe ib_uverbs", ErrNoUverbs, d.name)
}

// uverbsOf is the node that programs open to use an RDMA device, or "".
func uverbsOf(name string) string {
	for _, f := range rdmamap.GetRdmaCharDevices(name) {
		if strings.HasPrefix(filepath.Base(f), rdmamap.RdmaUverbsFilxPrefix) {
			return f
		}
	}
	return ""
}

// isSoft: a software device hangs on a network device, which its file "parent"
// names, and has no device of a bus behind it.
func isSoft(name string) bool {
	dir := filepath.Join(rdmamap.RdmaClassDir, name)
	_, bus := os.Stat(filepath.Join(dir, "device"))
	return bus != nil && line(filepath.Join(dir, "parent")) != ""
}

// line is the content of a file of one line, or "".
func line(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

// Counters are the counters of a device's port, by the names that the driver
// gives them: packets, retries, errors.
func Counters(name string, port int) (map[string]uint64, error) {
	// Software devices have hw_counters only.
	hw, err := rdmamap.GetRdmaSysfsHwStats(name, port)
	if err != nil {
		return nil, fmt.Errorf("rdma: counters of %s port %d: %w", name, port, err)
	}
	standard, _ := rdmamap.GetRdmaSysfsStats(name, port)
	m := map[string]uint64{}
	for _, e := range slices.Concat(hw, standard) {
		m[e.Name] = e.Value
	}
	return m, nil
}
