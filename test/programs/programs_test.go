// Package programs_test checks that the programs that verify themselves are
// silent while nobody moves them, and not silent when something is wrong.
package programs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func TestSilentAlone(t *testing.T) {
	type start = func(testing.TB, testutil.ProgramConfig) *testutil.SelfChecking
	for name, c := range map[string]struct {
		start start
		cfg   testutil.ProgramConfig
	}{
		"everything":   {testutil.StartEverything, testutil.ProgramConfig{}},
		"avx2":         {testutil.StartEverything, testutil.ProgramConfig{Args: []string{"--only", "regs", "--without", "avx512"}}},
		"sse":          {testutil.StartEverything, testutil.ProgramConfig{Args: []string{"--only", "regs", "--without", "avx512,avx"}}},
		"200 threads":  {testutil.StartEverything, testutil.ProgramConfig{Threads: 200, Args: []string{"--only", "regs"}}},
		"churn, forks": {testutil.StartChurn, testutil.ProgramConfig{Threads: 2, Args: []string{"--with", "fork"}}},
		"Go":           {testutil.StartGo, testutil.ProgramConfig{}},
		"workload":     {testutil.StartWorkload, testutil.ProgramConfig{Args: []string{"--size", "16MiB", "--threads", "3"}}},
		"Python":       {testutil.StartPython, testutil.ProgramConfig{}},
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			r := testutil.NewRecorder(t)
			c.cfg.Recorder = r
			p := c.start(t, c.cfg)
			if b := p.Beat(100); len(b.Epochs) != 1 {
				t.Errorf("heartbeats from %v", b.Epochs)
			}
			p.Verify()
			testutil.Eventually(t, 5*time.Second, func() error {
				if !r.Beats(p.Identity).OK {
					return os.ErrNotExist
				}
				return nil
			})
			r.OneOwner(0)
		})
	}
}

// SIGSTOP and SIGCONT interrupt some system calls, as signal(7) says. Nothing
// else may be noticed; and where that is not allowed, it is.
func TestStoppedAndContinued(t *testing.T) {
	testutil.NoLeaks(t)
	r := testutil.NewRecorder(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: r, Args: []string{"--sigcont-ok"}})
	for range 20 {
		p.Beat(2)
		p.Signal(unix.SIGSTOP)
		p.Signal(unix.SIGCONT)
	}
	p.Check()
	p.Verify()

	q := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: r, Args: []string{"--only", "waits"}})
	testutil.Eventually(t, 30*time.Second, func() error {
		q.Signal(unix.SIGSTOP)
		q.Signal(unix.SIGCONT)
		if q.Alive() {
			return os.ErrExist
		}
		return nil
	})
	if b, _ := os.ReadFile(q.Report); !strings.Contains(string(b), "returned EINTR") {
		t.Errorf("an interrupted call was not reported: %q", b)
	}
}

// The cgroup freezer interrupts the same system calls as SIGCONT does.
func TestFrozenAndThawed(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.CgroupV2)
	testutil.NoLeaks(t)
	cg := filepath.Join(testutil.CgroupRoot(t), testutil.Name())
	if err := os.Mkdir(cg, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A cgroup is busy for a moment after its last process has ended.
		testutil.Eventually(t, 10*time.Second, func() error { return os.Remove(cg) })
	})
	write := func(file, s string) {
		if err := os.WriteFile(filepath.Join(cg, file), []byte(s), 0); err != nil {
			t.Fatal(err)
		}
	}
	r := testutil.NewRecorder(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: r, Args: []string{"--sigcont-ok"}})
	write("cgroup.procs", itoa(p.Pid()))
	for range 20 {
		write("cgroup.freeze", "1")
		testutil.Eventually(t, 10*time.Second, func() error {
			if b, err := os.ReadFile(filepath.Join(cg, "cgroup.events")); err != nil || !strings.Contains(string(b), "frozen 1") {
				return fmt.Errorf("not frozen: %v %s", err, b)
			}
			return nil
		})
		write("cgroup.freeze", "0")
		p.Beat(2)
	}
	p.Verify()
	r.OneOwner(0)
}

// A program whose memory was changed from outside must say so.
func TestDamageIsFound(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Args: []string{"--only", "memory", "--mem", "2"}})
	mem, err := os.OpenFile(filepath.Join("/proc", itoa(p.Pid()), "mem"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	// The bulk is the anonymous mapping of just that size, or holds it.
	start, end := anonymous(t, p.Pid(), 2<<20)
	for at := start + 1000; at < end; at += 4096 {
		if _, err := mem.WriteAt([]byte{0x5a}, at); err != nil {
			if at == start+1000 {
				t.Fatal(err)
			}
			break // it has noticed already, and ended
		}
	}
	select {
	case <-p.Gone():
	case <-time.After(30 * time.Second):
		t.Fatal("damaged memory was not noticed")
	}
	if b, _ := os.ReadFile(p.Report); !strings.HasPrefix(string(b), "bad ") {
		t.Errorf("report: %q", b)
	}
}
