package onesided_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

func TestKilledInGuest(t *testing.T) {
	testutil.NoLeaks(t)
	pinned(t) // a compiler is slow in the guest
	vmtest.Run(t, 4*time.Minute, func(t *testing.T) {
		vmtest.Pair(t)
		t.Run("AtEveryPoint", testKilled)
		t.Run("AnyTime", testKilledAnyTime)
	})
}

// The daemon dies at every point: the process goes on as it was, and nothing of it
// is pinned.
func testKilled(t *testing.T) {
	testutil.NoLeaks(t)
	noResources(t)
	p := startPinned(t, nil, "--threads", "3")
	limit := unix.Rlimit{Cur: 64 << 10, Max: 1 << 20}
	if err := unix.Prlimit(p.Pid(), unix.RLIMIT_MEMLOCK, &limit, nil); err != nil {
		t.Fatal(err)
	}
	before := kept(t, p.Pid())
	cmd := victimCmd(p.Pid(), 0)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("a daemon that nobody kills: %v\n%s", err, cmd.Stderr)
	}
	points := strings.Fields(string(out))
	for _, want := range []string{"gate-shut", "memlock", "gate-running", "registered", "used"} {
		if !slices.Contains(points, want) {
			t.Errorf("no point %s in %v", want, points)
		}
	}
	killed, began := 0, time.Now()
	for _, n := range sample(points) {
		cmd := victimCmd(p.Pid(), n)
		err := cmd.Run()
		if cmd.ProcessState.Sys().(interface{ Signaled() bool }).Signaled() {
			killed++
		} else {
			t.Logf("not killed at point %d (%s): %v %s", n, points[n-1], err, cmd.Stderr)
		}
		afterKill(t, p, before, points[n-1])
	}
	t.Logf("killed %d times in %v, of %d points", killed, time.Since(began), len(points))
	if killed < 10 {
		t.Errorf("killed %d times", killed)
	}
}

// sample chooses the first and the last of each name, by number from 1.
func sample(points []string) []int {
	first, last := map[string]int{}, map[string]int{}
	for i, name := range points {
		if first[name] == 0 {
			first[name] = i + 1
		}
		last[name] = i + 1
	}
	var out []int
	for name := range first {
		out = append(out, first[name], last[name])
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// kept is what a daemon that was killed leaves as it was: all but its mappings, as the
// area that it has made calls from stays (inject).
func kept(t testing.TB, pid int) string { return withoutMaps(outside(t, pid)) }

func withoutMaps(s string) string { return s[strings.Index(s, "Limit "):] }

// afterKill waits until the process is as it was before: it may still be at work on
// what it was made to do, and wait for a descriptor that will not come.
func afterKill(t testing.TB, p *program, before, when string) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, func() error {
		if now := kept(t, p.Pid()); now != before {
			return fmt.Errorf("killed at %s: the process was\n%s\nand is\n%s", when, before, now)
		}
		return nil
	})
	p.verify()
}

func testKilledAnyTime(t *testing.T) {
	testutil.NoLeaks(t)
	noResources(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	p := startPinned(t, nil, "--threads", "3")
	before := kept(t, p.Pid())
	whole := killAfter(t, victimCmd(p.Pid(), 0), time.Minute)
	for range 15 {
		after := time.Duration(rnd.Int64N(int64(whole)))
		killAfter(t, victimCmd(p.Pid(), 0), after)
		afterKill(t, p, before, after.String())
	}
}

// killAfter kills a daemon that long after its first point, and returns how long it
// was at work. What comes before that takes most of the time.
func killAfter(t testing.TB, cmd *exec.Cmd, after time.Duration) time.Duration {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_, err = out.Read(make([]byte, 1))
	began := time.Now()
	end := time.AfterFunc(after, func() { _ = cmd.Process.Signal(unix.SIGKILL) })
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait()
	if err != nil {
		t.Fatalf("it passed no point: %v: %s", err, cmd.Stderr)
	}
	end.Stop()
	return time.Since(began)
}

func victimCmd(pid, at int) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", envVictim, pid, at))
	cmd.Stderr = new(bytes.Buffer)
	return cmd
}
