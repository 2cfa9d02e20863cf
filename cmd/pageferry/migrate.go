package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/migrate"
)

// migrateOptions are the flags that migrate and demo share.
type migrateOptions struct {
	mode, trap, transport, compress string
	maxBandwidth                    string
	lanes                           int
	maxDowntime                     string
	throttle                        float64
	tcp                             string
	addresses                       []string
	pidns, onSourceExit, shown      string
}

func (o *migrateOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.mode, "mode", "auto", "when the pages move: hybrid (before and after the switch), precopy, postcopy or stop; auto is the daemon's default, which is to choose between hybrid and postcopy by what the process writes and the link carries")
	f.StringVar(&o.trap, "trap", "auto", "what traps pages that are not there yet: auto (memory by userfaultfd, files that are not there either by FUSE), uffd (no FUSE) or fuse (memory, too)")
	f.StringVar(&o.transport, "transport", "auto", "what carries the pages: auto, rdma or tcp")
	f.StringVar(&o.compress, "compress", "auto", "auto (what gets across sooner), lz4 (all that shrinks) or none")
	f.StringVar(&o.maxDowntime, "max-downtime", "", "how long the program may stand still at the switch, such as 50ms; with hybrid and precopy")
	f.Float64Var(&o.throttle, "throttle", 0, "how much of its time the program may be kept from running so that precopy converges, 0 to 0.99")
	f.StringVar(&o.maxBandwidth, "max-bandwidth", "", "of all page lanes together, as in 10Gbit or 500MiB per second, headers of packets included; none takes back the daemon's default; demand faults may go a quarter above it")
	f.IntVar(&o.lanes, "lanes", 0, "connections for background pages, 1 to 16 (default: the daemon's bulk_lanes, 2)")
	f.StringVar(&o.tcp, "tcp", "", "established TCP connections: refuse or close at the switch (default: the daemon's, refuse)")
	f.StringArrayVar(&o.addresses, "address", nil, "OLD=NEW: a listener's address there; may be repeated")
	f.StringVar(&o.pidns, "pidns", "", "keep the pid in namespace: auto, host or new (default: the daemon's, auto)")
	f.StringVar(&o.onSourceExit, "on-source-exit", "", "end of the copy here: kill, exit0 or stop-unit (default: the daemon's, kill)")
	f.StringVar(&o.shown, "shown", "", "what shows its memory as files there: drop it with the last page, or keep it, and the copy here, until \"pageferry release\" (default: the daemon's, drop)")
	complete := func(name string, values ...string) {
		_ = cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
	}
	complete("mode", "auto", "hybrid", "precopy", "postcopy", "stop")
	complete("trap", "auto", "uffd", "fuse")
	complete("transport", "auto", "rdma", "tcp")
	complete("compress", "auto", "lz4", "none")
	complete("tcp", "refuse", "close")
	complete("pidns", "auto", "host", "new")
	complete("on-source-exit", "kill", "exit0", "stop-unit")
	complete("shown", appliance.ShownDrop, appliance.ShownKeep)
}

// request checks the flags before anybody is asked anything.
func (o *migrateOptions) request() (appliance.MigrateRequest, error) {
	var r appliance.MigrateRequest
	for _, err := range []error{
		appliance.CheckMode(o.mode), appliance.CheckTrap(o.trap),
		appliance.CheckTransport(o.transport), appliance.CheckCompress(o.compress),
	} {
		if err != nil {
			return r, usagef("--%v", err)
		}
	}
	if o.maxDowntime != "" {
		d, err := time.ParseDuration(o.maxDowntime)
		if err != nil || d <= 0 {
			return r, usagef("--max-downtime %q is no time such as 50ms", o.maxDowntime)
		}
		r.MaxDowntimeMS = float64(d) / float64(time.Millisecond)
	}
	if !(o.throttle >= 0 && o.throttle < 1) {
		return r, usagef("--throttle %v is no part of the time: 0 to 0.99", o.throttle)
	}
	r.Throttle = o.throttle
	check := appliance.Config{Insecure: true, BulkLanes: o.lanes, Defaults: appliance.Defaults{
		TCP: o.tcp, PIDNS: o.pidns, OnSourceExit: o.onSourceExit, Shown: o.shown, MaxBandwidth: o.maxBandwidth}}
	if err := check.Validate(); err != nil {
		var fe *appliance.FieldError
		if errors.As(err, &fe) {
			flag := strings.ReplaceAll(strings.TrimPrefix(strings.TrimPrefix(fe.Field, "defaults."), "bulk_"), "_", "-")
			return r, usagef("--%s: %s", flag, fe.Msg)
		}
		return r, usagef("%v", err)
	}
	for _, a := range o.addresses {
		old, new, ok := strings.Cut(a, "=")
		if !ok || old == "" || new == "" {
			return r, usagef("--address %q is not OLD=NEW", a)
		}
		if r.Addresses == nil {
			r.Addresses = map[string]string{}
		}
		r.Addresses[old] = new
	}
	r.Mode, r.Trap, r.Transport = o.mode, o.trap, o.transport
	r.TCP, r.PIDNS, r.OnSourceExit = o.tcp, o.pidns, o.onSourceExit
	r.MaxBandwidth, r.Lanes, r.Compress, r.Shown = o.maxBandwidth, o.lanes, o.compress, o.shown
	return r, nil
}

