package checkpoint

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/cgroup"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

func TestOpenRefuses(t *testing.T) {
	testutil.Require(t, testutil.Root)
	try := func(what string, pid int, want error) {
		t.Helper()
		s, err := Open(pid, Options{})
		if err == nil {
			s.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("%s (%d): %v, want %v", what, pid, err, want)
		}
	}
	try("nothing", 1<<22-1, ErrNoProcess)
	try("0", 0, ErrNoProcess)
	try("a kernel thread", 2, ErrKernelThread)
	try("itself", os.Getpid(), ErrSelf)
	if tids, err := proc.Threads(os.Getpid()); err != nil || len(tids) < 2 {
		t.Errorf("own threads: %v, %v", tids, err)
	} else {
		try("its own thread", tids[1], ErrSelf)
	}

	p := testutil.StartEverything(t, testutil.ProgramConfig{Args: []string{"--only", "regs"}})
	tids, err := proc.Threads(p.Pid())
	if err != nil || len(tids) < 2 {
		t.Fatal(tids, err)
	}
	try("a thread", tids[1], ErrThread)

	tr := proc.NewTracer()
	tr.Do(func() { err = sys.PtraceSeize(p.Pid(), 0) })
	if err != nil {
		t.Fatal(err)
	}
	try("a traced process", p.Pid(), ErrTraced)
	tr.Close()
	testutil.Eventually(t, 5*time.Second, func() error {
		s, err := Open(p.Pid(), Options{})
		if err == nil {
			s.Close()
		}
		return err
	})

	z := exec.Command("true")
	if err := z.Start(); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 5*time.Second, func() error {
		st, err := proc.ReadStat(z.Process.Pid)
		if err == nil && st.State != 'Z' {
			err = errors.New("still running")
		}
		return err
	})
	try("a zombie", z.Process.Pid, ErrZombie)
	_ = z.Wait()
}

// open opens a session on a program and closes it at the end of the test.
func openFor(t *testing.T, pid int) (*Session, context.Context) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	s, err := Open(pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = s.Thaw(context.Background())
		_ = s.Close()
	})
	return s, ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestHoldReattachKill(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.Start(t, "sleep", "1000")
	settled(t, p.Pid())
	own, err := cgroup.Of(p.Pid())
	must(t, err)
	s, ctx := openFor(t, p.Pid())
	if err := s.Hold(ctx); !errors.Is(err, ErrState) {
		t.Errorf("holding what runs: %v", err)
	}
	if _, _, err := s.Capture(ctx); !errors.Is(err, ErrState) {
		t.Errorf("capturing what runs: %v", err)
	}
	must(t, s.Isolate(ctx))
	must(t, s.Isolate(ctx))
	must(t, s.Freeze(ctx))
	if err := s.Freeze(ctx); !errors.Is(err, ErrState) {
		t.Errorf("a second freeze: %v", err)
	}
	img, mem, err := s.Capture(ctx)
	must(t, err)
	if img.Processes[0].Exe == "" || img.Processes[0].Threads[0].Comm != "sleep" {
		t.Errorf("captured %+v", img.Processes[0])
	}
	must(t, s.Hold(ctx))
	must(t, s.Hold(ctx))
	group := cgroup.At(s.Group())
	must(t, s.Close())
	if f, err := group.Frozen(); !f {
		t.Fatalf("closing the session let the process run: %v", err)
	}

	s, err = Reattach(ctx, p.Pid(), Options{})
	must(t, err)
	defer s.Close()
	if !s.Held() {
		t.Fatal("not found held")
	}
	for _, r := range mem[0].Lazy.Ranges() {
		must(t, s.ReadPages(0, []page.Range{r}, make([]byte, r.Bytes())))
	}
	must(t, s.Thaw(ctx))
	must(t, s.Thaw(ctx))
	if now, err := cgroup.Of(p.Pid()); now != own || group.Exists() {
		t.Errorf("thawed it is in %v, not %v (%v)", now, own, err)
	}

	must(t, s.Isolate(ctx))
	must(t, s.Freeze(ctx))
	must(t, s.Hold(ctx))
	must(t, s.Kill(ctx))
	must(t, s.Kill(ctx))
	must(t, s.Thaw(ctx))
	_ = p.Wait(10 * time.Second)
	if p.Alive() || group.Exists() {
		t.Error("killed, and something is left")
	}
}

// settled waits until sleep is asleep, and so behind its exec.
func settled(t *testing.T, pid int) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, func() error {
		b, err := os.ReadFile("/proc/" + itoa(pid) + "/syscall")
		if err == nil && !strings.HasPrefix(string(b), itoa(unix.SYS_CLOCK_NANOSLEEP)+" ") {
			err = errors.New("not in its sleep: " + string(b))
		}
		return err
	})
}

// A process that was stopped stays so, also after capture and hold, and SIGCONT
// ends it as before.
func TestStoppedStaysStopped(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	r := testutil.NewRecorder(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Recorder: r, Args: []string{"--sigcont-ok"}})
	for range 10 {
		p.Signal(unix.SIGSTOP)
		await(t, p.Pid(), 'T')
		took, img := captureOnce(t, p.Pid(), true)
		if img != nil && !img.Processes[0].Stopped {
			t.Fatalf("the image does not say that it was stopped (%v)", took)
		}
		await(t, p.Pid(), 'T')
		p.Signal(unix.SIGCONT)
		p.Beat(2)
		_, img = captureOnce(t, p.Pid(), false)
		if img != nil && img.Processes[0].Stopped {
			t.Fatal("the image says that a running process was stopped")
		}
		p.Check()
	}
	p.Verify()
}

func await(t *testing.T, pid int, state byte) {
	t.Helper()
	testutil.Eventually(t, 10*time.Second, func() error {
		st, err := proc.ReadStat(pid)
		if err == nil && st.State != state {
			err = errors.New("it is in state " + string(st.State))
		}
		return err
	})
}

func TestProcessEndsWhileFrozen(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Args: []string{"--only", "regs"}})
	s, ctx := openFor(t, p.Pid())
	must(t, s.Isolate(ctx))
	must(t, s.Freeze(ctx))
	p.Signal(unix.SIGKILL)
	if _, _, err := s.Capture(ctx); !errors.Is(err, proc.ErrGone) {
		t.Errorf("capture: %v", err)
	}
	if err := s.Thaw(ctx); !errors.Is(err, proc.ErrGone) {
		t.Errorf("thaw: %v", err)
	}
	// Whoever started it learns of its end now.
	_ = p.Wait(10 * time.Second)
	if s.Group() != "" {
		t.Error("its cgroup is left")
	}
}

func TestClocks(t *testing.T) {
	m, b, err := Clocks(os.Getpid())
	if err != nil || m <= 0 || b < m {
		t.Errorf("%v %v %v", m, b, err)
	}
	if _, _, err := Clocks(1<<22 - 1); !errors.Is(err, ErrNoProcess) {
		t.Error(err)
	}
	h, err := ThisHost()
	if err != nil || h.XFeatures&3 != 3 || h.XSize < 576 {
		t.Errorf("%+v %v", h, err)
	}
}

func itoa(n int) string { return strconv.Itoa(n) }
