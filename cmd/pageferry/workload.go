package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/perf/workload"
)

// workloadCommand hands its arguments on: the workload has flags of its own and
// its own ideas about signals, and must not be burdened with ours.
func (a *app) workloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "workload [flags]",
		Short:              "Run a process that dirties memory at a set rate and checks itself",
		DisableFlagParsing: true,
		RunE: ran(func(_ context.Context, args []string) error {
			if status := workload.Main(args); status != 0 {
				return &statusError{status: status, said: true, err: errors.New("the workload failed")}
			}
			return nil
		}),
	}
}
