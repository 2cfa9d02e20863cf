package sys

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// PagemapScan is one PAGEMAP_SCAN ioctl. It fills vec and returns how many
// entries it wrote; a.WalkEnd is where the walk ended. ENOTTY becomes
// *NotSupported.
func PagemapScan(fd int, a *PMScanArg, vec []PageRegion) (int, error) {
	a.fill(vec)
	for {
		// vec stays reachable through the argument, and the heap does not move.
		n, err := ioctlPtr(fd, PAGEMAP_SCAN, unsafe.Pointer(a))
		if err == unix.EINTR {
			continue
		}
		return int(n), missing("PAGEMAP_SCAN", "6.7", err)
	}
}

// PagemapScanNow is PagemapScan for a range that is walked in some microseconds.
// It keeps the goroutine's P, see AwaitReady.
func PagemapScanNow(fd int, a *PMScanArg, vec []PageRegion) (int, error) {
	a.fill(vec)
	n, _, e := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), PAGEMAP_SCAN, uintptr(unsafe.Pointer(a)))
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

func (a *PMScanArg) fill(vec []PageRegion) {
	a.Size = uint64(unsafe.Sizeof(*a))
	a.vec = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(vec))))
	a.vecLen = uint64(len(vec))
}
