package vm_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// TestGuest is what the guest is there for: it boots once for all of these.
func TestGuest(t *testing.T) {
	testutil.NoLeaks(t)
	vmtest.Run(t, 4*time.Minute, func(t *testing.T) {
		t.Run("Write", func(t *testing.T) {
			if n := pair(t, "ib_write_bw", "-s", "65536", "-n", "64"); n < 64<<16 {
				t.Errorf("%d bytes went over the cable, of 64 times 64 KiB", n)
			}
		})
		// The pair can be made again.
		t.Run("Read", func(t *testing.T) { pair(t, "ib_read_lat", "-s", "4096", "-n", "100") })
	})
}

// pair has two soft-RoCE devices write or read each other's memory, and returns how
// many bytes went over their cable.
func pair(t *testing.T, name string, args ...string) int {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.Program(name))
	a, b := vmtest.Pair(t)
	before := sent(t, a.Net) + sent(t, b.Net)
	perftest(t, a, b, name, args...)
	return sent(t, a.Net) + sent(t, b.Net) - before
}

// perftest runs one of its programs on both devices and wants the line of
// results, which is the last that begins with the size.
func perftest(t *testing.T, a, b vmtest.Device, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	command := func(dev string, more ...string) *exec.Cmd {
		// GID 1 is the RoCE v2 one of the IPv4 address.
		all := append([]string{"-d", dev, "-x", "1", "-F"}, args...)
		return exec.CommandContext(ctx, name, append(all, more...)...)
	}
	var told bytes.Buffer
	server := command(a.Name)
	server.Stdout, server.Stderr = &told, &told
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	var out []byte
	// The server listens when it is ready, and does not say so.
	testutil.Eventually(t, time.Minute, func() error {
		var err error
		out, err = command(b.Name, a.Addr.String()).CombinedOutput()
		if err != nil && strings.Contains(string(out), "onnect") {
			return fmt.Errorf("%w: %s", err, out)
		}
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		return nil
	})
	if err := server.Wait(); err != nil {
		t.Errorf("%s, the server: %v\n%s", name, err, told.String())
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 3 && f[0] == args[1] {
			t.Logf("%s: %s", name, strings.TrimSpace(line))
			return
		}
	}
	t.Errorf("%s has no result:\n%s", name, out)
}

// sent is how many bytes a network device has sent.
func sent(t *testing.T, dev string) (n int) {
	t.Helper()
	b, err := os.ReadFile("/sys/class/net/" + dev + "/statistics/tx_bytes")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(b), &n); err != nil {
		t.Fatal(err)
	}
	return n
}
