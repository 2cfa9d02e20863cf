package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

// What a command writes and how it ends comes back as it was, and nothing of what
// it does to files stays.
func TestRun(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	name := "/var/tmp/" + testutil.Name()
	var all []byte // longer than buffers on the way, and with every byte
	for i := range 300 << 10 {
		all = append(all, byte(i), byte(i>>8))
	}
	file := filepath.Join(t.TempDir(), "all")
	if err := os.WriteFile(file, all, 0o600); err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	r, err := vm.Run(t.Context(), vm.Job{
		Args: []string{"sh", "-c", `
			cat "$1"; printf 'wrong\n\n' >&2
			pwd > "$2"; echo "$VALUE" >> "$2"; id -u >> "$2"
			# An orphan holds the output open, and is not waited for.
			setsid sleep 1000 &
			exit 7`, "sh", file, name},
		Env:     []string{"PATH=" + vm.DefaultPath, "VALUE=a=b c"},
		Dir:     "/usr/share",
		Keep:    []string{file},
		Collect: []string{name, name + ".none"},
		Stdout:  &out, Stderr: &errs,
	})
	if err != nil {
		t.Fatal(err)
	}
	if r.Code != 7 || r.Signal != 0 {
		t.Errorf("exit status %d, signal %d, want 7 and none", r.Code, r.Signal)
	}
	if !bytes.Equal(out.Bytes(), all) {
		t.Errorf("%d bytes of output are not the %d that were written", out.Len(), len(all))
	}
	if errs.String() != "wrong\n\n" {
		t.Errorf("standard error is %q", errs.String())
	}
	if got := string(r.Files[name]); got != "/usr/share\na=b c\n0\n" || len(r.Files) != 1 {
		t.Errorf("files %q", r.Files)
	}
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is on the host: %v", name, err)
	}
	t.Logf("booted in %v, ran for %v", r.Boot, r.Ran)
}

func TestSignal(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	r, err := vm.Run(t.Context(), vm.Job{Args: []string{"sh", "-c", "kill -USR1 $$"}})
	if err != nil || r.Signal != syscall.SIGUSR1 || r.Code != 0 {
		t.Errorf("%+v, %v, want SIGUSR1", r, err)
	}
}

func TestMissingCommand(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	_, err := vm.Run(t.Context(), vm.Job{Args: []string{"no-such-program"}})
	if err == nil || errors.Is(err, vm.ErrGuest) || !strings.Contains(err.Error(), `"no-such-program": executable file not found`) {
		t.Errorf("%v", err)
	}
}

// A command that does not end costs its limit and no more, and its output until
// then is there.
func TestLimit(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	var out bytes.Buffer
	_, err := vm.Run(t.Context(), vm.Job{
		Args:   []string{"sh", "-c", "echo begun; echo on the console >/dev/console; exec sleep 1000"},
		Stdout: &out, Limit: 4 * time.Second,
	})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "ran longer than 4s") || !strings.Contains(err.Error(), "on the console") {
		t.Errorf("%v", err)
	}
	if out.String() != "begun\n" {
		t.Errorf("output %q", out.String())
	}
}

// A guest whose kernel panics is an error that says so.
func TestPanic(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	_, err := vm.Run(t.Context(), vm.Job{Args: []string{"sh", "-c", "echo c > /proc/sysrq-trigger"}, Limit: time.Minute})
	if !errors.Is(err, vm.ErrGuest) || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("%v", err)
	}
}

func TestCancel(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	why := errors.New("no longer wanted")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(300*time.Millisecond, func() { cancel(why) })
	if _, err := vm.Run(ctx, vm.Job{Args: []string{"true"}}); !errors.Is(err, why) {
		t.Errorf("%v, want %v", err, why)
	}
}

const envKilled = "PAGEFERRY_GUEST_KILLED"

// TestBody is the process that TestKilled kills.
func TestBody(t *testing.T) {
	if os.Getenv(envKilled) == "" {
		return
	}
	_, err := vm.Run(t.Context(), vm.Job{Args: []string{"sleep", "1000"}})
	t.Fatalf("it came back: %v", err)
}

// A guest does not outlive whoever runs it, whatever ends that.
func TestKilled(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	testutil.NoLeaks(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestBody$")
	// It cannot remove its temporary directory.
	cmd.Env = append(os.Environ(), envKilled+"=1", "PAGEFERRY_TEST_TEMP="+t.TempDir())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	var machine int
	testutil.Eventually(t, 10*time.Second, func() error {
		list, err := children(cmd.Process.Pid)
		if err == nil && len(list) == 0 {
			err = errors.New("it has started no QEMU")
		}
		if err == nil {
			machine = list[0]
		}
		return err
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	testutil.Eventually(t, 5*time.Second, func() error {
		if name := command(machine); strings.HasPrefix(name, "qemu") {
			return fmt.Errorf("pid %d (%s) is still there", machine, name)
		}
		return nil
	})
}

// children are those of a process that are QEMU.
func children(pid int) (list []int, err error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range files {
		b, _ := os.ReadFile(f)
		for s := range strings.FieldsSeq(string(b)) {
			var child int
			if _, err := fmt.Sscan(s, &child); err != nil {
				return nil, err
			}
			list = append(list, child)
		}
	}
	return slices.DeleteFunc(list, func(pid int) bool { return !strings.HasPrefix(command(pid), "qemu") }), err
}

func command(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(b))
}

func TestNothingToRun(t *testing.T) {
	testutil.Require(t, vmtest.Guest)
	if _, err := vm.Run(t.Context(), vm.Job{}); err == nil || !strings.Contains(err.Error(), "no command") {
		t.Errorf("%v", err)
	}
}
