// Guest runs a command in the guest of test/vm, as root, with the host's files
// under a throw-away layer: another kernel, soft-RoCE, soft-dirty bits.
//
//	go run ./test/vm/cmd/guest -- rdma link
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pageferry/pageferry/test/vm"
)

func main() {
	prepare := flag.Bool("prepare", false, "only fetch and build what is needed to boot")
	limit := flag.Duration("limit", time.Hour, "how long the command may take")
	memory := flag.Int("memory", vm.DefaultMemory, "the guest's memory in MiB")
	cpus := flag.Int("cpus", 2, "the guest's processors")
	quiet := flag.Bool("q", false, "do not tell how long it took")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: guest [flags] -- COMMAND ARG...\n       guest -prepare")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if *prepare {
		if _, err := vm.Prepare(ctx); err != nil {
			fail(err)
		}
		return
	}
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	dir, err := os.Getwd()
	if err != nil {
		fail(err)
	}
	r, err := vm.Run(ctx, vm.Job{
		Args: flag.Args(), Dir: dir, Limit: *limit, Memory: *memory, CPUs: *cpus,
		Stdout: os.Stdout, Stderr: os.Stderr,
	})
	if err != nil {
		fail(err)
	}
	if !*quiet {
		fmt.Fprintf(os.Stderr, "guest: booted in %.1f s, ran for %.1f s\n", r.Boot.Seconds(), r.Ran.Seconds())
	}
	if r.Signal != 0 {
		fmt.Fprintf(os.Stderr, "guest: ended by a signal: %v\n", r.Signal)
		os.Exit(128 + int(r.Signal)) // as shells do
	}
	os.Exit(r.Code)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
