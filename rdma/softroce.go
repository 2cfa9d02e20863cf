package rdma

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/Mellanox/rdmamap"
	"github.com/vishvananda/netlink"
)

// ErrNoSoftRoCE: the kernel has no rdma_rxe, or does not let us use it.
var ErrNoSoftRoCE = errors.New("rdma: no soft-RoCE")

// Soft is a soft-RoCE device that MakeSoft made.
type Soft struct {
	name  string
	index uint32
}

// MakeSoft makes a soft-RoCE device on netdev, loading the kernel's module for it
// where that is needed, and waits until its GIDs are there. It needs
// CAP_NET_ADMIN. RDMA devices of that kind exist in the first network namespace
// only. Close removes the device; the module stays.
func MakeSoft(ctx context.Context, netdev string) (*Soft, error) {
	s := &Soft{name: softPrefix + netdev}
	err := netlink.RdmaLinkAdd(s.name, "rxe", netdev)
	if err != nil && !errors.Is(err, syscall.EEXIST) && !rxeLoaded() {
		// The kernel loads the module by its alias rdma-link-rxe, but not
		// where ib_core, which would, is not loaded itself.
		if lerr := loadRXE(ctx); lerr != nil {
			return nil, fmt.Errorf("%w on %s: %w; and %w", ErrNoSoftRoCE, netdev, err, lerr)
		}
		err = netlink.RdmaLinkAdd(s.name, "rxe", netdev)
	}
	if err != nil {
		return nil, fmt.Errorf("%w on %s: rdma link add %s: %w", ErrNoSoftRoCE, netdev, s.name, err)
	}
	l, err := netlink.RdmaLinkByName(s.name)
	if err != nil {
		return nil, fmt.Errorf("%w on %s: the device %s that was made is gone: %w", ErrNoSoftRoCE, netdev, s.name, err)
	}
	s.index = l.Attrs.Index
	if err := s.settle(ctx, netdev); err != nil {
		return nil, errors.Join(fmt.Errorf("%w on %s: %w", ErrNoSoftRoCE, netdev, err), s.Close())
	}
	return s, nil
}

// settle waits until the kernel has entered the GIDs and udev has made the
// uverbs device, both of which happen after the device appears.
func (s *Soft) settle(ctx context.Context, netdev string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		gid := line(filepath.Join(rdmamap.RdmaClassDir, s.name, "ports/1/gid_attrs/ndevs/0"))
		var node error = os.ErrNotExist
		if f := uverbsOf(s.name); f != "" {
			_, node = os.Stat(f)
		}
		if gid == netdev && node == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s has no GID (%q) or no uverbs device (%w) yet: is %s up?", s.name, gid, node, netdev)
		case <-tick.C:
		}
	}
}

// Name is the RDMA device's.
func (s *Soft) Name() string { return s.name }

// Close removes the device, if it is still the one that was made. It waits for
// programs that have it open. Idempotent.
func (s *Soft) Close() error {
	l, err := netlink.RdmaLinkByName(s.name)
	if err != nil || l.Attrs.Index != s.index {
		return nil // somebody else removed it, or the network device went away
	}
	if err := netlink.RdmaLinkDel(s.name); err != nil {
		return fmt.Errorf("rdma: remove %s: %w (rdma link delete %s)", s.name, err, s.name)
	}
	return nil
}

func rxeLoaded() bool {
	_, err := os.Stat("/sys/module/rdma_rxe")
	return err == nil
}

func loadRXE(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "modprobe", "rdma_rxe")
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("modprobe rdma_rxe: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// SoftLoaded reports whether the kernel's module for soft-RoCE is there.
func SoftLoaded() bool { return rxeLoaded() }

// softPrefix begins the names of devices that MakeSoft makes.
const softPrefix = "pf_"

// RemoveUnused removes soft-RoCE devices that MakeSoft made, in a process that was
// killed perhaps, and on which there is no queue pair of a program. It returns their names.
func RemoveUnused() (removed []string, err error) {
	list, err := netlink.RdmaResourceList()
	if err != nil {
		return nil, nil // no RDMA in this kernel
	}
	for _, r := range list {
		// One queue pair, GSI, is the kernel's own.
		if !strings.HasPrefix(r.Name, softPrefix) || r.RdmaResourceSummaryEntries["qp"] > 1 {
			continue
		}
		if derr := netlink.RdmaLinkDel(r.Name); derr != nil {
			err = errors.Join(err, fmt.Errorf("rdma: remove %s: %w (rdma link delete %s)", r.Name, derr, r.Name))
			continue
		}
		removed = append(removed, r.Name)
	}
	return removed, err
}
