package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// QueryMapping finds the mapping that addr lies in. ENOENT where there is none;
// ENOTTY becomes *NotSupported.
func QueryMapping(fd int, addr uint64) (ProcmapQuery, error) { return queryMapping(fd, addr, 0) }

// NextMapping finds the mapping that addr lies in, or the first one behind it.
// ENOENT where there is none; ENOTTY becomes *NotSupported.
func NextMapping(fd int, addr uint64) (ProcmapQuery, error) {
	return queryMapping(fd, addr, procmapOrNext)
}

func queryMapping(fd int, addr, flags uint64) (ProcmapQuery, error) {
	q := ProcmapQuery{QueryAddr: addr, QueryFlags: flags}
	q.Size = uint64(unsafe.Sizeof(q))
	for {
		_, err := ioctlPtr(fd, PROCMAP_QUERY, unsafe.Pointer(&q))
		if err == unix.EINTR {
			continue
		}
		return q, missing("PROCMAP_QUERY", "6.11", err)
	}
}
