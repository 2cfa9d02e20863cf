package workload

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// Main is the command: it parses args (without the command's name), runs until
// SIGTERM or SIGINT and returns the exit status: 0 all verified, 1 a wrong byte
// or another failure, 2 wrong usage.
func Main(args []string) int { return run(args, os.Stdout, os.Stderr) }

func run(args []string, stdout, stderr io.Writer) int {
	var cfg Config
	fs := flag.NewFlagSet("workload", flag.ContinueOnError)
	fs.SetOutput(stderr)
	cfg.AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "workload: unexpected %q\n", fs.Arg(0))
		return 2
	}
	return runConfig(cfg, stdout, stderr)
}

func runConfig(cfg Config, stdout, stderr io.Writer) int {
	// Whoever read standard output may stay behind when this process moves.
	signal.Ignore(unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	// Next to nothing is allocated; without the collector no thread ever waits
	// for another that sits in a page fault.
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(256 << 20)
	err := Run(ctx, cfg, stdout)
	if err == nil {
		return 0
	}
	fmt.Fprintf(stderr, "workload: %v\n", err)
	if errors.Is(err, ErrConfig) {
		return 2
	}
	return 1
}
