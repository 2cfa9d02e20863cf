package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
)

// pagerCommand is there so that help can name the role; main runs it before the
// command line is looked at.
func (a *app) pagerCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "pager",
		Short:              "Serve the pages of an arriving process; the daemon starts it",
		Hidden:             true,
		DisableFlagParsing: true,
		RunE: ran(func(context.Context, []string) error {
			return usagef("the pager is started by the daemon")
		}),
	}
}

func (a *app) restoreTailCommand() *cobra.Command {
	return &cobra.Command{
		Use:    appliance.LazyTail + " DIR ID",
		Short:  "See the pager of a lazy restore to its end; restore starts it",
		Hidden: true,
		Args:   cobra.ExactArgs(2),
		RunE: ran(func(ctx context.Context, args []string) error {
			return appliance.FinishLazy(ctx, args[0], args[1])
		}),
	}
}
