package sys

import "structs"

// PROCMAP_QUERY is the request number, of a /proc/PID/maps descriptor:
// <linux/fs.h>, 6.11.
var PROCMAP_QUERY = IOWR('f', 17, 104)

// ProcmapQuery is struct procmap_query, without a name or a build id.
type ProcmapQuery struct {
	_          structs.HostLayout
	Size       uint64
	QueryFlags uint64
	QueryAddr  uint64
	Start, End uint64
	Flags      uint64 // ProcmapVMA...
	PageSize   uint64
	Offset     uint64
	Ino        uint64
	DevMajor   uint32
	DevMinor   uint32
	nameSize   uint32
	idSize     uint32
	nameAddr   uint64
	idAddr     uint64
}

// PROCMAP_QUERY_VMA_*.
const (
	ProcmapVMAReadable   = 0x01
	ProcmapVMAWritable   = 0x02
	ProcmapVMAExecutable = 0x04
	ProcmapVMAShared     = 0x08
)

// PROCMAP_QUERY_COVERING_OR_NEXT_VMA.
const procmapOrNext = 0x10
