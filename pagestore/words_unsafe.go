package pagestore

import "unsafe"

// wordsOf is mem, which mmap aligned, as 64-bit words.
func wordsOf(mem []byte) []uint64 {
	return unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/8)
}
