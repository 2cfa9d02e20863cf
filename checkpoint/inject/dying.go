package inject

import (
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
)

// dyingPatience is how long a thread may take to stop before it is looked whether it can.
const dyingPatience = 100 * time.Millisecond

// waitStop is sys.WaitStop of a thread that may have been killed. The first process of a PID
// namespace ends when all in that have been reaped (zap_pid_ns_processes,
// kernel/pid_namespace.c), those included that it has made in a batch: they are traced, and
// who would reap them waits here.
func waitStop(tid int) (unix.WaitStatus, error) {
	done := make(chan struct{})
	defer close(done)
	watch := time.AfterFunc(dyingPatience, func() {
		for {
			reapOf(tid)
			select {
			case <-done:
				return
			case <-time.After(dyingPatience):
			}
		}
	})
	defer watch.Stop()
	return sys.WaitStop(tid)
}

// exiting is PF_EXITING of <linux/sched.h>.
const exiting = 0x4

// reapOf reaps the children of process pid that have ended, if it is ending itself: nobody
// asks for them any more.
func reapOf(pid int) {
	if st, err := proc.ReadStat(pid); err != nil || st.Flags&exiting == 0 {
		return
	}
	all, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range all {
		child, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if st, err := proc.ReadStat(child); err == nil && st.PPID == pid && st.State == 'Z' {
			_ = unix.Waitid(unix.P_PID, child, nil, unix.WEXITED|unix.WNOHANG|unix.WALL, nil)
		}
	}
}
