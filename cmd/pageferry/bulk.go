package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance/bulk"
)

// bulkState is where runs are kept that name no other place.
func bulkState() string {
	if os.Geteuid() == 0 {
		return "/var/lib/pageferry/bulk"
	}
	if dir := os.Getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "pageferry", "bulk")
	}
	home, _ := os.UserHomeDir()
	return filepath.Join(home, ".local", "state", "pageferry", "bulk")
}

func (a *app) bulkCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bulk plan|run|status FILE",
		Short: "Move many processes, as a configuration says",
		Long: `Move many processes, as one YAML file says: which, to where, how many at one time.
It can run on any machine that reaches the daemons of the hosts (api_listen and
operators in their configuration), with a certificate of the same authority.

A run moves what is not where the file says that it should be, so it can be begun
again at any time: after a kill it goes on where it was, and when all is done it
does nothing. docs/bulk.md describes the file.`,
	}
	var state string
	cmd.PersistentFlags().StringVar(&state, "state", bulkState(), "directory in which runs are kept")
	sub := func(use, short string, f func(ctx context.Context, file *bulk.File) error) {
		c := &cobra.Command{Use: use + " FILE", Short: short, Args: cobra.ExactArgs(1), RunE: ran(func(ctx context.Context, args []string) error {
			file, err := bulk.Load(args[0])
			if err != nil {
				return &statusError{status: exitUsage, err: err}
			}
			return f(ctx, file)
		})}
		a.jsonFlag(c)
		cmd.AddCommand(c)
	}
	sub("plan", "Show what a run would do, and what it would cost", a.bulkPlan)
	sub("run", "Move what is to be moved, or go on with it", func(ctx context.Context, f *bulk.File) error { return a.bulkRun(ctx, f, state) })
	sub("status", "Show how far a run is", func(_ context.Context, f *bulk.File) error { return a.bulkStatus(f, state) })
	return cmd
}

func (a *app) bulkPlan(ctx context.Context, f *bulk.File) error {
	plan, err := bulk.Plan(ctx, f)
	if err != nil {
		return err
	}
	if a.json {
		a.printJSON(map[string]any{"name": f.Name, "plan": plan})
		return nil
	}
	if len(plan) == 0 {
		fmt.Fprintln(a.out, "nothing to do: all that the groups select is where it should be")
		return nil
	}
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "GROUP\tPROCESS\tFROM\tTO\tMEMORY\tMODE\tTIME\tDOWNTIME\tWIRE\t")
	for _, i := range plan {
		fmt.Fprintf(tw, "%s\t%d %s\t%s\t%s\t%s\t", i.Group, i.PID, i.Command, i.Host, i.To, bytesText(float64(i.Memory)))
		switch {
		case i.State == bulk.Refused:
			fmt.Fprintf(tw, "refused: %s\t\t\t\t\n", i.Reason)
		case i.Unknown != "":
			fmt.Fprintf(tw, "?\t\t\t\t%s\n", i.Unknown)
		default:
			fmt.Fprintf(tw, "%s\t%.1f s\t%.0f ms\t%s\t\n", i.Mode, i.TotalMS/1000, i.DowntimeMS, bytesText(float64(i.BytesWire)))
		}
	}
	return tw.Flush()
}

func (a *app) bulkRun(ctx context.Context, f *bulk.File, state string) error {
	store, err := bulk.OpenFile(state, f.Name)
	if err != nil {
		return &statusError{status: exitRefused, err: err}
	}
	defer store.Close()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	progress := func(format string, args ...any) {
		fmt.Fprintf(a.err, format+"\n", args...)
	}
	items, err := bulk.Run(ctx, bulk.Config{File: f, Store: store, Log: slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: slog.LevelWarn})),
		OnChange: func(i bulk.Item) {
			switch i.State {
			case bulk.Moving:
				progress("%s moves to %s", &i, i.To)
			case bulk.Done:
				progress("%s is on %s as %d: %.1f s, downtime %.0f ms, %s", &i, i.To, i.DestPID, i.TotalMS/1000, i.DowntimeMS, bytesText(float64(i.BytesWire)))
			case bulk.Waiting:
				if i.Reason != "" {
					progress("%s will be tried again: %s", &i, i.Reason)
				}
			default:
				progress("%s: %s: %s", &i, i.State, i.Reason)
			}
		}})
	if err != nil && ctx.Err() != nil {
		return &statusError{status: exitFailed, err: fmt.Errorf("interrupted; migrations that are under way go on, and running it again finishes: pageferry bulk run")}
	}
	if err != nil {
		return err
	}
	a.printItems(f.Name, items)
	return itemsError(items)
}

func (a *app) bulkStatus(f *bulk.File, state string) error {
	items, err := bulk.ReadFile(state, f.Name)
	if err != nil {
		return err
	}
	a.printItems(f.Name, items)
	return nil
}

// printItems is the table of a run.
func (a *app) printItems(name string, items []bulk.Item) {
	if a.json {
		if items == nil {
			items = []bulk.Item{}
		}
		a.printJSON(map[string]any{"name": name, "items": items})
		return
	}
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "GROUP\tPROCESS\tFROM\tTO\tSTATE\tNEW PID\tTIME\tDOWNTIME\tWIRE\tREASON")
	for _, i := range items {
		fmt.Fprintf(tw, "%s\t%d %s\t%s\t%s\t%s\t", i.Group, i.PID, i.Command, i.Host, i.To, i.State)
		if i.State == bulk.Done {
			fmt.Fprintf(tw, "%d\t%.1f s\t%.0f ms\t%s\t%s\n", i.DestPID, i.TotalMS/1000, i.DowntimeMS, bytesText(float64(i.BytesWire)), i.Reason)
		} else {
			fmt.Fprintf(tw, "\t\t\t\t%s\n", i.Reason)
		}
	}
	_ = tw.Flush() // as all that is printed
}

// itemsError is the exit status of a run.
func itemsError(items []bulk.Item) error {
	left, doubt := 0, 0
	for _, i := range items {
		switch i.State {
		case bulk.Done, bulk.Gone:
		case bulk.InDoubt:
			doubt++
		default:
			left++
		}
	}
	switch {
	case doubt > 0:
		return &statusError{status: exitInDoubt, err: fmt.Errorf("%d processes are in doubt: their reasons say what to do", doubt)}
	case left > 0:
		return &statusError{status: exitFailed, err: fmt.Errorf("%d processes have not moved; they run on where they were, and running it again tries them again", left)}
	}
	return nil
}
