package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/page"
)

// shownFiles are what show --mem lists.
var shownFiles = []struct{ name, what string }{
	{"mem", "the address space: offset = address"},
	{"maps", "its mappings, as in /proc/PID/maps"},
	{"vma/", "a file for each mapping, START-END"},
	{"files/", "the files that it has mapped, by their paths at the source"},
	{"status", "how far it is, as JSON"},
	{"resident", "a bit for each page that has content, 1 where it is here"},
}

// showMemory says where memory can be read. It reads nothing of it, so it never waits.
func (a *app) showMemory(ctx context.Context, c *appliance.Client, id string) error {
	m, err := c.Memory(ctx, id)
	if err != nil {
		return err
	}
	if a.json {
		a.printJSON(m)
		return nil
	}
	fmt.Fprintf(a.out, "The memory of %s (%s), as it was frozen on %s, for root, to be read only:\n", m.Comm, pidText(m.PID), m.Peer)
	tw := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	for _, f := range shownFiles {
		fmt.Fprintf(tw, "%s\t%s\n", filepath.Join(m.Dir, f.name)+strings.Repeat("/", strings.Count(f.name, "/")), f.what)
	}
	_ = tw.Flush()
	if m.PagesTotal == 0 {
		fmt.Fprintln(a.out, "It is just being rebuilt here: how much of it there is will be known in a moment.")
	} else {
		fmt.Fprintf(a.out, "%d of %d pages are here (%s of %s); reading fetches the others.\n", m.PagesResident, m.PagesTotal,
			bytesText(float64(m.PagesResident*page.Size)), bytesText(float64(m.PagesTotal*page.Size)))
	}
	if m.Kept {
		fmt.Fprintf(a.out, "It stays until \"pageferry release %.12s\", and the source's copy with it.\n", m.ID)
	} else {
		fmt.Fprintln(a.out, "It goes with the last page.")
	}
	return nil
}

func pidText(pid int) string {
	if pid == 0 {
		return "not running here yet"
	}
	return fmt.Sprintf("pid %d", pid)
}

// dumpMemory prints a part of memory. It is read by a goroutine that nobody waits for
// when ctx ends: a page may take as long as the link to the source is broken, and the
// end of this program is what lets go of the read.
func (a *app) dumpMemory(ctx context.Context, c *appliance.Client, id, part string) error {
	if a.json {
		return usagef("--range prints bytes: leave out --json")
	}
	m, err := c.Memory(ctx, id)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(a.out, 1<<20)
	write := func(_ page.Addr, b []byte) error { _, err := out.Write(b); return err }
	if f, ok := a.out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		write = func(at page.Addr, b []byte) error { return hexLines(out, at, b) }
	}
	done := make(chan error, 1)
	go func() {
		r, err := findRange(m.Dir, part)
		if err == nil {
			err = readRange(m.Dir, r, write)
		}
		done <- errors.Join(err, out.Flush())
	}()
	select {
	case err = <-done:
		return a.readable(ctx, c, id, err)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// readable says of a read that failed why it did, where that can be told.
func (a *app) readable(ctx context.Context, c *appliance.Client, id string, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return needRootFor(err)
	case errors.Is(err, unix.EPIPE):
		return nil // whoever read has seen enough
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.ENODEV):
		if _, merr := c.Memory(ctx, id); merr != nil {
			return fmt.Errorf("it went away meanwhile: %w", merr)
		}
	case errors.Is(err, unix.EIO):
		return fmt.Errorf("%w: the source cannot be reached, or its copy is gone; \"pageferry show %s\" says how the migration stands", err, id)
	}
	return err
}

func needRootFor(err error) error {
	return &statusError{status: exitRefused, err: fmt.Errorf("%w: only root may read it, run this with sudo", err)}
}

// mapping is a line of maps.
type mapping struct {
	page.Range
	perms, name string
}

