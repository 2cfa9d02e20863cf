package pager

import (
	"os"
	"runtime"
	"runtime/debug"
)

// relaxedGC is GOGC: the collector runs when the heap has grown to four times
// what was alive, 12 MiB at least, instead of twice and 4 MiB. The heaps of
// daemon and pager are a few MiB, so that it ran several times while a process
// stood still. There is no limit in bytes: one that a process with many runs of
// pages comes near would make it run all the time.
const relaxedGC = 300

// TuneRuntime sets the Go runtime of a daemon or pager up. What the environment
// says of the collector (GOGC) stays.
//
// A page lane keeps a processor of the scheduler while it waits a moment, and
// needs one when it comes back from a longer wait: there must always be one.
// Which thread runs is the kernel's to decide, which knows their priorities.
func TuneRuntime() {
	runtime.GOMAXPROCS(max(16, 2*runtime.NumCPU()))
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(relaxedGC)
	}
}
