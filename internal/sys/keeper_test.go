package sys

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCloneKeeper runs itself as a child that makes a keeper, opens a pipe
// afterwards and dies: the pipe must stay open as long as the keeper lives.
func TestCloneKeeper(t *testing.T) {
	if os.Getenv("PAGEFERRY_TEST_KEEPER") == "1" {
		pid, err := CloneKeeper("test-keeper", []byte("kept\x00by\x00it\x00"))
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		r, w, err := os.Pipe()
		if err != nil {
			os.Exit(1)
		}
		_ = w
		fmt.Println("keeper", pid, r.Fd(), w.Fd())
		os.Exit(0)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestCloneKeeper$", "-test.v=false", "-test.timeout=30s")
	cmd.Env = append(os.Environ(), "PAGEFERRY_TEST_KEEPER=1")
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd.Stdout = f // a file: a pipe would be kept open as well
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	out, _ := os.ReadFile(f.Name())
	var pid, rfd, wfd int
	if _, err := fmt.Sscanf(string(out), "keeper %d %d %d", &pid, &rfd, &wfd); err != nil {
		t.Fatalf("%v in %q", err, out)
	}
	defer func() {
		_ = unix.Kill(pid, unix.SIGKILL)
	}()
	if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); strings.TrimSpace(string(b)) != "test-keeper" {
		t.Errorf("comm is %q", b)
	}
	if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); string(bytes.TrimRight(b, "\x00")) != "kept\x00by\x00it" {
		t.Errorf("cmdline is %q", b)
	}
	for _, fd := range []int{rfd, wfd} {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil || !strings.HasPrefix(to, "pipe:") {
			t.Errorf("descriptor %d of the keeper: %q, %v", fd, to, err)
		}
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err != nil || !strings.Contains(string(b), ") S ") {
		t.Errorf("the keeper does not pause: %q, %v", b, err)
	}
}
