package main

import (
	"context"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
)

func (a *app) listCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the migrations that this host's daemon knows",
		Args:  cobra.NoArgs,
		RunE: ran(func(ctx context.Context, _ []string) error {
			c := a.client()
			defer c.Close()
			rs, err := c.List(ctx)
			if err != nil {
				return err
			}
			if a.json {
				if rs == nil {
					rs = []appliance.Report{}
				}
				a.printJSON(map[string]any{"migrations": rs})
				return nil
			}
			tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(tw, "ID\tROLE\tPID\tPROCESS\tPEER\tMODE\tSTATE\tPAGES LEFT\tSTARTED")
			for _, r := range rs {
				state := r.State
				if r.Finished() {
					state = string(r.Outcome)
				}
				fmt.Fprintf(tw, "%.12s\t%s\t%d\t%s\t%s\t%s\t%s\t%d\t%s\n", r.ID, r.Role, r.SourcePID, r.Comm,
					r.Peer, r.Mode, state, pagesLeft(r), r.Started.Local().Format(time.DateTime))
			}
			return tw.Flush()
		}),
	}
	a.jsonFlag(cmd)
	return cmd
}

// completeIDs offers the ids of migrations to the shell.
func (a *app) completeIDs(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c := a.client()
	defer c.Close()
	rs, err := c.List(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var ids []string
	for _, r := range rs {
		ids = append(ids, fmt.Sprintf("%.12s\t%s %d %s", r.ID, r.Role, r.SourcePID, r.Comm))
	}
	return ids, cobra.ShellCompDirectiveNoFileComp
}

func (a *app) idCommand(use, short string, f func(ctx context.Context, c *appliance.Client, id string) error) *cobra.Command {
	cmd := &cobra.Command{
		Use:               use + " ID",
		Short:             short,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: a.completeIDs,
		RunE: ran(func(ctx context.Context, args []string) error {
			c := a.client()
			defer c.Close()
			return f(ctx, c, args[0])
		}),
	}
	a.jsonFlag(cmd)
	return cmd
}

// printReport is a report as the user asked for it.
func (a *app) printReport(r appliance.Report) {
	if a.json {
		a.printJSON(r)
	} else {
		printSummary(a.out, r)
	}
}

func (a *app) showCommand() *cobra.Command {
	var mem bool
	var part string
	cmd := a.idCommand("show", "Show one migration, or where its memory can be read; the beginning of its id is enough",
		func(ctx context.Context, c *appliance.Client, id string) error {
			if part != "" {
				return a.dumpMemory(ctx, c, id, part)
			}
			if mem {
				return a.showMemory(ctx, c, id)
			}
			r, err := c.Show(ctx, id)
			if err != nil {
				return err
			}
			a.printReport(r)
			return nil
		})
	cmd.Long = `Show one migration; the beginning of its id is enough.

--mem says where the memory of a process that arrives on this host can be read: the
source's, as it was frozen, whatever the process has written since. --range prints a
part of it. What is not here yet is fetched, after all that the process itself waits
for. docs/reading.md has examples.`
	cmd.Flags().BoolVar(&mem, "mem", false, "say where the memory of a process that arrives here can be read, and how much of it is here")
	cmd.Flags().StringVar(&part, "range", "", "START-END, in hexadecimal as in maps, or a name there such as [stack]: print these bytes, on a terminal in hexadecimal")
	_ = cmd.RegisterFlagCompletionFunc("range", a.completeRanges)
	return cmd
}

func (a *app) watchCommand() *cobra.Command {
	return a.idCommand("watch", "Follow a migration to its end",
		func(ctx context.Context, c *appliance.Client, id string) error {
			return a.follow(ctx, c, id, false)
		})
}

func (a *app) cancelCommand() *cobra.Command {
	return a.idCommand("cancel", "Cancel a migration that has not switched over; the process runs on here",
		func(ctx context.Context, c *appliance.Client, id string) error {
			if _, err := c.Cancel(ctx, id); err != nil {
				return err
			}
			r, err := c.Watch(ctx, id, nil)
			if err != nil {
				return err
			}
			a.printReport(r)
			if r.Outcome == appliance.OutcomeCanceled {
				return nil
			}
			return &statusError{status: exitFailed, err: fmt.Errorf("migration %s was not canceled: %s", r.ID, r.Outcome)}
		})
}

func (a *app) releaseCommand() *cobra.Command {
	cmd := a.idCommand("release", "Let go of memory that migrate --shown keep keeps readable on this host",
		func(ctx context.Context, c *appliance.Client, id string) error {
			r, err := c.Release(ctx, id)
			if err != nil {
				return err
			}
			a.printReport(r)
			return nil
		})
	cmd.Long = `Let go of memory that migrate --shown keep keeps readable on this host. The
source ends its copy, and the migration is over. Before the last page has arrived it is
as if the migration had been begun without --shown keep.`
	return cmd
}

func (a *app) resolveCommand() *cobra.Command {
	var owner string
	cmd := a.idCommand("resolve", "Decide whose a process is, where a host was lost in the middle of its switch",
		func(ctx context.Context, c *appliance.Client, id string) error {
			if owner == "" {
				return usagef("--owner source or --owner destination: where is the process to run?")
			}
			r, err := c.Resolve(ctx, id, appliance.ResolveRequest{Owner: owner})
			if err != nil {
				return err
			}
			a.printReport(r)
			return nil
		})
	cmd.Long = `Decide whose a process is, where a host or its journal was lost in the middle of its switch.

Say it on the host whose copy is to be let run or ended. The other host obeys when it is back, whatever it
believes then: its copy is ended, or frozen where nothing could be said any more. Before you give the process to one
host make sure that the copy on the other does not run, or is gone with its host. docs/handover.md says what each
state means.`
	cmd.Flags().StringVar(&owner, "owner", "", "source or destination: the host on which the process is to run")
	_ = cmd.RegisterFlagCompletionFunc("owner", cobra.FixedCompletions([]string{appliance.OwnerSource, appliance.OwnerDestination}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}
