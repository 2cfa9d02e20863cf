package workload

import "unsafe"

// addr is where a region begins in this process, for messages.
func (r *region) addr() uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(r.mem)))) }
