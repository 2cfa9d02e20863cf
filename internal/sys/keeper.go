package sys

import "os"

// commandLine is os.Args as it was at the start: tests replace os.Args.
var commandLine = os.Args

func runtimeArgs() []string { return commandLine }
