package sys

import "structs"

// RDMA_VERBS_IOCTL of <rdma/rdma_user_ioctl_cmds.h>, which takes a UverbsCommand.
var RDMA_VERBS_IOCTL = IOWR(0x1b, 1, 24)

// Commands of a uverbs device, of <rdma/ib_user_verbs.h>.
const (
	UverbsRegMR   = 9
	UverbsDeregMR = 13
)

// UverbsRemoteRead is IB_ACCESS_REMOTE_READ of <rdma/ib_user_ioctl_verbs.h>: peers
// may read the memory, and nobody may write it by way of the device.
const UverbsRemoteRead = 1 << 2

// From <rdma/ib_user_ioctl_cmds.h>: UVERBS_OBJECT_DEVICE and its method
// UVERBS_METHOD_INVOKE_WRITE are 0, and so is UVERBS_ATTR_CORE_IN.
const (
	uverbsCoreOut   = 1
	uverbsWriteCmd  = 2
	uverbsMandatory = 1 // UVERBS_ATTR_F_MANDATORY
)

// UverbsCommand is struct ib_uverbs_ioctl_hdr with its attributes: a command of
// the write interface made by ioctl, since Linux 5.0. By write(2) only those may
// make it who have the credentials that the device was opened with
// (ib_safe_file_access, drivers/infiniband/core/rdma_core.h).
type UverbsCommand struct {
	_        structs.HostLayout
	Length   uint16
	Object   uint16
	Method   uint16
	NumAttrs uint16
	_        uint64
	Driver   uint32 // enum rdma_driver_id
	_        uint32
	Attrs    [3]UverbsAttr
}

// UverbsAttr is struct ib_uverbs_attr.
type UverbsAttr struct {
	_     structs.HostLayout
	ID    uint16
	Len   uint16
	Flags uint16
	_     uint16
	Data  uint64 // an address, or, of up to 8 bytes, the value itself
}

// UverbsMR is struct ib_uverbs_reg_mr.
type UverbsMR struct {
	_        structs.HostLayout
	Response uint64
	Start    uint64
	Length   uint64
	HCAVA    uint64 // the address that peers give; its offset in a page is that of Start
	PD       uint32
	Access   uint32
}

// UverbsMRResult is struct ib_uverbs_reg_mr_resp.
type UverbsMRResult struct {
	_                  structs.HostLayout
	Handle, LKey, RKey uint32
}

// NewUverbsCommand is command cmd with an input of n bytes at in, or in itself where
// n is 8 or less, and an output of m bytes at out.
func NewUverbsCommand(driver, cmd uint32, in uint64, n int, out uint64, m int) UverbsCommand {
	c := UverbsCommand{Driver: driver, NumAttrs: 2, Attrs: [3]UverbsAttr{
		{ID: uverbsWriteCmd, Len: 8, Flags: uverbsMandatory, Data: uint64(cmd)},
		{Len: uint16(n), Flags: uverbsMandatory, Data: in},
	}}
	if m > 0 {
		c.Attrs[c.NumAttrs] = UverbsAttr{ID: uverbsCoreOut, Len: uint16(m), Flags: uverbsMandatory, Data: out}
		c.NumAttrs++
	}
	c.Length = uint16(SizeOf[UverbsCommand]() - (len(c.Attrs)-int(c.NumAttrs))*SizeOf[UverbsAttr]())
	return c
}
