package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/cmd/pageferry/demo"
	"github.com/pageferry/pageferry/migrate"
)

func (a *app) demoCommand() *cobra.Command {
	var o migrateOptions
	cfg := demo.Config{Size: 1 << 30, Hops: 2}
	size := appliance.Size(cfg.Size)
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Two hosts on this machine, and a redis under load that moves between them",
		Long: `Make two hosts on this machine, run a daemon in each, load redis-server with
data, keep clients writing to it and checking every answer, and move it there
and back. Everything is removed at the end, also after Ctrl-C.`,
		Args: cobra.NoArgs,
		RunE: ran(func(ctx context.Context, _ []string) error {
			req, err := o.request()
			if err != nil {
				return err
			}
			if err := needRoot("the demo"); err != nil {
				return err
			}
			if req.Mode == "auto" {
				req.Mode = string(migrate.ModeHybrid)
			}
			cfg.Size, cfg.Request = uint64(size), req
			if err := cfg.Validate(); err != nil {
				return usagef("%v", err)
			}
			cfg.Out = a.err
			p := newProgress(a.err)
			defer func() { p.finish() }()
			cfg.OnProgress = func(r appliance.Report) {
				p.update(r)
				if r.Finished() {
					p.finish()
					p = newProgress(a.err)
				}
			}
			res, err := demo.Run(ctx, cfg)
			if res != nil && (a.json || len(res.Hops) > 0) {
				if a.json {
					a.printJSON(res)
				} else {
					res.Print(a.out)
				}
			}
			return err
		}),
	}
	o.flags(cmd)
	f := cmd.Flags()
	f.Var(&size, "size", "data in redis")
	f.IntVar(&cfg.Hops, "hops", cfg.Hops, "how often it moves; 2 is there and back")
	f.IntVar(&cfg.Clients, "clients", 4, "clients that write and check")
	f.BoolVar(&cfg.Insecure, "insecure", false, "leave out TLS between the two daemons")
	f.BoolVar(&cfg.PlainPages, "plain-pages", false, "leave out TLS for pages only")
	f.BoolVar(&cfg.Verbose, "verbose", false, "show the daemons' logs")
	a.jsonFlag(cmd)
	return cmd
}
