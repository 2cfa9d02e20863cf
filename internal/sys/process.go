package sys

import "structs"

// PrctlMMMap is struct prctl_mm_map of <linux/prctl.h>, for PR_SET_MM_MAP.
type PrctlMMMap struct {
	_          structs.HostLayout
	StartCode  uint64
	EndCode    uint64
	StartData  uint64
	EndData    uint64
	StartBrk   uint64
	Brk        uint64
	StartStack uint64
	ArgStart   uint64
	ArgEnd     uint64
	EnvStart   uint64
	EnvEnd     uint64
	Auxv       uint64 // address of the vector in the caller
	AuxvSize   uint32 // bytes
	ExeFD      uint32 // ^uint32(0) to leave the exe link alone
}

// CloneArgs is struct clone_args of <linux/sched.h>, version 2 (5.7).
type CloneArgs struct {
	_          structs.HostLayout
	Flags      uint64
	PIDFD      uint64
	ChildTID   uint64
	ParentTID  uint64
	ExitSignal uint64
	Stack      uint64
	StackSize  uint64
	TLS        uint64
	SetTID     uint64 // address of an array of pids, innermost namespace first
	SetTIDSize uint64
	Cgroup     uint64
}

// CapHeader and CapData are the version 3 structs of capget(2) and capset(2);
// the call takes two CapData, low word first.
type CapHeader struct {
	_       structs.HostLayout
	Version uint32
	PID     int32
}

type CapData struct {
	_                                 structs.HostLayout
	Effective, Permitted, Inheritable uint32
}

// CapVersion3 is _LINUX_CAPABILITY_VERSION_3.
const CapVersion3 = 0x20080522

// SchedAttr is struct sched_attr of <linux/sched/types.h>, version 0 (48 bytes).
type SchedAttr struct {
	_        structs.HostLayout
	Size     uint32
	Policy   uint32
	Flags    uint64
	Nice     int32
	Priority uint32
	Runtime  uint64
	Deadline uint64
	Period   uint64
}

// From <linux/prctl.h>, <linux/ioprio.h>, <linux/mman.h>.
const (
	PrTimerCreateRestoreIDs    = 77 // 6.15
	PrTimerCreateRestoreIDsOff = 0
	PrTimerCreateRestoreIDsOn  = 1

	IoprioWhoProcess = 1

	MadvGuardInstall = 102 // 6.13
	MadvGuardRemove  = 103
)
