package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
)

func (a *app) inspectCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect PID",
		Short: "Say what a process is made of, and whether it can move",
		Long: `Say what a process is made of, item by item, and whether each can be carried to
another host. The process is not touched. Exit status 3 says that it cannot move.`,
		Args: cobra.ExactArgs(1),
		RunE: ran(func(_ context.Context, args []string) error {
			pid, err := parsePID(args[0])
			if err != nil {
				return err
			}
			if err := needRoot("inspecting a process"); err != nil {
				return err
			}
			e, err := a.newEngine()
			if err != nil {
				return err
			}
			in, err := e.Inspect(pid, appliance.SourceOptions{})
			if err != nil {
				return fmt.Errorf("process %d: %w", pid, err)
			}
			if a.json {
				a.printJSON(in)
			} else {
				printInspection(a.out, in)
			}
			if !in.Movable {
				return &statusError{status: exitRefused, said: !a.json,
					err: fmt.Errorf("process %d: %w", pid, &migrate.Refusal{Reasons: in.Refusals()})}
			}
			return nil
		}),
	}
	a.jsonFlag(cmd)
	return cmd
}
