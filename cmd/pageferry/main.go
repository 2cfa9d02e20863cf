// Command pageferry moves running processes between hosts. It is thin: the
// daemon and everything that touches a process is in package appliance and
// below; here are the command line, the progress display and the exit status.
package main

import (
	"context"
	"math"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/perf/workload"
)

func main() {
	// What a shell left open is not for the programs that we start: a process
	// that inherits it has one more thing that keeps it from moving.
	_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	lab.Main() // does not return in the init of a lab's host
	// These two take nothing from the command line's machinery, least of all
	// its handling of signals: one is a role, the other a guinea pig.
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "pager":
			os.Exit(pager.Main(os.Args[2:]))
		case "workload":
			os.Exit(workload.Main(os.Args[2:]))
		}
	}
	os.Exit(mainStatus())
}

func mainStatus() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	return run(ctx, os.Args[1:], streams{in: os.Stdin, out: os.Stdout, err: os.Stderr})
}
