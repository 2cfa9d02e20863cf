package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// Parent is the group above g.
func (g Group) Parent() Group { return Group{path.Dir(g.dir)} }

// Name is the last element of g's path.
func (g Group) Name() string { return path.Base(g.dir) }

// Create makes a child group. One of that name that is there already is taken as
// it is.
func (g Group) Create(name string) (Group, error) {
	if t, err := os.ReadFile(path.Join(g.dir, "cgroup.type")); err == nil && strings.TrimSpace(string(t)) != "domain" {
		return Group{}, fmt.Errorf("cgroup %s is %q: %w", g.dir, strings.TrimSpace(string(t)), ErrThreaded)
	}
	c := Group{path.Join(g.dir, name)}
	if err := os.Mkdir(c.dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return Group{}, fmt.Errorf("make a cgroup: %w", err)
	}
	return c, nil
}

// Exists reports whether the group is there.
func (g Group) Exists() bool {
	_, err := os.Stat(path.Join(g.dir, "cgroup.procs"))
	return err == nil
}

// Move moves a process, all its threads, into the group. It can cost
// milliseconds.
func (g Group) Move(pid int) error {
	if err := g.write("cgroup.procs", strconv.Itoa(pid)); err != nil {
		return proc.Gone(pid, fmt.Errorf("move pid %d into cgroup %s: %w", pid, g.dir, err))
	}
	return nil
}

// Procs lists the processes of the group, without those of its children.
func (g Group) Procs() ([]int, error) {
	b, err := os.ReadFile(path.Join(g.dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var out []int
	for f := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			return nil, fmt.Errorf("cgroup %s: %w", g.dir, err)
		}
		out = append(out, pid)
	}
	return out, nil
}

// AllProcs lists the processes of the group and of all below it, as far as those are
// there still.
func (g Group) AllProcs() (out []int, err error) {
	err = filepath.WalkDir(g.dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			var pids []int
			pids, err = Group{name}.Procs()
			out = append(out, pids...)
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) { // removed meanwhile
			return nil
		}
		return err
	})
	return out, err
}

// Freeze freezes all processes of the group and waits until no thread of theirs
// executes anything. When ctx ends first the group is thawed again.
func (g Group) Freeze(ctx context.Context) error {
	if err := g.BeginFreeze(); err != nil {
		return err
	}
	if err := g.AwaitFrozen(ctx); err != nil {
		return errors.Join(fmt.Errorf("freeze cgroup %s: %w", g.dir, err), g.Thaw())
	}
	return nil
}

// BeginFreeze tells the processes of the group to freeze, and waits for nothing.
func (g Group) BeginFreeze() error {
	if err := g.write("cgroup.freeze", "1"); err != nil {
		return fmt.Errorf("freeze cgroup %s: %w", g.dir, err)
	}
	return nil
}

// AwaitFrozen waits until a group that is being frozen is.
func (g Group) AwaitFrozen(ctx context.Context) error { return g.await(ctx, "frozen", "1") }

// AwaitEmpty waits until the group has no process any more.
func (g Group) AwaitEmpty(ctx context.Context) error { return g.await(ctx, "populated", "0") }

// Frozen reports whether the group has been told to freeze and has done so.
func (g Group) Frozen() (bool, error) {
	v, err := g.event("frozen")
	return v == "1", err
}

// Thaw lets the processes of the group run. Idempotent.
func (g Group) Thaw() error {
	if err := g.write("cgroup.freeze", "0"); err != nil {
		return fmt.Errorf("thaw cgroup %s: %w", g.dir, err)
	}
	return nil
}

// Kill sends SIGKILL to every process of the group and its children, frozen or
// not.
func (g Group) Kill() error {
	err := g.write("cgroup.kill", "1")
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Before 5.14 one by one, until none is left to be found.
	for range 100 {
		pids, err := g.Procs()
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
				return fmt.Errorf("kill pid %d of cgroup %s: %w", pid, g.dir, err)
			}
		}
	}
	return nil
}

// Remove removes the group, waiting for processes that are ending. No group is
// no error.
func (g Group) Remove(ctx context.Context) error {
	for {
		err := unix.Rmdir(g.dir)
		switch {
		case err == nil || err == unix.ENOENT:
			return nil
		case err != unix.EBUSY:
			return fmt.Errorf("remove cgroup %s: %w", g.dir, err)
		}
		if werr := g.AwaitEmpty(ctx); werr != nil {
			return fmt.Errorf("remove cgroup %s: %w: %w", g.dir, err, werr)
		}
		// Empty, and yet busy: a child group, or a process between exit and
		// the end of its accounting.
		select {
		case <-ctx.Done():
			return fmt.Errorf("remove cgroup %s: %w: %w", g.dir, err, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

func (g Group) write(name, v string) error {
	f, err := os.OpenFile(path.Join(g.dir, name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(v)
	return errors.Join(err, f.Close())
}

func (g Group) event(key string) (string, error) {
	b, err := os.ReadFile(path.Join(g.dir, "cgroup.events"))
	if err != nil {
		return "", err
	}
	return eventIn(b, key), nil
}

func eventIn(b []byte, key string) string {
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), " "); ok && k == key {
			return v
		}
	}
	return ""
}

// await waits until cgroup.events says key value. The kernel wakes a poll for
// POLLPRI after every change.
func (g Group) await(ctx context.Context, key, value string) error {
	fd, err := unix.Open(path.Join(g.dir, "cgroup.events"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path.Join(g.dir, "cgroup.events"), Err: err}
	}
	defer unix.Close(fd)
	var buf [256]byte
	for {
		n, err := unix.Pread(fd, buf[:], 0)
		if err != nil {
			return fmt.Errorf("read cgroup.events: %w", err)
		}
		if eventIn(buf[:n], key) == value {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("waiting for %s %s: %w", key, value, err)
		}
		// Short enough to notice the end of ctx.
		const milliseconds = 20
		if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLPRI}}, milliseconds); err != nil && err != unix.EINTR {
			return fmt.Errorf("poll cgroup.events: %w", err)
		}
	}
}

// Freezing reports whether the group has been told to freeze.
func (g Group) Freezing() (bool, error) {
	b, err := os.ReadFile(path.Join(g.dir, "cgroup.freeze"))
	return strings.TrimSpace(string(b)) == "1", err
}
