package sys

import (
	"encoding/binary"
	"structs"
)

// From <linux/userfaultfd.h>.
const (
	UffdAPIVersion = 0xAA

	UffdUserModeOnly = 1 // flag of userfaultfd(2), since 5.11

	UffdFeaturePagefaultFlagWP   = 1 << 0  // 5.7
	UffdFeatureEventFork         = 1 << 1  // 4.11
	UffdFeatureEventRemap        = 1 << 2  // 4.11
	UffdFeatureEventRemove       = 1 << 3  // 4.11
	UffdFeatureMissingHugetlbfs  = 1 << 4  // 4.11
	UffdFeatureMissingShmem      = 1 << 5  // 4.11
	UffdFeatureEventUnmap        = 1 << 6  // 4.11
	UffdFeatureSigbus            = 1 << 7  // 4.14
	UffdFeatureThreadID          = 1 << 8  // 4.14
	UffdFeatureMinorHugetlbfs    = 1 << 9  // 5.13
	UffdFeatureMinorShmem        = 1 << 10 // 5.14
	UffdFeatureExactAddress      = 1 << 11 // 5.18
	UffdFeatureWPHugetlbfsShmem  = 1 << 12 // 5.19
	UffdFeatureWPUnpopulated     = 1 << 13 // 6.4
	UffdFeaturePoison            = 1 << 14 // 6.6
	UffdFeatureWPAsync           = 1 << 15 // 6.7
	UffdFeatureMove              = 1 << 16 // 6.8
	UffdioRegisterModeMissing    = 1 << 0
	UffdioRegisterModeWP         = 1 << 1
	UffdioRegisterModeMinor      = 1 << 2
	UffdioCopyModeDontwake       = 1 << 0
	UffdioCopyModeWP             = 1 << 1
	UffdioZeropageModeDontwake   = 1 << 0
	UffdioWriteprotectModeWP     = 1 << 0
	UffdioWriteprotectModeNoWake = 1 << 1
	UffdioContinueModeDontwake   = 1 << 0
	UffdioContinueModeWP         = 1 << 1
	UffdioPoisonModeDontwake     = 1 << 0
	UffdioMoveModeDontwake       = 1 << 0
	UffdioMoveModeAllowSrcHoles  = 1 << 1

	UffdEventPagefault = 0x12
	UffdEventFork      = 0x13
	UffdEventRemap     = 0x14
	UffdEventRemove    = 0x15
	UffdEventUnmap     = 0x16

	UffdPagefaultFlagWrite = 1 << 0
	UffdPagefaultFlagWP    = 1 << 1
	UffdPagefaultFlagMinor = 1 << 2
)

const uffdio = 0xAA

// Request numbers.
var (
	UFFDIO_API          = IOWR(uffdio, 0x3F, 24)
	UFFDIO_REGISTER     = IOWR(uffdio, 0x00, 32)
	UFFDIO_UNREGISTER   = IOR(uffdio, 0x01, 16)
	UFFDIO_WAKE         = IOR(uffdio, 0x02, 16)
	UFFDIO_COPY         = IOWR(uffdio, 0x03, 40)
	UFFDIO_ZEROPAGE     = IOWR(uffdio, 0x04, 32)
	UFFDIO_MOVE         = IOWR(uffdio, 0x05, 40)
	UFFDIO_WRITEPROTECT = IOWR(uffdio, 0x06, 24)
	UFFDIO_CONTINUE     = IOWR(uffdio, 0x07, 32)
	UFFDIO_POISON       = IOWR(uffdio, 0x08, 32)
)

// uffdioAPI is struct uffdio_api.
type uffdioAPI struct {
	_        structs.HostLayout
	API      uint64
	Features uint64
	Ioctls   uint64
}

// uffdioRange is struct uffdio_range.
type uffdioRange struct {
	_          structs.HostLayout
	Start, Len uint64
}

// uffdioRegister is struct uffdio_register.
type uffdioRegister struct {
	_                        structs.HostLayout
	Start, Len, Mode, Ioctls uint64
}

// uffdioCopy is struct uffdio_copy, and struct uffdio_move likewise.
type uffdioCopy struct {
	_                   structs.HostLayout
	Dst, Src, Len, Mode uint64
	Copy                int64
}

// uffdioRangeMode is struct uffdio_zeropage, uffdio_continue and uffdio_poison.
type uffdioRangeMode struct {
	_                structs.HostLayout
	Start, Len, Mode uint64
	Done             int64
}

// uffdioWriteprotect is struct uffdio_writeprotect.
type uffdioWriteprotect struct {
	_                structs.HostLayout
	Start, Len, Mode uint64
}

// UffdMsgSize is the size in bytes of struct uffd_msg.
const UffdMsgSize = 32

// UffdMsg is struct uffd_msg, decoded. Only the fields of its Event are set.
type UffdMsg struct {
	Event uint8

	Flags uint64 // PAGEFAULT: UffdPagefaultFlag*
	Addr  uint64 // PAGEFAULT: address in bytes
	TID   uint32 // PAGEFAULT, with UffdFeatureThreadID

	ForkFD int // FORK: the child's userfaultfd, now ours

	From, To, Len uint64 // REMAP: bytes

	Start, End uint64 // REMOVE, UNMAP: [Start, End) in bytes
}

// DecodeUffdMsgs decodes what read(2) on a userfaultfd gave, whole messages of
// UffdMsgSize bytes, appending to out. An incomplete rest is left out.
func DecodeUffdMsgs(b []byte, out []UffdMsg) []UffdMsg {
	le := binary.LittleEndian
	for len(b) >= UffdMsgSize {
		m := UffdMsg{Event: b[0]}
		a1, a2, a3 := le.Uint64(b[8:]), le.Uint64(b[16:]), le.Uint64(b[24:])
		switch m.Event {
		case UffdEventPagefault:
			m.Flags, m.Addr, m.TID = a1, a2, uint32(a3)
		case UffdEventFork:
			m.ForkFD = int(uint32(a1))
		case UffdEventRemap:
			m.From, m.To, m.Len = a1, a2, a3
		case UffdEventRemove, UffdEventUnmap:
			m.Start, m.End = a1, a2
		}
		out = append(out, m)
		b = b[UffdMsgSize:]
	}
	return out
}
