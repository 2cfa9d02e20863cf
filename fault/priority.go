package fault

import (
	"log/slog"
	"runtime"

	"golang.org/x/sys/unix"
)

// RaisePriority locks the calling goroutine to its thread and lets that thread
// run before the program's: a fault handler that waits for the processor makes
// the program wait with it. It does what the host allows, and returns what ends
// it. For goroutines that answer faults, not for those that move bulk.
func RaisePriority(log *slog.Logger) (release func()) { return raisePriority(log) }

func raisePriority(log *slog.Logger) func() {
	runtime.LockOSThread()
	attr := &unix.SchedAttr{
		Size:     unix.SizeofSchedAttr,
		Policy:   unix.SCHED_RR,
		Flags:    unix.SCHED_FLAG_RESET_ON_FORK,
		Priority: 1,
	}
	if err := unix.SchedSetAttr(0, attr, 0); err != nil {
		tid := unix.Gettid()
		if err2 := unix.Setpriority(unix.PRIO_PROCESS, tid, -20); err2 != nil && log != nil {
			log.Warn("fault handlers run at normal priority: faults take longer when the host is busy", "err", err2)
		}
	}
	// A thread that was changed must not serve other goroutines: not unlocking
	// ends it with its goroutine.
	return func() {}
}
