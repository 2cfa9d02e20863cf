package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
)

// defaultLink is what predictions of inspect assume where nothing is said.
const defaultLink = "10Gbit"

// inspected is what inspect --json prints.
type inspected struct {
	appliance.Inspection
	*appliance.Outlook // with --measure
}

func (a *app) inspectCommand() *cobra.Command {
	var measure bool
	var linkText string
	cmd := &cobra.Command{
		Use:   "inspect PID",
		Short: "Say what a process is made of, and whether it can move",
		Long: `Say what a process is made of, item by item, and whether each can be carried to
another host. The process is not touched. Exit status 3 says that it cannot move.

With --measure it is: it stands still for some milliseconds once, and its writes are
watched for 150 ms. From that follows what each mode would cost over a link of the
rate that --link says. "migrate --dry-run" measures the link as well.`,
		Args: cobra.ExactArgs(1),
		RunE: ran(func(ctx context.Context, args []string) error {
			pid, err := parsePID(args[0])
			if err != nil {
				return err
			}
			link, err := appliance.ParseBandwidth(linkText)
			if err != nil || link == 0 {
				return usagef("--link %s is no rate such as 10Gbit or 500MiB", linkText)
			}
			if !measure && linkText != defaultLink {
				return usagef("--link is for predictions: say --measure as well")
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
			out := inspected{Inspection: in}
			if measure {
				out.Outlook = measured(ctx, e, pid, link)
			}
			if a.json {
				a.printJSON(out)
			} else {
				printInspection(a.out, in)
				printOutlook(a.out, out.Outlook)
			}
			if !in.Movable {
				return &statusError{status: exitRefused, said: !a.json,
					err: fmt.Errorf("process %d: %w", pid, &migrate.Refusal{Reasons: in.Refusals()})}
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&measure, "measure", false, "watch its writes for 150 ms and predict what each mode would cost; it stands still for some milliseconds once")
	cmd.Flags().StringVar(&linkText, "link", defaultLink, "what the link carries, as in 10Gbit or 500MiB per second, for --measure")
	a.jsonFlag(cmd)
	return cmd
}

// measured is what the model says; what keeps it from that is part of the answer.
func measured(ctx context.Context, e appliance.Engine, pid int, link appliance.Bandwidth) *appliance.Outlook {
	o, err := appliance.Measure(ctx, e, pid, link)
	if err != nil {
		return &appliance.Outlook{Predictions: []migrate.Predicted{}, Unmeasured: oneLine(err)}
	}
	return o
}
