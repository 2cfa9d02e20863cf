package pager

import (
	"fmt"
	"log/slog"
	"os"

	"github.com/pageferry/pageferry/internal/sys"
	"golang.org/x/sys/unix"
)

// controlFD is where the daemon's connection is when a pager starts.
const controlFD = 3

// Main is `pageferry pager`: args are the words after it, the migration's id
// among them for whoever looks at ps. It returns the exit status. Descriptor 3
// is the control connection to the daemon.
func Main(args []string) int {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// Whoever kills processes for memory should take others: a pager that dies
	// is a process that stands still.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0)
	id := ""
	if len(args) > 0 {
		id = args[0]
	}
	// First of all, while the heap is small.
	keeper, err := cloneKeeper(id)
	if err != nil {
		fmt.Fprintln(os.Stderr, "pageferry pager:", err)
		return 1
	}
	TuneRuntime()
	_ = unix.Setpriority(unix.PRIO_PROCESS, 0, -10)

	f := os.NewFile(controlFD, "control")
	unix.CloseOnExec(controlFD)
	c, err := fileConn(f)
	if err == nil {
		err = run(c, keeper, log)
	} else {
		_ = unix.Kill(keeper, unix.SIGKILL)
	}
	if err != nil {
		log.Error("pager ends", "err", err)
		return 1
	}
	return 0
}

// cloneKeeper starts a keeper, a child of this process.
func cloneKeeper(id string) (pid int, err error) {
	pid, err = sys.CloneKeeper("pageferry-keep", []byte("pageferry\x00keeper\x00"+id+"\x00"))
	if err != nil {
		return 0, fmt.Errorf("start keeper: %w", err)
	}
	return pid, nil
}
