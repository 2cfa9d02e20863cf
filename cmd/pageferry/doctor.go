package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
)

func (a *app) doctorCommand() *cobra.Command {
	var to []string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this host offers and lacks, with the fix for each",
		Args:  cobra.NoArgs,
		RunE: ran(func(ctx context.Context, _ []string) error {
			d := appliance.Doctor(ctx, to...)
			if a.json {
				a.printJSON(d)
			} else {
				tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
				for _, f := range d.Findings {
					fmt.Fprintf(tw, "%s\t%s\t%s\n", f.Verdict, f.Name, f.Found)
					if f.Fix != "" {
						fmt.Fprintf(tw, "\t\t-> %s\n", f.Fix)
					}
				}
				if err := tw.Flush(); err != nil {
					return err
				}
			}
			if !d.Ready {
				return errors.New("this host lacks what is marked as missing; nothing can move from or to it until that is fixed")
			}
			return nil
		}),
	}
	cmd.Flags().StringSliceVar(&to, "to", nil, "say which RDMA device leads to this host, too")
	a.jsonFlag(cmd)
	return cmd
}
