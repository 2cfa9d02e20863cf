package pager

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	socketName = "pager.sock"
	stateName  = "pager.state"
	storeName  = "pageferry-store"
	logName    = "pager.log"
)

// startTime is when pid started, in clock ticks after boot: with it a pid means
// one process for good.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// proc_pid_stat(5): field 22, counted behind the last parenthesis.
	_, rest, ok := cutLast(string(b), ") ")
	f := strings.Fields(rest)
	if !ok || len(f) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat is not as expected", pid)
	}
	var v uint64
	_, err = fmt.Sscan(f[19], &v)
	return v, err
}

func cutLast(s, sep string) (before, after string, ok bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// openProcess returns a pidfd of pid, which must have started at start; 0 means
// that nobody knows. ErrGone where there is no such process.
func openProcess(pid int, start uint64) (fd int, err error) {
	if pid <= 0 {
		return -1, ErrGone
	}
	fd, err = unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, ErrGone
	}
	if err != nil {
		return -1, fmt.Errorf("pager: pidfd of %d: %w", pid, err)
	}
	got, err := startTime(pid)
	if err != nil || start != 0 && got != start {
		unix.Close(fd)
		return -1, ErrGone
	}
	return fd, nil
}

// endProcess kills the process behind a pidfd and waits until it has ended.
func endProcess(fd int, limit time.Duration) error {
	err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	if err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("pager: kill: %w", err)
	}
	if !waitProcess(fd, limit) {
		return errors.New("pager: process does not end after SIGKILL")
	}
	return nil
}

// waitProcess waits until the process behind a pidfd has ended.
func waitProcess(fd int, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(max(0, time.Until(end).Milliseconds())))
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return false
		}
	}
}

// writeState and readState keep who in Dir, for a restarted daemon.
func writeState(dir string, w who) error {
	b := fmt.Appendf(nil, "%s %d %d %d %d\n", w.ID, w.PID, w.Start, w.Keeper, w.KeeperStart)
	for _, f := range w.Before {
		b = fmt.Appendf(b, "%d %d %d %d\n", f.PID, f.Start, f.Keeper, f.KeeperStart)
	}
	tmp := filepath.Join(dir, stateName+".new")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("pager: state file: %w", err)
	}
	if err := os.Rename(tmp, filepath.Join(dir, stateName)); err != nil {
		return fmt.Errorf("pager: state file: %w", err)
	}
	return nil
}

func readState(dir string) (w who, err error) {
	b, err := os.ReadFile(filepath.Join(dir, stateName))
	if err != nil {
		return w, err
	}
	var id []byte
	first, rest, _ := strings.Cut(string(b), "\n")
	if n, err := fmt.Sscanf(first, "%x %d %d %d %d", &id, &w.PID, &w.Start, &w.Keeper, &w.KeeperStart); n != 5 || err != nil || len(id) != len(w.ID) {
		return w, fmt.Errorf("pager: state file in %s is not as expected", dir)
	}
	copy(w.ID[:], id)
	for line := range strings.Lines(rest) {
		var f former
		if _, err := fmt.Sscan(line, &f.PID, &f.Start, &f.Keeper, &f.KeeperStart); err != nil {
			return w, fmt.Errorf("pager: state file in %s is not as expected", dir)
		}
		w.Before = append(w.Before, f)
	}
	return w, nil
}

// whileAlive is a context that also ends with process pid, for a conversation with a
// pager: its keeper has the socket open, so that nothing else would end the wait. stop
// must be called.
func whileAlive(ctx context.Context, pid int) (_ context.Context, stop func()) {
	const step = 50 * time.Millisecond
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		defer cancel()
		fd, err := openProcess(pid, 0)
		if err != nil {
			return
		}
		defer unix.Close(fd)
		for ctx.Err() == nil && !waitProcess(fd, step) && !over(fd, pid) {
		}
	}()
	return ctx, func() {
		cancel()
		<-watched
	}
}

