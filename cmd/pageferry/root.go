package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
)

type streams struct {
	in       io.Reader
	out, err io.Writer
}

// app is what every command shares.
type app struct {
	streams
	socket string
	json   bool
	// newEngine makes the engine that touches processes; tests replace it.
	newEngine func() (appliance.Engine, error)
}

// run is the whole program but for the process around it.
func run(ctx context.Context, args []string, s streams) int {
	return runApp(ctx, &app{streams: s, newEngine: newEngine}, args)
}

func runApp(ctx context.Context, a *app, args []string) int {
	root := a.root()
	root.SetArgs(args)
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	// What did not come out of a command's own work came from cobra: a wrong
	// flag, a wrong number of arguments, an unknown command.
	var ran *ranError
	if !errors.As(err, &ran) {
		fmt.Fprintf(a.err, "pageferry: %v\nTry \"%s --help\".\n", oneLine(err), cmd.CommandPath())
		return exitUsage
	}
	err = ran.err
	status := exitStatus(err)
	var se *statusError
	if !errors.As(err, &se) || !se.said {
		fmt.Fprintf(a.err, "pageferry: %s\n", oneLine(clean(err)))
	}
	return status
}

// oneLine keeps the promise that an error is one line.
func oneLine(err error) string {
	return strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "\n", "; ")), " ")
}

type ranError struct{ err error }

func (e *ranError) Error() string { return e.err.Error() }

type commandFunc func(ctx context.Context, args []string) error

// ran marks the errors of a command's own work.
func ran(f commandFunc) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := f(cmd.Context(), args); err != nil {
			return &ranError{err: err}
		}
		return nil
	}
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "pageferry",
		Short: "Move a running process to another host while it keeps working",
		Long: `pageferry moves a running Linux process from one host to another while it keeps
working: its memory follows after the switch, fetched page by page as the
program needs it and streamed in the background.

A daemon runs on each host ("pageferry daemon"). Most commands talk to the one
on this host. To see it all on one machine: sudo pageferry demo`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version(),
	}
	root.SetVersionTemplate("pageferry {{.Version}}\n")
	socket := os.Getenv("PAGEFERRY_SOCKET")
	if socket == "" {
		socket = appliance.DefaultSocket
	}
	root.PersistentFlags().StringVar(&a.socket, "socket", socket, "the daemon's API socket (environment PAGEFERRY_SOCKET)")
	root.AddCommand(
		a.daemonCommand(), a.migrateCommand(), a.inspectCommand(),
		a.checkpointCommand(), a.restoreCommand(),
		a.listCommand(), a.showCommand(), a.watchCommand(), a.cancelCommand(), a.releaseCommand(), a.resolveCommand(),
		a.bulkCommand(), a.keysCommand(), a.doctorCommand(), a.demoCommand(), a.workloadCommand(),
		a.pagerCommand(), a.restoreTailCommand(),
	)
	return root
}

func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(unknown)"
	}
	v := info.Main.Version
	if v == "" {
		v = "(devel)"
	}
	return v + " " + info.GoVersion
}

func (a *app) jsonFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.json, "json", false, "print one JSON object as the last line")
}

func (a *app) client() *appliance.Client { return appliance.NewClient(a.socket) }

func needRoot(what string) error {
	if os.Geteuid() != 0 {
		return &statusError{status: exitRefused, err: fmt.Errorf("%s needs root: run it with sudo", what)}
	}
	return nil
}
