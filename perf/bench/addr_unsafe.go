package bench

import "unsafe"

// addr is where b, which must not be Go heap memory, begins.
func addr(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
