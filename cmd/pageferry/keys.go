package main

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance/keys"
)

const defaultKeysDir = "/etc/pageferry"

func (a *app) keysCommand() *cobra.Command {
	var dir, out string
	cmd := &cobra.Command{
		Use:   "keys",
		Short: "Make an authority and host keys for mutual TLS",
		Long: `Make an authority and host keys for mutual TLS. The authority's key (ca-key.pem)
stays on one machine; a host needs ca.pem and its own two files.`,
	}
	cmd.PersistentFlags().StringVar(&dir, "dir", defaultKeysDir, "directory of the authority")
	_ = cmd.MarkPersistentFlagDirname("dir")
	issue := &cobra.Command{
		Use:   "issue NAME",
		Short: "Make a certificate and key for the host NAME",
		Args:  cobra.ExactArgs(1),
		RunE: ran(func(_ context.Context, args []string) error {
			if out == "" {
				out = dir
			}
			if err := keys.CheckName(args[0]); err != nil {
				return usagef("%v", err)
			}
			if err := keys.Issue(dir, args[0], out); err != nil {
				return err
			}
			cert, key := keys.HostFiles(args[0])
			fmt.Fprintf(a.out, "# for the configuration of %s:\ntls:\n  ca: %s\n  cert: %s\n  key: %s\n", args[0],
				filepath.Join(dir, keys.AuthorityCert), filepath.Join(out, cert), filepath.Join(out, key))
			return nil
		}),
	}
	issue.Flags().StringVar(&out, "out", "", "where to write it (default: the authority's directory)")
	_ = issue.MarkFlagDirname("out")
	cmd.AddCommand(&cobra.Command{
		Use:   "init",
		Short: "Make the authority, once, on the machine that keeps it",
		Args:  cobra.NoArgs,
		RunE: ran(func(context.Context, []string) error {
			if err := keys.Init(dir); err != nil {
				return err
			}
			fmt.Fprintf(a.out, "the authority is in %s; \"pageferry keys issue NAME\" makes a host's key\n", dir)
			return nil
		}),
	}, issue)
	return cmd
}
