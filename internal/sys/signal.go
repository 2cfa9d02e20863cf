package sys

import (
	"encoding/binary"
	"structs"
)

// Siginfo is siginfo_t of <asm-generic/siginfo.h>, 128 bytes, kept raw.
type Siginfo [128]byte

func (s *Siginfo) Signo() int   { return int(int32(binary.LittleEndian.Uint32(s[0:]))) }
func (s *Siginfo) Code() int    { return int(int32(binary.LittleEndian.Uint32(s[8:]))) }
func (s *Siginfo) Addr() uint64 { return binary.LittleEndian.Uint64(s[16:]) }

// status is si_status of a SIGCHLD.
func (s *Siginfo) status() uint32 { return binary.LittleEndian.Uint32(s[24:]) }

// From <asm-generic/siginfo.h> and <asm-generic/signal.h>.
const (
	SITkill = -6
	SITimer = -2

	SigDfl = 0
	SigIgn = 1

	SARestart  = 0x10000000
	SARestorer = 0x04000000

	SigevSignal   = 0
	SigevNone     = 1
	SigevThread   = 2
	SigevThreadID = 4

	SSOnStack = 1
	SSDisable = 2
)

// KernelSigaction is struct kernel_sigaction of x86-64, as rt_sigaction(2)
// reads and writes it with a set size of 8.
type KernelSigaction struct {
	_        structs.HostLayout
	Handler  uint64
	Flags    uint64
	Restorer uint64
	Mask     uint64
}

// StackT is stack_t of sigaltstack(2).
type StackT struct {
	_     structs.HostLayout
	SP    uint64
	Flags int32
	_     uint32
	Size  uint64
}

// Sigevent is struct sigevent for timer_create(2), 64 bytes.
type Sigevent struct {
	_      structs.HostLayout
	Value  uint64
	Signo  int32
	Notify int32
	TID    int32
	_      [44]byte
}

// Timespec and Itimerspec are the kernel's 64-bit forms.
type Timespec struct {
	_         structs.HostLayout
	Sec, Nsec int64
}

type Itimerspec struct {
	_               structs.HostLayout
	Interval, Value Timespec
}

// Itimerval is struct itimerval.
type Itimerval struct {
	_                       structs.HostLayout
	IntervalSec, IntervalUS int64
	ValueSec, ValueUS       int64
}

// SigBit is signal sig's bit in a kernel sigset of one word.
func SigBit(sig int) uint64 { return 1 << (sig - 1) }
