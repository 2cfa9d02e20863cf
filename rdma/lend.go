package rdma

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// ErrNoLending: the driver or the kernel does not let another process register its
// memory with our device.
var ErrNoLending = errors.New("rdma: memory of another process cannot be registered with this device")

// Loan is what another process needs to register memory of its own in the
// protection domain of a Device: checkpoint's Session.Register makes it do so.
type Loan struct {
	// File is a copy of the descriptor on which the kernel takes the device's
	// commands. All that is registered by it lasts as long as a copy of it is open
	// anywhere: close it when the process has registered.
	File *os.File
	// Driver is the kernel's enum rdma_driver_id, Domain its number of the
	// protection domain.
	Driver, Domain uint32
	// MaxRegions is how many memory regions the device has, for all programs of
	// the host.
	MaxRegions int
}

// Lend prepares for memory of another process to be registered with the device. The
// caller owns Loan.File. What was registered is handed to Adopt; what the process
// could not tell any more ends with the device. The errors wrap ErrNoLending.
func (d *Device) Lend() (Loan, error) {
	d.lendMu.Lock()
	defer d.lendMu.Unlock()
	if d.adopted == nil {
		return Loan{}, fmt.Errorf("%s: %w", d.path.Device, os.ErrClosed)
	}
	if d.driver == 0 {
		driver, err := driverOf(d.path.Device)
		if err != nil {
			return Loan{}, fmt.Errorf("%w: %s: %w", ErrNoLending, d.path.Device, err)
		}
		d.driver = driver
	}
	fd, pd := d.v.Kernel()
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return Loan{}, fmt.Errorf("%w: %s: %w", ErrNoLending, d.path.Device, os.NewSyscallError("fcntl", err))
	}
	d.lent = true
	return Loan{File: os.NewFile(uintptr(dup), d.path.Device), Driver: d.driver, Domain: pd, MaxRegions: int(d.limits.MaxRegions)}, nil
}

// Adopt makes a Region of what a process has registered by a Loan of the device:
// its memory r, with the handle and the key that the kernel returned there. Peers
// may read it and nothing else. Its Close works without the process, which may have
// ended: the pages stay until then, as they were. Close of the Device closes it as well.
func (d *Device) Adopt(r page.Range, handle, key uint32) (*Region, error) {
	d.lendMu.Lock()
	defer d.lendMu.Unlock()
	if d.adopted == nil {
		return nil, fmt.Errorf("%s: %w", d.path.Device, os.ErrClosed)
	}
	reg := &Region{key: key, addr: uint64(r.Start)}
	reg.close = func() error {
		d.lendMu.Lock()
		defer d.lendMu.Unlock()
		return d.giveUp(reg)
	}
	d.adopted[reg] = handle
	return reg, nil
}

// giveUp deregisters an adopted region, unless that was done. lendMu is held.
func (d *Device) giveUp(r *Region) error {
	handle, ok := d.adopted[r]
	if !ok {
		return nil
	}
	fd, _ := d.v.Kernel()
	if err := sys.UverbsDeregister(fd, d.driver, handle); err != nil {
		return fmt.Errorf("rdma: deregister memory of another process with %s: %w", d.path.Device, err)
	}
	delete(d.adopted, r)
	return nil
}

// Revoke deregisters all that was adopted; the device and its lanes can be used on. A
// READ of that memory ends the lane that it came by.
func (d *Device) Revoke() error {
	d.lendMu.Lock()
	defer d.lendMu.Unlock()
	var errs []error
	for r := range d.adopted {
		errs = append(errs, d.giveUp(r))
	}
	return errors.Join(errs...)
}

// giveUpAll deregisters all that was adopted, and ends Lend and Adopt.
func (d *Device) giveUpAll() error {
	d.lendMu.Lock()
	defer d.lendMu.Unlock()
	var errs []error
	for r := range d.adopted {
		errs = append(errs, d.giveUp(r))
	}
	d.adopted = nil
	return errors.Join(errs...)
}

// closeDevice closes the device. What a process registered that died before it
// could tell keeps the protection domain busy; closing ends it.
func (d *Device) closeDevice() error {
	err := d.v.Close()
	if d.lent && errors.Is(err, syscall.EBUSY) {
		return nil
	}
	return err
}

// What <rdma/rdma_netlink.h> has and package netlink has not.
const (
	nldevGetChardev      = 15 // RDMA_NLDEV_CMD_GET_CHARDEV, since Linux 5.1
	nldevAttrChardevType = 69 // RDMA_NLDEV_ATTR_CHARDEV_TYPE
	nldevAttrDriverID    = 73 // RDMA_NLDEV_ATTR_UVERBS_DRIVER_ID, a u32
)

// driverOf asks the kernel for the number of a device's driver, which commands have
// to name. Some old drivers have none (uverbs_no_driver_id_binding).
func driverOf(name string) (uint32, error) {
	l, err := netlink.RdmaLinkByName(name)
	if err != nil {
		return 0, err
	}
	req := nl.NewNetlinkRequest(nl.RDMA_NL_NLDEV<<nl.RDMA_NL_GET_CLIENT_SHIFT|nldevGetChardev, unix.NLM_F_ACK)
	req.AddData(nl.NewRtAttr(nl.RDMA_NLDEV_ATTR_DEV_INDEX, binary.NativeEndian.AppendUint32(nil, l.Attrs.Index)))
	req.AddData(nl.NewRtAttr(nldevAttrChardevType, nl.ZeroTerminated("uverbs")))
	msgs, err := req.Execute(unix.NETLINK_RDMA, 0)
	if err != nil {
		return 0, fmt.Errorf("ask for its uverbs device: %w", err)
	}
	for _, m := range msgs {
		attrs, err := nl.ParseRouteAttr(m)
		if err != nil {
			return 0, err
		}
		for _, a := range attrs {
			if a.Attr.Type == nldevAttrDriverID && len(a.Value) >= 4 {
				return binary.NativeEndian.Uint32(a.Value), nil
			}
		}
	}
	return 0, errors.New("its driver has no number for commands by ioctl")
}
