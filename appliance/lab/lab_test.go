package lab

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/testutil"
)

func TestMain(m *testing.M) {
	Main()
	if os.Getenv("PAGEFERRY_LAB_TEST_VICTIM") != "" {
		victim()
	}
	testutil.Main(m)
}

func newLab(t *testing.T, cfg Config) *Lab {
	t.Helper()
	cfg.Name = testutil.Name()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	l, err := New(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func TestHostsAreHosts(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	l := newLab(t, Config{Hosts: []string{"a", "b", "c"}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, h := range l.Hosts() {
		for _, c := range []struct{ cmd, want string }{
			{"hostname", h.Name()},
			{"ls /run /var/lib /dev/shm | grep -v : | xargs", ""},
			{"cat /proc/self/cgroup | grep ^0:", "0::/run"},
			{"ls -d /sys/fs/cgroup/run", "/sys/fs/cgroup/run"},
			{"grep cgroup2 /proc/self/mountinfo | tail -1 | cut -d ' ' -f 4,5", "/ /sys/fs/cgroup"},
			{"cat /proc/1/cmdline | cut -d '' -f1 | tr -d '\\0' | cut -c1-18", initArg0},
			{"ls /sys/class/net | wc -l", "4"},
		} {
			out, err := h.Run(ctx, "sh", "-c", c.cmd)
			if err != nil || strings.TrimSpace(out) != c.want {
				t.Errorf("host %s: %s says %q, %v; want %q", h.Name(), c.cmd, out, err, c.want)
			}
		}
	}
	// A file of one host's /run is its own, and can be read from outside.
	a, b := l.Host("a"), l.Host("b")
	if _, err := a.Run(ctx, "sh", "-c", "echo hello > /run/file"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(a.Root() + "/run/file"); err != nil || string(got) != "hello\n" {
		t.Errorf("from outside: %q, %v", got, err)
	}
	if _, err := b.Run(ctx, "cat", "/run/file"); err == nil {
		t.Error("host b sees the file of host a")
	}
}

// TestLinks sends a line over every link, in both directions.
func TestLinks(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.Program("python3"))
	testutil.NoLeaks(t)
	l := newLab(t, Config{MTU: 9000})
	for _, h := range l.Hosts() {
		cmd := exec.Command("python3", "-c", `
import socket
s = socket.create_server(("", 7000))
print("ready", flush=True)
while True:
    c, a = s.accept()
    c.sendall((a[0] + "\n").encode())
    c.close()`)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout = w
		_, err = h.Start("server", cmd)
		w.Close()
		if err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(r).ReadString('\n')
		r.Close()
		if err != nil || line != "ready\n" {
			t.Fatalf("server of %s: %q, %v", h.Name(), line, err)
		}
	}
	type dialer func(context.Context, string, string) (net.Conn, error)
	a, b := l.Host("a"), l.Host("b")
	for _, c := range []struct {
		dial dialer
		to   *Host
		from string
	}{
		{a.Dial, b, a.Addr().String()}, {b.Dial, a, b.Addr().String()},
		{l.Dial, a, l.Addr().String()}, {l.Dial, b, l.Addr().String()},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		conn, err := c.dial(ctx, "tcp", c.to.Addr().String()+":7000")
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if err != nil || strings.TrimSpace(line) != c.from {
			t.Errorf("host %s saw a client from %q, %v; want %s", c.to.Name(), line, err, c.from)
		}
	}
}

func TestPIDsAreTheHosts(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	l := newLab(t, Config{Hosts: []string{"a"}})
	h := l.Host("a")
	p, err := h.Start("sleeper", exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := h.PID(p.PID())
	if err != nil || pid == p.PID() || pid < 2 {
		t.Fatalf("pid %d, %v", pid, err)
	}
	if got, err := os.ReadFile(fmt.Sprintf("%s/proc/%d/comm", h.Root(), pid)); err != nil || string(got) != "sleep\n" {
		t.Fatalf("pid %d of the host is %q, %v", pid, got, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err == nil {
		t.Error("the program outlived its host")
	}
}

// The end of a host aborts the FUSE file systems that were mounted in it, and no other that
// is on this machine.
func TestOthersFUSEIsLeftAlone(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	dir := t.TempDir()
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Mount("test", dir, "fuse.test", unix.MS_NOSUID|unix.MS_NODEV, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH) })
	l, err := New(t.Context(), Config{Name: testutil.Name(), Hosts: []string{"a"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, 1000); n != 1 || err != nil || p[0].Revents&unix.POLLERR != 0 {
		t.Errorf("its connection: %#x, %v; it was aborted", p[0].Revents, err)
	}
}

// TestKilledLabLeavesNothing kills a program that has a lab: all its processes
// go, and the next lab removes what is left.
func TestKilledLabLeavesNothing(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	name := testutil.Name()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "PAGEFERRY_LAB_TEST_VICTIM="+name)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var inside int
	if _, err := fmt.Fscan(out, &inside); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		t.Fatalf("the victim did not get ready: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	testutil.Eventually(t, 10*time.Second, func() error {
		if err := unix.Kill(inside, 0); err != unix.ESRCH {
			return fmt.Errorf("process %d of the killed lab: %v", inside, err)
		}
		return nil
	})
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	left := []string{filepath.Join(root.Dir(), cgroupPrefix+name), filepath.Join(baseDir, name)}
	for _, p := range left {
		if _, err := os.Stat(p); err != nil {
			t.Errorf("the test expects %s to be left by a kill: %v", p, err)
		}
	}
	newLab(t, Config{Hosts: []string{"a"}})
	for _, p := range left {
		if _, err := os.Stat(p); err == nil {
			t.Errorf("%s is still there after the next lab", p)
		}
	}
}

// victim makes a lab with a process in it and waits to be killed.
func victim() {
	l, err := New(context.Background(), Config{Name: os.Getenv("PAGEFERRY_LAB_TEST_VICTIM")})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	p, err := l.Host("a").Start("sleeper", exec.Command("sleep", "1000"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(p.PID())
	_ = p.Wait()
	select {}
}

func TestConfigIsChecked(t *testing.T) {
	for _, c := range []Config{
		{Name: "a/b"}, {Hosts: []string{"a", "a"}}, {Hosts: []string{"lab"}}, {Hosts: []string{"much-too-long-a-name"}}, {MTU: 1},
	} {
		if err := c.Validate(); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
