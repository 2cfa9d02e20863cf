package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/pageferry/pageferry/test/vm/link"
	"golang.org/x/sys/unix"
)

// patience is how long what the command left behind may hold its output open.
const patience = 2 * time.Second

// largest bounds a file that is sent back, in bytes.
const largest = 8 << 20

// command runs what the host asked for and tells it all that comes of it.
func command(host io.Writer, start link.Start) error {
	to := &sender{w: host}
	pid, output, err := launch(to, start)
	if err != nil {
		return err
	}
	ended, err := reap(pid)
	if err != nil {
		return err
	}
	select {
	case <-output:
	case <-time.After(patience):
	}
	for _, name := range start.Collect {
		if err := sendFile(to, name); err != nil {
			return err
		}
	}
	return to.json(link.KindEnded, ended)
}

// sender lets one goroutine at a time write frames.
type sender struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *sender) send(k link.Kind, b []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return link.Write(s.w, k, b)
}

func (s *sender) json(k link.Kind, v any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return link.WriteJSON(s.w, k, v)
}

// launch starts the command. output is closed when its output has ended.
func launch(to *sender, start link.Start) (pid int, output <-chan struct{}, err error) {
	if len(start.Args) == 0 {
		return 0, nil, errors.New("no command")
	}
	os.Clearenv()
	for _, v := range start.Env {
		for i := range v {
			if v[i] == '=' && i > 0 {
				os.Setenv(v[:i], v[i+1:])
				break
			}
		}
	}
	os.Setenv(link.EnvGuest, "1")
	dir := start.Dir
	if dir == "" {
		dir = "/"
	}
	if err := os.Chdir(dir); err != nil {
		return 0, nil, err
	}
	path, err := exec.LookPath(start.Args[0])
	if err != nil {
		return 0, nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, nil, err
	}
	defer null.Close()
	files := []uintptr{null.Fd()}
	var copying sync.WaitGroup
	for _, kind := range []link.Kind{link.KindStdout, link.KindStderr} {
		r, w, err := os.Pipe()
		if err != nil {
			return 0, nil, err
		}
		defer w.Close()
		files = append(files, w.Fd())
		copying.Go(func() { forward(to, kind, r) })
	}
	// Started comes first, whatever the command writes.
	to.mu.Lock()
	defer to.mu.Unlock()
	pid, err = syscall.ForkExec(path, start.Args, &syscall.ProcAttr{
		Dir: dir, Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, nil, &os.PathError{Op: "start", Path: path, Err: err}
	}
	if err := link.Write(to.w, link.KindStarted, nil); err != nil {
		return 0, nil, err
	}
	done := make(chan struct{})
	go func() {
		copying.Wait()
		close(done)
	}()
	return pid, done, nil
}

func forward(to *sender, k link.Kind, r *os.File) {
	b := make([]byte, 64<<10)
	for {
		n, err := r.Read(b)
		if n > 0 && to.send(k, b[:n]) != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// reap waits for pid, and meanwhile for all the orphans that become ours.
func reap(pid int) (link.Ended, error) {
	for {
		var status unix.WaitStatus
		got, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return link.Ended{}, os.NewSyscallError("wait4", err)
		case got == pid && status.Signaled():
			return link.Ended{Signal: int(status.Signal())}, nil
		case got == pid && status.Exited():
			return link.Ended{Code: status.ExitStatus()}, nil
		}
	}
}

// sendFile sends a file; one that is not there is none.
func sendFile(to *sender, name string) error {
	b, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if len(b) > largest {
		return fmt.Errorf("%s has %d bytes, at most %d can be collected", name, len(b), largest)
	}
	return to.json(link.KindFile, link.File{Name: name, Data: b})
}
