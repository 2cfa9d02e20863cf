package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/checkpoint/store"
	"github.com/pageferry/pageferry/migrate"
)

func (a *app) checkpointCommand() *cobra.Command {
	var dir string
	var leave bool
	var tcp string
	cmd := &cobra.Command{
		Use:   "checkpoint PID --dir DIR",
		Short: "Write a process to a directory, and end it",
		Long: `Write a process to a directory, which must not exist yet. When all of it is on
the disk the process is ended, unless --leave-running. No daemon is needed.`,
		Args: cobra.ExactArgs(1),
		RunE: ran(func(ctx context.Context, args []string) error {
			pid, err := parsePID(args[0])
			if err != nil {
				return err
			}
			switch {
			case dir == "":
				return usagef("where to? say --dir DIR")
			case tcp != "" && tcp != "refuse" && tcp != "close":
				return usagef("--tcp %q is not known; it is one of refuse, close", tcp)
			}
			if _, err := os.Lstat(dir); err == nil {
				return usagef("%s exists; choose another directory", dir)
			}
			if err := needRoot("a checkpoint"); err != nil {
				return err
			}
			e, err := a.newEngine()
			if err != nil {
				return err
			}
			in, err := e.Inspect(pid, appliance.SourceOptions{TCP: tcp})
			if err != nil {
				return fmt.Errorf("process %d: %w", pid, err)
			}
			if !in.Movable {
				return fmt.Errorf("process %d: %w", pid, &migrate.Refusal{Reasons: in.Refusals()})
			}
			sum, err := store.Save(ctx, pid, dir, store.SaveOptions{LeaveRunning: leave, TCPClose: tcp == "close"})
			if err != nil {
				return fmt.Errorf("process %d runs on: %w", pid, err)
			}
			if a.json {
				a.printJSON(map[string]any{"source_pid": pid, "dir": dir, "outcome": appliance.OutcomeDone,
					"bytes_memory": sum.BytesMemory, "bytes_image": sum.BytesImage,
					"pages_total": sum.Pages, "pages_zero": sum.PagesZero, "left_running": leave})
				return nil
			}
			fmt.Fprintf(a.out, "process %d is in %s: %s of memory, %d pages, %d of them zero\n",
				pid, dir, bytesText(float64(sum.BytesMemory)), sum.Pages, sum.PagesZero)
			return nil
		}),
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory to write, which must not exist")
	cmd.Flags().BoolVar(&leave, "leave-running", false, "let the process go on afterwards")
	cmd.Flags().StringVar(&tcp, "tcp", "", "established TCP connections: refuse or close (default refuse)")
	_ = cmd.MarkFlagDirname("dir")
	a.jsonFlag(cmd)
	return cmd
}

func (a *app) restoreCommand() *cobra.Command {
	var dir, pidns string
	var lazy bool
	cmd := &cobra.Command{
		Use:   "restore --dir DIR",
		Short: "Make a process of a checkpoint; return when it runs",
		Long: `Make a process of a checkpoint, and return when it runs. It keeps its pid where
that is free, else it gets a pid namespace of its own. With --lazy it runs at
once, and its memory is read from the directory as it needs it; the directory
must stay until all of it was read. No daemon is needed.`,
		Args: cobra.NoArgs,
		RunE: ran(func(ctx context.Context, _ []string) error {
			switch {
			case dir == "":
				return usagef("from where? say --dir DIR")
			case pidns != "" && pidns != "auto" && pidns != "host" && pidns != "new":
				return usagef("--pidns %q is not known; it is one of auto, host, new", pidns)
			}
			if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
				return usagef("%s: no such directory", dir)
			}
			if err := needRoot("a restore"); err != nil {
				return err
			}
			pid, err := appliance.Restore(ctx, appliance.RestoreOptions{Dir: dir, PIDNamespace: pidns, Lazy: lazy})
			if err != nil {
				return fmt.Errorf("%s: %w", dir, err)
			}
			if a.json {
				a.printJSON(map[string]any{"dest_pid": pid, "dir": dir, "outcome": appliance.OutcomeDone, "lazy": lazy})
				return nil
			}
			fmt.Fprintf(a.out, "runs as process %d\n", pid)
			return nil
		}),
	}
	cmd.Flags().StringVar(&dir, "dir", "", "directory of the checkpoint")
	cmd.Flags().StringVar(&pidns, "pidns", "", "keep the pid in namespace: auto, host or new (default auto)")
	cmd.Flags().BoolVar(&lazy, "lazy", false, "run at once and read memory as it is needed")
	_ = cmd.MarkFlagDirname("dir")
	a.jsonFlag(cmd)
	return cmd
}
