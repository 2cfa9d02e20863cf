package checkpoint

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

// However the tracer dies, the program goes on unharmed: by itself, or, once it
// is held, when somebody thaws it.
func TestTracerKilledAtEveryPoint(t *testing.T) {
	type start = func(testing.TB, testutil.ProgramConfig) *testutil.SelfChecking
	for _, c := range []struct {
		name  string
		start start
		cfg   testutil.ProgramConfig
	}{
		// A thread that is stopped, and let go before anybody could look at it,
		// may see EINTR where SIGCONT brings it too.
		{"everything", testutil.StartEverything, testutil.ProgramConfig{Args: []string{"--sigcont-ok"}}},
		{"Go", testutil.StartGo, testutil.ProgramConfig{}},
		{"Python", testutil.StartPython, testutil.ProgramConfig{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
			testutil.NoLeaks(t)
			r := testutil.NewRecorder(t)
			c.cfg.Recorder = r
			p := c.start(t, c.cfg)
			points := killPoints(t, p.Pid())
			for _, n := range sample(points) {
				killAt(t, p.Pid(), n, points[n-1])
				afterKill(t, p, fmt.Sprintf("point %d, %s", n, points[n-1]))
			}
			p.Verify()
			r.OneOwner(0)
		})
	}
}

// killPoints takes a process through a session and returns the points passed.
func killPoints(t *testing.T, pid int) []string {
	cmd := victimCmd(pid, 0)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("a session that nobody kills: %v\n%s", err, cmd.Stderr)
	}
	return strings.Fields(string(out))
}

func victimCmd(pid, at int) *exec.Cmd {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d %d", envVictim, pid, at))
	cmd.Stderr = new(bytes.Buffer)
	return cmd
}

// sample chooses of each name the first, the last and some others, by number
// from 1, since a process with many threads passes some points hundreds of times.
func sample(points []string) []int {
	by := map[string][]int{}
	for i, name := range points {
		by[name] = append(by[name], i+1)
	}
	var out []int
	for _, at := range by {
		out = append(out, at[0], at[len(at)-1], at[len(at)/2])
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func killAt(t *testing.T, pid, n int, name string) {
	t.Helper()
	cmd := victimCmd(pid, n)
	err := cmd.Run()
	if ws, ok := cmd.ProcessState.Sys().(interface{ Signaled() bool }); err == nil || !ok || !ws.Signaled() {
		// Not every run of a busy program passes all points.
		t.Logf("the tracer was not killed at point %d (%s): %v %s", n, name, err, cmd.Stderr)
	}
}

// afterKill lets the program go if it is held, and sees that it runs.
func afterKill(t *testing.T, p *testutil.SelfChecking, when string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := Reattach(ctx, p.Pid(), Options{})
	if err != nil {
		t.Fatalf("killed at %s: %v", when, err)
	}
	defer s.Close()
	if !s.Held() {
		p.Beat(2)
	}
	if err := s.Thaw(ctx); err != nil {
		t.Fatalf("killed at %s: %v", when, err)
	}
	p.Beat(2)
	p.Check()
}

// The tracer is killed at any moment, between and inside all that it does.
func TestTracerKilledAnyTime(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	r := testutil.NewRecorder(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: r, Args: []string{"--sigcont-ok"}})
	began := time.Now()
	if err := victimCmd(p.Pid(), 0).Run(); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(began)
	for range 60 {
		cmd := victimCmd(p.Pid(), 0)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		after := time.Duration(rnd.Int64N(int64(whole)))
		end := time.AfterFunc(after, func() { _ = cmd.Process.Signal(unix.SIGKILL) })
		_ = cmd.Wait()
		end.Stop()
		afterKill(t, p, after.String())
	}
	p.Verify()
	r.OneOwner(0)
}