func parsePID(s string) (int, error) {
	pid, err := strconv.Atoi(s)
	if err != nil || pid <= 0 {
		return 0, usagef("%q is no process id", s)
	}
	return pid, nil
}

func (a *app) migrateCommand() *cobra.Command {
	var o migrateOptions
	var to string
	var dry bool
	cmd := &cobra.Command{
		Use:   "migrate PID --to HOST[:PORT]",
		Short: "Move a process to another host",
		Long: `Move a process to another host. Before anything is touched the process is
inspected and the destination asked; what cannot be carried is refused by name
(exit status 3). Ctrl-C cancels while the process still runs here.

--dry-run does that, and then predicts what each mode would cost. For it the
process stands still for some milliseconds once, its writes are watched for 150 ms,
and at most 63 MiB of its pages cross the link, which the destination throws away.`,
		Args: cobra.ExactArgs(1),
		RunE: ran(func(ctx context.Context, args []string) error {
			req, err := o.request()
			if err != nil {
				return err
			}
			if req.PID, err = parsePID(args[0]); err != nil {
				return err
			}
			if req.To = to; to == "" {
				return usagef("where to? say --to HOST[:PORT]")
			}
			if dry {
				return a.dryRun(ctx, req)
			}
			return a.migrateNow(ctx, req)
		}),
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&to, "to", "", "the destination's daemon, HOST[:PORT]")
	cmd.Flags().BoolVar(&dry, "dry-run", false, "inspect the process, ask the destination, and predict what each mode would cost; the process stands still for some milliseconds once")
	a.jsonFlag(cmd)
	return cmd
}

func (a *app) migrateNow(ctx context.Context, req appliance.MigrateRequest) error {
	c := a.client()
	defer c.Close()
	rep, err := c.Migrate(ctx, req)
	if err != nil {
		a.jsonFailure(req, err)
		return err
	}
	return a.follow(ctx, c, rep.ID, true)
}

// jsonFailure is the last line of --json where no migration came to be.
func (a *app) jsonFailure(req appliance.MigrateRequest, err error) {
	if !a.json {
		return
	}
	o := appliance.OutcomeFailed
	if exitStatus(err) == exitRefused {
		o = appliance.OutcomeRefused
	}
	a.printJSON(appliance.Report{Mode: req.Mode, SourcePID: req.PID, Outcome: o, Reason: err.Error(),
		State: "checking", Rounds: []appliance.Round{}, Role: appliance.RoleSource, Peer: req.To})
}

// follow shows a migration until it is finished. With cancelable set, Ctrl-C
// asks the daemon to cancel it; a second one stops watching.
func (a *app) follow(ctx context.Context, c *appliance.Client, id string, cancelable bool) error {
	watch, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	go func() {
		select {
		case <-ctx.Done():
		case <-watch.Done():
			return
		}
		if cancelable {
			second := make(chan os.Signal, 1)
			signal.Notify(second, unix.SIGINT, unix.SIGTERM)
			defer signal.Stop(second)
			if _, err := c.Cancel(watch, id); err == nil {
				fmt.Fprintln(a.err, "canceling; once more to stop watching")
			} else {
				fmt.Fprintf(a.err, "not canceled: %s; once more to stop watching\n", oneLine(err))
			}
			select {
			case <-second:
			case <-watch.Done():
			}
		}
		stop()
	}()
	p := newProgress(a.err)
	rep, err := c.Watch(watch, id, p.update)
	p.finish()
	if err != nil {
		if errors.Is(err, context.Canceled) && ctx.Err() != nil {
			return &statusError{status: exitFailed, err: fmt.Errorf("stopped watching; \"pageferry watch %s\" goes on", id)}
		}
		return err
	}
	return a.result(rep)
}

// result prints a finished report and turns its outcome into an exit status.
func (a *app) result(rep appliance.Report) error {
	if a.json {
		a.printJSON(rep)
	} else {
		printSummary(a.out, rep)
	}
	status := outcomeStatus(rep.Outcome)
	if status == exitDone {
		return nil
	}
	reason := rep.Reason
	if reason == "" {
		reason = string(rep.Outcome)
	}
	return &statusError{status: status, err: fmt.Errorf("process %d to %s: %s", rep.SourcePID, rep.Peer, reason)}
}

func (a *app) printJSON(v any) {
	data, err := json.Marshal(v)
	if err != nil {
		fmt.Fprintln(a.err, "pageferry:", err)
		return
	}
	fmt.Fprintf(a.out, "%s\n", data)
}

func (a *app) dryRun(ctx context.Context, req appliance.MigrateRequest) error {
	c := a.client()
	defer c.Close()
	rep, err := c.DryRun(ctx, req)
	if err != nil {
		a.jsonFailure(req, err)
		return err
	}
	if a.json {
		a.printJSON(rep)
	} else {
		printInspection(a.out, rep.Inspection)
		if rep.Inspection.Movable && len(rep.Reasons) == 0 {
			fmt.Fprintf(a.out, "%s would take it.\n", rep.Destination)
			printOutlook(a.out, rep.Outlook)
		}
	}
	if !rep.Inspection.Movable {
		return fmt.Errorf("process %d: %w", req.PID, &migrate.Refusal{Reasons: rep.Inspection.Refusals()})
	}
	if len(rep.Reasons) > 0 {
		return fmt.Errorf("%s: process %d: %w", rep.Destination, req.PID, &migrate.Refusal{Reasons: rep.Reasons})
	}
	return nil
}
