package sys

import "unsafe"

// AsBytes returns the bytes of *p, sharing its memory. T must be a kernel struct
// of this package (fixed layout, no Go pointers).
func AsBytes[T any](p *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(p)), unsafe.Sizeof(*p))
}

// FromBytes copies b, which must be long enough, into a T; ok is false where it
// is not. T is as for AsBytes.
func FromBytes[T any](b []byte) (v T, ok bool) {
	if uintptr(len(b)) < unsafe.Sizeof(v) {
		return v, false
	}
	copy(AsBytes(&v), b)
	return v, true
}

// SizeOf is the size in bytes of a kernel struct.
func SizeOf[T any]() int {
	var v T
	return int(unsafe.Sizeof(v))
}

// Address is where b lies in this program's memory. It stays there only if b is
// not of the Go heap.
func Address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }
