package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// startWorkload starts a process that checks itself and writes what it found to
// verdict, and waits until it has touched all of its 32 MiB.
func startWorkload(t *testing.T, verdict string) *testutil.Process {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	cmd := exec.Command("/proc/self/exe", "workload", "--size", "32MiB", "--rate", "16MiB/s", "--report", verdict)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, null, null
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	p := testutil.StartCmd(t, cmd, time.Minute)
	testutil.Eventually(t, 20*time.Second, func() error {
		// Not what statm has as resident: the program itself counts there.
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid()))
		_, rest, _ := strings.Cut(string(data), "RssAnon:")
		var kib int
		if _, serr := fmt.Sscan(rest, &kib); err != nil || serr != nil || kib < 32<<10 {
			return fmt.Errorf("%d KiB of its own memory, %v", kib, errors.Join(err, serr))
		}
		return nil
	})
	return p
}

// TestCheckpointAndRestore writes a process that checks itself to a directory,
// leaves it running once, and brings it back in both ways.
func TestCheckpointAndRestore(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	dir := t.TempDir()
	verdict := filepath.Join(dir, "verdict")
	p := startWorkload(t, verdict)
	engine := appliance.NewEngine()
	pid := fmt.Sprint(p.Pid())
	first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
	if o := command(t, engine, "checkpoint", pid, "--dir", first, "--leave-running", "--json"); o.status != exitDone {
		t.Fatalf("%+v", o)
	} else if m := o.lastLine(t); m["outcome"] != "done" || m["pages_total"].(float64) < 8192 {
		t.Errorf("%v", m)
	}
	if !p.Alive() {
		t.Fatal("it was to be left running")
	}
	if o := command(t, engine, "checkpoint", pid, "--dir", second); o.status != exitDone {
		t.Fatalf("%+v", o)
	}
	<-p.Gone()
	for _, c := range [][]string{{"restore", "--dir", first, "--json"}, {"restore", "--dir", second, "--lazy", "--json"}} {
		o := program(t, c...)
		if o.status != exitDone {
			t.Fatalf("%v: %+v", c, o)
		}
		back := testutil.Adopt(t, int(o.lastLine(t)["dest_pid"].(float64)))
		// It verifies all of its memory, says so and ends.
		if err := os.Remove(verdict); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		back.Signal(unix.SIGTERM)
		select {
		case <-back.Gone():
		case <-time.After(20 * time.Second):
			t.Fatalf("%v: it does not end", c)
		}
		data, err := os.ReadFile(verdict)
		if err != nil || !bytes.Contains(data, []byte("ok")) {
			t.Fatalf("%v: it says %q, %v", c, data, err)
		}
	}
}

// TestRestoreOfDamagedPages: a page of a checkpoint is not what was written. A
// restore of all pages refuses; a lazy one runs until the process needs what is
// missing, and ends with SIGBUS then: it never works with the damaged page.
func TestRestoreOfDamagedPages(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	dir := t.TempDir()
	verdict, saved := filepath.Join(dir, "verdict"), filepath.Join(dir, "saved")
	p := startWorkload(t, verdict)
	if o := command(t, appliance.NewEngine(), "checkpoint", fmt.Sprint(p.Pid()), "--dir", saved); o.status != exitDone {
		t.Fatalf("%+v", o)
	}
	<-p.Gone()
	f, err := os.OpenFile(filepath.Join(saved, "pages.raw"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, at := make([]byte, 1), st.Size()/2+77
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if o := program(t, "restore", "--dir", saved); o.status == exitDone || !bytes.Contains([]byte(o.err), []byte("damaged")) {
		t.Fatalf("%+v", o)
	}
	_ = os.Remove(verdict)
	o := program(t, "restore", "--dir", saved, "--lazy", "--json")
	if o.status != exitDone {
		return // it came to the damaged page before the process was to run
	}
	if fd, err := unix.PidfdOpen(int(o.lastLine(t)["dest_pid"].(float64)), 0); err == nil { // else it has ended already
		defer unix.Close(fd)
		_ = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0) // it verifies all of its memory, or tries
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20_000)
		if n == 0 {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			t.Fatalf("it waits for a page that nobody brings, %v", err)
		}
	}
	if data, _ := os.ReadFile(verdict); len(data) > 0 {
		t.Fatalf("it saw the damaged page: %q", data)
	}
}

// program runs a command as the user does: what it restores is not its child
// any more when it has ended.
func program(t *testing.T, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return outcome{status: cmd.ProcessState.ExitCode(), out: out.String(), err: errs.String()}
}
