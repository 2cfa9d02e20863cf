package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/pager"
)

const defaultConfig = "/etc/pageferry/daemon.yaml"

func (a *app) daemonCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "daemon",
		Short: "Run this host's daemon",
		Long: `Run this host's daemon in the foreground. It listens for its peers and, on a
unix socket, for the other commands. SIGTERM and Ctrl-C end it; processes that
arrived here live on, and unfinished migrations are taken up by the next daemon.`,
		Args: cobra.NoArgs,
		RunE: ran(func(ctx context.Context, _ []string) error {
			if err := needRoot("the daemon"); err != nil {
				return err
			}
			c, err := appliance.LoadConfig(path)
			if errors.Is(err, fs.ErrNotExist) {
				return usagef("%v; write one after configs/daemon.yaml, and name it with --config", err)
			}
			if err != nil {
				return usagef("%v", err)
			}
			engine, err := a.newEngine()
			if err != nil {
				return err
			}
			log := slog.New(slog.NewTextHandler(a.err, &slog.HandlerOptions{Level: c.Level()}))
			d, err := appliance.NewDaemon(c, engine, log)
			if err != nil {
				return err
			}
			pager.TuneRuntime()
			return d.Run(ctx)
		}),
	}
	cmd.Flags().StringVar(&path, "config", defaultConfig, "configuration file")
	_ = cmd.MarkFlagFilename("config", "yaml", "yml")
	return cmd
}
