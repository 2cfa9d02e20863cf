package testutil

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const envChild = "PAGEFERRY_TEST_CHILD"

// Child runs f in a process of its own, a second run of the test binary, and
// fails the test if it fails there or takes longer than limit: what can hang a
// process hangs that one. All of the test before the call to Child runs in the
// child as well, so call it first (after Require).
func Child(t *testing.T, limit time.Duration, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(envChild) == t.Name() {
		f(t)
		return
	}
	var pattern []string
	for part := range strings.SplitSeq(t.Name(), "/") {
		pattern = append(pattern, "^"+regexp.QuoteMeta(part)+"$")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	startGuard()
	cmd := exec.Command(exe, "-test.run="+strings.Join(pattern, "/"), "-test.v", "-test.count=1",
		"-test.timeout="+(limit+10*time.Second).String())
	cmd.Env = append(os.Environ(), envChild+"="+t.Name(), "GORACE=halt_on_error=1 "+os.Getenv("GORACE"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// Its children may keep the pipe open after it has gone.
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dump := time.AfterFunc(limit, func() { _ = cmd.Process.Signal(unix.SIGQUIT) })
	end := time.AfterFunc(limit+5*time.Second, func() { _ = cmd.Process.Kill() })
	err = cmd.Wait()
	end.Stop()
	late := !dump.Stop()
	switch {
	case late:
		t.Fatalf("the child ran longer than %v:\n%s", limit, tail(out.String(), 20000))
	case err != nil && !errors.Is(err, exec.ErrWaitDelay):
		t.Fatalf("in the child: %v\n%s", err, tail(out.String(), 20000))
	case strings.Contains(out.String(), "--- SKIP: "+t.Name()):
		t.Fatalf("skipped in the child only: call Require before Child\n%s", out.String())
	case !strings.Contains(out.String(), "--- PASS: "+t.Name()):
		t.Fatalf("the child did not run the test:\n%s", tail(out.String(), 20000))
	case errors.Is(err, exec.ErrWaitDelay):
		t.Errorf("the child left processes behind that hold its output:\n%s", tail(out.String(), 20000))
	}
	if testing.Verbose() {
		t.Logf("in the child:\n%s", tail(out.String(), 20000))
	}
}

// InChild reports whether this is the process that Child made.
func InChild() bool { return os.Getenv(envChild) != "" }
