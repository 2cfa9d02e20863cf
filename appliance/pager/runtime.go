package pager

import (
	"math"
	"runtime"
	"runtime/debug"
)

// The collector runs when the heap has grown to five times what was alive, or
// near relaxedHeap, instead of twice. The heaps of daemon and pager are a few
// MiB, so that it ran several times while a process stood still.
const (
	relaxedPercent = 400
	relaxedHeap    = 64 << 20
)

// TuneRuntime sets the Go runtime of a daemon or pager up. Limits for memory
// that the environment sets (GOGC, GOMEMLIMIT) stay.
//
// A page lane keeps a processor of the scheduler while it waits a moment, and
// needs one when it comes back from a longer wait: there must always be one.
// Which thread runs is the kernel's to decide, which knows their priorities.
func TuneRuntime() {
	runtime.GOMAXPROCS(max(16, 2*runtime.NumCPU()))
	const unset = 100 // the runtime's own
	if old := debug.SetGCPercent(relaxedPercent); old != unset {
		debug.SetGCPercent(old)
	}
	if debug.SetMemoryLimit(-1) == math.MaxInt64 {
		debug.SetMemoryLimit(relaxedHeap)
	}
}
