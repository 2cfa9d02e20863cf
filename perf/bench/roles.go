package bench

import (
	"os"

	"github.com/pageferry/pageferry/appliance/lab"
)

// roles are what this program is when it was run again under these names.
var roles = map[string]func(arg string) error{
	clientArg0: runClient,
	sinkArg0:   runSink,
	loadArg0:   runLoad,
	trackArg0:  runTrack,
	shownArg0:  runShown,
}

// Main returns at once in any process but those that this package started from
// its own program, in which it never returns. Call it before anything else.
func Main() {
	lab.Main()
	if len(os.Args) != 2 {
		return
	}
	run, ok := roles[os.Args[0]]
	if !ok {
		return
	}
	if err := run(os.Args[1]); err != nil {
		os.Stderr.WriteString(os.Args[0] + ": " + err.Error() + "\n")
		os.Exit(1)
	}
	os.Exit(0)
}