// readMaps reads maps below dir.
func readMaps(dir string) (ms []mapping, err error) {
	b, err := os.ReadFile(filepath.Join(dir, "maps"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(line, " ", 6) // range, perms, offset, device, inode, and a name that may have spaces
		if len(f) < 6 {
			return nil, fmt.Errorf("%s/maps: %q is no mapping", dir, line)
		}
		m := mapping{perms: f[1], name: strings.TrimSpace(f[5])}
		if m.Range, err = parseRange(f[0]); err != nil {
			return nil, err
		}
		ms = append(ms, m)
	}
	return ms, nil
}

// parseRange reads START-END as maps has it, with or without 0x.
func parseRange(s string) (r page.Range, err error) {
	from, to, ok := strings.Cut(s, "-")
	start, err1 := strconv.ParseUint(strings.TrimPrefix(from, "0x"), 16, 64)
	end, err2 := strconv.ParseUint(strings.TrimPrefix(to, "0x"), 16, 64)
	if !ok || err1 != nil || err2 != nil {
		return r, usagef("--range %s is not START-END in hexadecimal, nor a name of maps such as [stack]", s)
	}
	if r = (page.Range{Start: page.Addr(start), End: page.Addr(end)}); r.Start >= r.End {
		return r, usagef("--range %s is empty", s)
	}
	return r, nil
}

// findRange is the part of memory that a user names, which mappings must cover.
func findRange(dir, part string) (r page.Range, err error) {
	named := strings.HasPrefix(part, "[")
	if !named {
		if r, err = parseRange(part); err != nil {
			return r, err
		}
	}
	ms, err := readMaps(dir)
	if err != nil {
		return r, err
	}
	at := r.Start
	for _, m := range ms {
		switch {
		case named && m.name == part:
			return m.Range, nil
		case !named && m.Start <= at && at < m.End:
			if at = m.End; at >= r.End {
				return r, nil
			}
		}
	}
	if named {
		return r, usagef("no mapping is called %s; %s/maps lists them", part, dir)
	}
	return r, usagef("nothing is mapped at %x; %s/maps lists what is", uint64(at), dir)
}

// readRange gives the bytes of r to write, a piece at a time.
func readRange(dir string, r page.Range, write func(at page.Addr, b []byte) error) error {
	f, err := os.Open(filepath.Join(dir, "mem"))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for at := r.Start; at < r.End; {
		n, err := f.ReadAt(buf[:min(uint64(len(buf)), uint64(r.End-at))], int64(at))
		if werr := write(at, buf[:n]); werr != nil {
			return werr
		}
		if at += page.Addr(n); err != nil && !(errors.Is(err, io.EOF) && at == r.End) {
			return fmt.Errorf("at %x: %w", uint64(at), err)
		}
	}
	return nil
}

// hexLines writes b as hexdump -C does, with addresses.
func hexLines(w io.Writer, at page.Addr, b []byte) error {
	for len(b) > 0 {
		n := min(len(b), 16-int(at%16))
		var hex, text strings.Builder
		for i := range 16 {
			k := i - int(at%16)
			if i == 8 {
				hex.WriteByte(' ')
			}
			if k < 0 || k >= n {
				hex.WriteString("   ")
				text.WriteByte(' ')
				continue
			}
			fmt.Fprintf(&hex, "%02x ", b[k])
			if c := b[k]; c >= ' ' && c <= '~' {
				text.WriteByte(c)
			} else {
				text.WriteByte('.')
			}
		}
		if _, err := fmt.Fprintf(w, "%012x  %s |%s|\n", uint64(at&^15), hex.String(), text.String()); err != nil {
			return err
		}
		at, b = at+page.Addr(n), b[n:]
	}
	return nil
}

// completeRanges offers the mappings of the migration that the command names.
func (a *app) completeRanges(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) != 1 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c := a.client()
	defer c.Close()
	m, err := c.Memory(cmd.Context(), args[0])
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ms, err := readMaps(m.Dir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var out []string
	for _, x := range ms {
		out = append(out, fmt.Sprintf("%x-%x\t%s %s", uint64(x.Start), uint64(x.End), x.perms, x.name))
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
