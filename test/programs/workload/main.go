// Workload is `pageferry workload` as a program of its own, so that tests of the
// lower packages can start it without building everything above them.
package main

import (
	"os"

	"github.com/pageferry/pageferry/perf/workload"
)

func main() { os.Exit(workload.Main(os.Args[1:])) }
