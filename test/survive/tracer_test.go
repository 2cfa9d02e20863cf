package survive_test

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const envTracer = "PAGEFERRY_SURVIVE_TRACER"

// tracerMain returns at once unless this process is to be a debugger: then it
// attaches to the process named, says so, and holds it until it is killed.
func tracerMain() {
	pid, err := strconv.Atoi(os.Getenv(envTracer))
	if err != nil {
		return
	}
	runtime.LockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("attached")
	time.Sleep(time.Minute) // at most: the test ends this
	os.Exit(1)
}
