package sys

func cpuid(leaf, sub uint32) (a, b, c, d uint32)
func xgetbv() (lo, hi uint32)

// XState returns the features of the extended processor state that the kernel
// has enabled (XCR0) and the bytes that they take in XSAVE standard form; zeros
// on a processor without XSAVE.
func XState() (features uint64, size uint32) {
	const osxsave = 1 << 27
	if max, _, _, _ := cpuid(0, 0); max < 0xd {
		return 0, 0
	}
	if _, _, c, _ := cpuid(1, 0); c&osxsave == 0 {
		return 0, 0
	}
	lo, hi := xgetbv()
	_, size, _, _ = cpuid(0xd, 0)
	return uint64(hi)<<32 | uint64(lo), size
}
