package sys

import (
	"structs"

	"golang.org/x/sys/unix"
)

// Regs is struct user_regs_struct of <asm/user_64.h>.
type Regs = unix.PtraceRegs

// From <linux/elf.h> and <linux/ptrace.h>.
const (
	ntX86XState = 0x202

	ptracePeekSiginfoShared = 1

	// Sizes that the kernel checks.
	sigsetSize = 8
)

// RseqConfiguration is struct ptrace_rseq_configuration (5.13). Pointer 0 means
// that the thread has registered none.
type RseqConfiguration struct {
	_         structs.HostLayout
	Pointer   uint64
	Size      uint32
	Signature uint32
	Flags     uint32
	_         uint32
}

// RseqCS is struct rseq_cs of <linux/rseq.h>: a critical section.
type RseqCS struct {
	_                structs.HostLayout
	Version, Flags   uint32
	StartIP          uint64
	PostCommitOffset uint64
	AbortIP          uint64
}

// RseqCSOffset is where struct rseq has its pointer to the struct rseq_cs.
const RseqCSOffset = 8

// SyscallUserDispatch is struct ptrace_sud_config (6.4). Mode 0 is off.
type SyscallUserDispatch struct {
	_                           structs.HostLayout
	Mode, Selector, Offset, Len uint64
}

type peekSiginfoArgs struct {
	_     structs.HostLayout
	Off   uint64
	Flags uint32
	Nr    int32
}

// Event returns the PTRACE_EVENT_* of a stop, 0 for a signal-delivery-stop.
func Event(ws unix.WaitStatus) int { return int(uint32(ws) >> 16) }

// XStateFeatures returns XCR0 as the kernel notes it in the software-reserved
// bytes of the legacy area of an XSAVE image (struct user_xstateregs of
// <asm/user.h>), or 0 if b is too short to be one.
func XStateFeatures(b []byte) uint64 {
	const offset = 464
	if len(b) < offset+8 {
		return 0
	}
	var v uint64
	for i := range 8 {
		v |= uint64(b[offset+i]) << (8 * i)
	}
	return v
}