// over reports whether the process behind a pidfd has ended, or was killed and ends as
// soon as the kernel lets it: a thread that waits for an answer to a request of its own
// mount does not before somebody else has given it.
func over(fd, pid int) bool {
	if waitProcess(fd, 0) {
		return true
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) { // proc_pid_status(5)
		name, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); name {
		case "State":
			if strings.HasPrefix(value, "Z") { // the first thread; others are left
				return true
			}
		case "SigPnd", "ShdPnd":
			set, err := strconv.ParseUint(value, 16, 64)
			if err == nil && set&(1<<(unix.SIGKILL-1)) != 0 {
				return true
			}
		}
	}
	return false
}

// Kept reports whether the pager recorded in dir or its keeper is alive: if not,
// what was missing has read as zeros since.
func Kept(dir string) bool {
	w, err := readState(dir)
	if err != nil {
		return false
	}
	alive := func(pid int, start uint64) bool {
		fd, err := openProcess(pid, start)
		if err != nil {
			return false
		}
		defer unix.Close(fd)
		return !waitProcess(fd, 0)
	}
	for _, f := range append([]former{w.former()}, w.Before...) {
		if alive(f.PID, f.Start) || alive(f.Keeper, f.KeeperStart) {
			return true
		}
	}
	return false
}

// Abandoned ends what is left of a pager whose daemon cannot or will not go on:
// pager and keeper as recorded in dir. The process that they serve must be dead.
// It returns nil where there is nothing.
func Abandoned(dir string) error {
	w, err := readState(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return Hide(dir)
	}
	if err != nil {
		return err
	}
	return endAll(w, dir)
}

// endAll kills w and all before it, and removes what they leave in dir.
func endAll(w who, dir string) error {
	all := append([]former{w.former()}, w.Before...)
	for _, f := range all {
		for _, p := range []struct {
			pid   int
			start uint64
		}{{f.PID, f.Start}, {f.Keeper, f.KeeperStart}} { // the pager first: it would replace its keeper
			if fd, err := openProcess(p.pid, p.start); err == nil {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				_ = waitProcess(fd, time.Second)
				unix.Close(fd)
			}
		}
	}
	// One that waits for an answer of its own mount ends when that is gone.
	err := Hide(dir)
	for _, f := range all {
		err = errors.Join(err, endByPID(f.PID, f.Start), endKeeper(f.Keeper, f.KeeperStart))
	}
	if err != nil {
		return err
	}
	return removeState(dir)
}

// removeState removes what a pager leaves in dir that was killed.
func removeState(dir string) error {
	if err := Hide(dir); err != nil {
		return err
	}
	_ = os.Remove(filepath.Join(dir, socketName))
	_ = os.Remove(filepath.Join(dir, stateName))
	_ = os.Remove(filepath.Join(dir, stateName+".new"))
	_ = os.Remove(filepath.Join(dir, logName))
	_ = os.Remove(filepath.Join(dir, veilName))
	return nil
}

// endByPID kills a process that started at start, if it is there.
func endByPID(pid int, start uint64) error {
	fd, err := openProcess(pid, start)
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := endProcess(fd, endLimit); err != nil {
		return fmt.Errorf("pid %d: %w", pid, err)
	}
	return nil
}

// endKeeper is endByPID, and reaps a keeper that has become our child because
// its pager died and this process adopts orphans.
func endKeeper(pid int, start uint64) error {
	err := endByPID(pid, start)
	reapOrphan(pid)
	return err
}

// reap waits until the keeper of a former pager is gone, and reaps it where it has
// become our child.
func (f former) reap() {
	fd, err := openProcess(f.Keeper, f.KeeperStart)
	for err == nil && !waitProcess(fd, time.Second) {
	}
	if err == nil {
		unix.Close(fd)
	}
	reapOrphan(f.Keeper)
}

func reapOrphan(pid int) {
	var ws unix.WaitStatus
	_, _ = unix.Wait4(pid, &ws, unix.WNOHANG, nil) // not ours: somebody else reaps it
}
