package testutil

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultLimit is how long a started program may run if nothing else is said.
const DefaultLimit = 3 * time.Minute

// Process is a program under test. It stays valid when the program moves: see
// Moved. Methods may be called from any goroutine.
type Process struct {
	t    testing.TB
	name string
	// Output is the file that standard output and error go to: a regular file,
	// so that a program can be moved with it.
	Output string

	mu      sync.Mutex
	current *owned
	former  []*owned
}

// owned is one kernel process that we end when the test does.
type owned struct {
	pid   int
	pidfd int
	// child is set where it is our own child, which its starter waits for.
	child *exec.Cmd
	gone  chan struct{}
}

// Start runs a program with /dev/null as input and a regular file as output
// (so that it can be moved), ends it at the end of the test and fails the test
// if it is still there after DefaultLimit.
func Start(t testing.TB, name string, args ...string) *Process {
	t.Helper()
	path, err := lookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return StartCmd(t, exec.Command(path, args...), DefaultLimit)
}

// StartCmd is Start for a command and a time limit of one's own choice. Where
// cmd.Stdout is not set, output goes to a file.
func StartCmd(t testing.TB, cmd *exec.Cmd, limit time.Duration) *Process {
	t.Helper()
	startGuard()
	p := &Process{t: t, name: filepath.Base(cmd.Path)}
	if cmd.Stdout == nil {
		f, err := os.OpenFile(filepath.Join(t.TempDir(), p.name+".out"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		p.Output = f.Name()
		cmd.Stdout = f
		if cmd.Stderr == nil {
			cmd.Stderr = f
		}
	}
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", p.name, err)
	}
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("pidfd of %s: %v", p.name, err)
	}
	o := &owned{pid: cmd.Process.Pid, pidfd: fd, child: cmd, gone: make(chan struct{})}
	go func() {
		// Not before it has ended: a wait consumes the ptrace stops of a
		// child that another thread of this process traces.
		waitPidfd(fd)
		_ = cmd.Wait()
		close(o.gone)
	}()
	p.current = o
	limiter := time.AfterFunc(limit, func() {
		if p.Alive() {
			t.Errorf("%s, pid %d, still ran after %v: killed", p.name, p.Pid(), limit)
			p.Kill()
		}
	})
	t.Cleanup(func() {
		limiter.Stop()
		p.end()
		if t.Failed() {
			if out := p.Text(); out != "" {
				t.Logf("output of %s:\n%s", p.name, tail(out, 4000))
			}
		}
	})
	return p
}

// Adopt takes charge of a process that was not started here, such as one that
// was restored, and ends it at the end of the test.
func Adopt(t testing.TB, pid int) *Process {
	t.Helper()
	p := &Process{t: t, name: fmt.Sprintf("pid %d", pid)}
	p.adopt(pid)
	t.Cleanup(p.end)
	return p
}

func (p *Process) adopt(pid int) {
	p.t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		p.t.Fatalf("pidfd of %s, pid %d: %v", p.name, pid, err)
	}
	o := &owned{pid: pid, pidfd: fd, gone: make(chan struct{})}
	go func() {
		waitPidfd(fd)
		// Where it is our child without a waiter (a restored process is its
		// rebuilder's child), it is ours to reap.
		_ = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG, nil)
		close(o.gone)
	}()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current != nil {
		p.former = append(p.former, p.current)
	}
	p.current = o
}

// Moved says that the program now lives in the process pid, as seen from here.
// The former process is still ended at the end of the test, should it be there.
func (p *Process) Moved(pid int) {
	p.t.Helper()
	p.adopt(pid)
}

// Pid is the process in which the program lives now.
func (p *Process) Pid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current.pid
}

// Gone is closed when the current process has ended and has been waited for.
func (p *Process) Gone() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current.gone
}

// Alive reports whether the current process is there.
func (p *Process) Alive() bool {
	select {
	case <-p.Gone():
		return false
	default:
		return true
	}
}

// Text is what the program has written so far.
func (p *Process) Text() string {
	if p.Output == "" {
		return ""
	}
	b, _ := os.ReadFile(p.Output)
	return string(b)
}

// Signal sends a signal to the current process.
func (p *Process) Signal(sig unix.Signal) {
	p.t.Helper()
	p.mu.Lock()
	fd := p.current.pidfd
	p.mu.Unlock()
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		p.t.Errorf("signal %v to %s: %v", sig, p.name, err)
	}
}

// Kill ends the current process and returns when it is gone.
func (p *Process) Kill() {
	p.mu.Lock()
	o := p.current
	p.mu.Unlock()
	if !o.kill() {
		p.t.Errorf("%s, pid %d, cannot be killed", p.name, o.pid)
	}
}

// Wait waits until the current process has ended and returns its exit error,
// which is known only where it was started here. The test fails if that takes
// longer than limit.
func (p *Process) Wait(limit time.Duration) error {
	p.t.Helper()
	p.mu.Lock()
	o := p.current
	p.mu.Unlock()
	select {
	case <-o.gone:
	case <-time.After(limit):
		p.t.Fatalf("%s, pid %d, has not ended after %v\n%s", p.name, o.pid, limit, tail(p.Text(), 4000))
	}
	if o.child == nil || o.child.ProcessState.Success() {
		return nil
	}
	return &exec.ExitError{ProcessState: o.child.ProcessState}
}

// WaitText waits until the program has written s.
func (p *Process) WaitText(s string, limit time.Duration) {
	p.t.Helper()
	Eventually(p.t, limit, func() error {
		if strings.Contains(p.Text(), s) {
			return nil
		}
		if !p.Alive() {
			p.t.Fatalf("%s ended without writing %q:\n%s", p.name, s, tail(p.Text(), 4000))
		}
		return fmt.Errorf("%s has not written %q", p.name, s)
	})
}

func (p *Process) end() {
	p.mu.Lock()
	all := append(p.former, p.current)
	p.former = nil
	p.mu.Unlock()
	for _, o := range all {
		if !o.kill() {
			p.t.Errorf("%s, pid %d, cannot be killed", p.name, o.pid)
			continue
		}
		if o.pidfd >= 0 {
			_ = unix.Close(o.pidfd)
			o.pidfd = -1
		}
	}
}

// kill ends the process and those that descend from it.
func (o *owned) kill() bool {
	if o.pidfd < 0 {
		return true
	}
	var below []stat
	all := processes()
	for _, s := range all {
		if descends(all, s, o.pid) {
			below = append(below, s)
		}
	}
	_ = unix.PidfdSendSignal(o.pidfd, unix.SIGKILL, nil, 0)
	for _, s := range below {
		kill(s.pid, s.start)
	}
	select {
	case <-o.gone:
		return true
	case <-time.After(10 * time.Second):
		return false
	}
}

// waitPidfd waits until the process behind a pidfd has ended.
func waitPidfd(fd int) {
	for {
		pfd := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(pfd, 1000); n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func tail(s string, n int) string {
	if len(s) > n {
		return "[...]" + s[len(s)-n:]
	}
	return s
}

// Eventually calls f until it returns nil, and fails the test with its last
// error when that has not happened within limit.
func Eventually(t testing.TB, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(wait)
	}
}
