package checkpoint

import (
	"bufio"
	"os/exec"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

// A held process ends with the status asked for, and nothing of it runs: neither
// the loop that prints, nor the handlers of signals that came while it was held.
func TestExit(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.CgroupV2, testutil.Program("python3"))
	for _, stopped := range []bool{false, true} {
		cmd := exec.Command("python3", "-c", `
import signal, threading, time
def run():
    while True:
        print("tick", flush=True); time.sleep(0.001)
for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGCONT):
    signal.signal(s, lambda n, f: print("signal", n, flush=True))
for _ in range(8): threading.Thread(target=run, daemon=True).start()
run()
`)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewScanner(out)
		if !lines.Scan() {
			t.Fatal("it never began")
		}
		s, ctx := openFor(t, cmd.Process.Pid)
		if stopped {
			must(t, cmd.Process.Signal(unix.SIGSTOP))
			await(t, cmd.Process.Pid, 'T')
		}
		must(t, s.Isolate(ctx))
		must(t, s.Freeze(ctx))
		must(t, s.Hold(ctx))
		for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGUSR1, unix.SIGCONT} {
			must(t, cmd.Process.Signal(sig))
		}
		must(t, s.Exit(ctx, 0))
		for lines.Scan() {
			if strings.Contains(lines.Text(), "signal") {
				t.Errorf("the program ran on: %q", lines.Text())
			}
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("its parent saw %v", err)
		}
		if g := s.Group(); g != "" {
			t.Errorf("left its cgroup %s", g)
		}
	}
}
