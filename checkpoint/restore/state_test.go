package restore

import (
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

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
)

// With the vdso of another kernel, programs that read clocks all the time go on.
func TestVDSOBridge(t *testing.T) {
	require(t)
	for name, p := range map[string]func(t *testing.T) *testutil.SelfChecking{
		"clocks": func(t *testing.T) *testutil.SelfChecking {
			return testutil.StartEverything(t, testutil.ProgramConfig{Args: []string{"--only", "clocks,regs,timers"}})
		},
		"go": func(t *testing.T) *testutil.SelfChecking { return testutil.StartGo(t, testutil.ProgramConfig{}) },
	} {
		t.Run(name, func(t *testing.T) {
			testutil.NoLeaks(t)
			p := p(t)
			before, err := proc.ReadMaps(p.Pid())
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				trap := move(t, p.Process, func(c *Config) { c.ForceVDSOBridge = true })
				trap.resident(t)
				p.Check()
			}
			after, err := proc.ReadMaps(p.Pid())
			if err != nil {
				t.Fatal(err)
			}
			old, now := vdsoAmong(before).span(), vdsoAmong(after).span()
			if old.Overlaps(now) {
				t.Errorf("the vdso is at %v, where the old one was", now)
			}
			if got := vdsoReader(t, p.Pid()); !got {
				t.Error("the old vdso's place has no code")
			}
			p.Verify()
		})
	}
}

// vdsoReader reports whether the process has a copy of a vdso that is not the
// kernel's.
func vdsoReader(t *testing.T, pid int) bool {
	t.Helper()
	ms, err := proc.ReadMaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, m := range ms {
		b := make([]byte, 4)
		if m.Name == "" && m.Prot == unix.PROT_READ|unix.PROT_EXEC {
			if _, err := f.ReadAt(b, int64(m.Start)); err == nil && string(b) == "\x7fELF" {
				return true
			}
		}
	}
	return false
}

// A real program in a pid namespace of its own, whose init ends with it.
func TestOwnNamespace(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	p := testutil.StartEverything(t, testutil.ProgramConfig{Args: []string{"--only", "regs,signals,timers,sync"}})
	was := p.Pid()
	trap := move(t, p.Process, func(c *Config) { c.PIDNamespace = NamespaceNew })
	trap.resident(t)
	st, err := proc.ReadStatus(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(st.NSPID); n < 2 || st.NSPID[n-1] != was {
		t.Errorf("pids %v, want %d at the end", st.NSPID, was)
	}
	init := st.PPID
	if b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", init)); strings.TrimSpace(string(b)) != initName {
		t.Errorf("its parent %d is %q, want %s", init, b, initName)
	}
	p.Verify()
	testutil.Eventually(t, limit, func() error {
		if err := unix.Kill(init, 0); err != unix.ESRCH {
			return fmt.Errorf("its init is still there: %v", err)
		}
		return nil
	})
}

// What /proc says of a process that ran under another user, with limits,
// capabilities and priorities, is the same afterwards.
func TestAttributes(t *testing.T) {
	require(t)
	testutil.Require(t, testutil.Program("python3"))
	testutil.NoLeaks(t)
	cmd := exec.Command("python3", "-u", "-c", `
import ctypes, os, resource, signal, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096 << 20, 8192 << 20))
resource.setrlimit(resource.RLIMIT_NOFILE, (77, 99))
os.sched_setaffinity(0, [0])
libc.prctl(29, 12345678, 0, 0, 0)   # timer slack
libc.prctl(36, 1, 0, 0, 0)          # child subreaper
libc.prctl(24, 20, 0, 0, 0)         # bounding set without CAP_SYS_PACCT
libc.prctl(8, 1, 0, 0, 0)           # keep capabilities
os.setgroups([7, 8, 9]); os.setresgid(11, 12, 13); os.setresuid(21, 22, 23)
class H(ctypes.Structure): _fields_ = [("v", ctypes.c_uint32), ("p", ctypes.c_int)]
class D(ctypes.Structure): _fields_ = [("e", ctypes.c_uint32), ("p", ctypes.c_uint32), ("i", ctypes.c_uint32)]
bind, raw, chown = 1 << 10, 1 << 13, 1
d = (D * 2)(D(raw, bind | raw | chown, bind | raw))
assert libc.capset(ctypes.byref(H(0x20080522, 0)), d) == 0
assert libc.prctl(47, 2, 10, 0, 0) == 0  # ambient CAP_NET_BIND_SERVICE
libc.prctl(38, 1, 0, 0, 0)          # no new privileges
libc.prctl(4, 1, 0, 0, 0)           # dumpable
libc.prctl(41, 1, 0, 0, 0)          # no huge pages
libc.personality(0x0040000)         # ADDR_NO_RANDOMIZE
os.umask(0o137); os.chdir("/usr"); os.nice(7)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGCHLD, signal.SIGURG])
for s in (signal.SIGUSR1, signal.SIGCHLD): os.kill(os.getpid(), s)
def named():
    libc.prctl(15, b"a thread", 0, 0, 0)
    time.sleep(1e6)
threading.Thread(target=named, daemon=True).start()
time.sleep(0.1)
print("ready")
time.sleep(1e6)
`)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p := testutil.StartCmd(t, cmd, testutil.DefaultLimit)
	p.WaitText("ready", limit)
	want := attributes(t, p.Pid())
	for hop := range 2 {
		move(t, p, nil).resident(t)
		got := attributes(t, p.Pid())
		for i := range want {
			if got[i] != want[i] {
				t.Errorf("hop %d: %s, want %s", hop, got[i], want[i])
			}
		}
	}
}

// attributes is what /proc tells of a process and its threads, without what
// changes by itself.
func attributes(t *testing.T, pid int) (out []string) {
	t.Helper()
	keep := []string{"Name", "Umask", "Uid", "Gid", "Groups", "NSpid", "NSpgid", "NSsid", "SigPnd", "ShdPnd", "SigBlk",
		"SigIgn", "SigCgt", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Cpus_allowed", "THP_enabled", "Threads"}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatal(err)
	}
	for i, task := range tasks {
		dir := fmt.Sprintf("/proc/%d/task/%s", pid, task.Name())
		read := func(name string) string {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		for line := range strings.Lines(read("status")) {
			if k, _, _ := strings.Cut(line, ":"); slices.Contains(keep, k) {
				f := strings.Fields(line)
				if strings.HasPrefix(k, "NS") {
					f = []string{f[0], f[len(f)-1]} // as the process sees it
				}
				out = append(out, fmt.Sprintf("thread %d: %s", i, strings.Join(f, " ")))
			}
		}
		out = append(out, read("limits"), read("personality"), read("oom_score_adj"), read("cmdline"))
		st := strings.Fields(read("stat")[strings.LastIndexByte(read("stat"), ')'):])
		out = append(out, "nice "+st[16]+" policy "+st[38])
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%s/timerslack_ns", task.Name())); err == nil {
			out = append(out, "timer slack "+string(b))
		}
	}
	for _, link := range []string{"exe", "cwd", "root"} {
		l, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, link))
		out = append(out, fmt.Sprint(link, " ", l, " ", err))
	}
	return out
}

// A process that was neither leader of its session nor of its group is in such
// ones again, of the same numbers.
func TestSessionAndGroup(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	pid, sid, pgid := freePID(t), freePID(t)+1, freePID(t)+2
	for _, ns := range []string{NamespaceHost, NamespaceNew} {
		img, mem, trap, _ := tiny(t, pid)
		img.Processes[0].SID, img.Processes[0].PGID = sid, pgid
		cfg := config(t)
		cfg.PIDNamespace = ns
		ctx := timed(t)
		s, err := Prepare(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Abort(ctx)
		if err := s.Rebuild(ctx, img, mem, trap); err != nil {
			t.Fatal(err)
		}
		trap.close()
		st, err := proc.ReadStatus(s.PID())
		if err != nil {
			t.Fatal(err)
		}
		last := func(l []int) int { return l[len(l)-1] }
		if last(st.NSSID) != sid || last(st.NSPGID) != pgid {
			t.Errorf("%s: session %v, group %v, want %d and %d", ns, st.NSSID, st.NSPGID, sid, pgid)
		}
		if err := s.Abort(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// A SIGSTOPped process stands in its stop after the release, and goes on after
// SIGCONT.
func TestStoppedStaysStopped(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	ctx := timed(t)
	cfg := config(t)
	img, mem, trap, out := tiny(t, freePID(t))
	defer trap.close()
	img.Processes[0].Stopped = true
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(ctx)
	if err := errors.Join(s.Rebuild(ctx, img, mem, trap), s.Park(ctx), s.Release(ctx)); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, limit, func() error {
		st, err := proc.ReadStat(s.PID())
		if err == nil && st.State != 'T' {
			err = fmt.Errorf("state %c", st.State)
		}
		return err
	})
	if b, _ := os.ReadFile(out); len(b) != 0 {
		t.Errorf("it ran: %q", b)
	}
	if err := unix.Kill(s.PID(), unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, limit, func() error {
		if b, _ := os.ReadFile(out); len(b) == 0 {
			return errors.New("it has not run after SIGCONT")
		}
		return nil
	})
}

// POSIX timers keep their numbers, whether the kernel can be asked for them or
// has to be counted up to them.
func TestTimerNumbers(t *testing.T) {
	require(t)
	for _, count := range []bool{false, true} {
		t.Run(fmt.Sprintf("count %v", count), func(t *testing.T) {
			testutil.NoLeaks(t)
			ctx := timed(t)
			img, mem, trap, _ := tiny(t, freePID(t))
			defer trap.close()
			p := &img.Processes[0]
			for _, id := range []int{3, 0, 2500} {
				p.PosixTimers = append(p.PosixTimers, imageTimer(id))
			}
			s, err := Prepare(ctx, config(t))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Abort(ctx)
			s.countTimers = count
			if err := s.Rebuild(ctx, img, mem, trap); err != nil {
				t.Fatal(err)
			}
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timers", s.PID()))
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range []int{0, 3, 2500} {
				if !strings.Contains(string(b), fmt.Sprintf("ID: %d\n", id)) {
					t.Errorf("no timer %d:\n%s", id, b)
				}
			}
			if n := strings.Count(string(b), "notify:"); n != 3 {
				t.Errorf("%d timers, want 3:\n%s", n, b)
			}
		})
	}
}

// If the program that rebuilds is killed, whatever it does, nothing stays but a
// cgroup that Reattach removes; from the moment that the process is parked, that.
func TestKilledTracer(t *testing.T) {
	require(t)
	if os.Getenv(killedEnv) != "" {
		killedChild(t)
		return
	}
	testutil.NoLeaks(t)
	var points []string
	for _, step := range []string{"prepare", "check", "threads", "layout", "mappings", "trap", "descriptors", "process", "thread state", "memory", "registers", "park", "release"} {
		points = append(points, "restore/"+step+"/before", "restore/"+step+"/after")
	}
	for i, point := range points {
		ns := []string{NamespaceHost, NamespaceNew}[i%2]
		cfg := config(t)
		cfg.PIDNamespace = ns
		ctx, cancel := context.WithTimeout(context.Background(), limit)
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestKilledTracer$", "-test.v")
		cmd.Env = append(os.Environ(), killedEnv+"="+strings.Join([]string{point, cfg.ID, cfg.CgroupParent, ns}, " "))
		text, err := cmd.CombinedOutput()
		cancel()
		var ee *exec.ExitError
		if !errors.As(err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("%s: the child was not killed: %v\n%s", point, err, text)
		}
		s, err := Reattach(timed(t), cfg)
		switch {
		case point == "restore/release/after":
			// It ran into its end, before or after the Reattach.
			if err == nil {
				err = s.Abort(timed(t))
			}
			if !errors.Is(err, ErrNoSkeleton) && !errors.Is(err, ErrState) {
				t.Errorf("%s: %v", point, err)
			}
		case point == "restore/park/after", point == "restore/release/before":
			if err == nil {
				err = s.Abort(timed(t))
			}
			if err != nil {
				t.Errorf("%s: %v", point, err)
			}
		case !errors.Is(err, ErrNoSkeleton):
			t.Errorf("%s: %v, want %v", point, err, ErrNoSkeleton)
		}
	}
}

const killedEnv = "PAGEFERRY_TEST_KILLED_TRACER"

// killedChild rebuilds and kills itself at a point.
func killedChild(t *testing.T) {
	f := strings.Fields(strings.Replace(os.Getenv(killedEnv), "thread state", "thread_state", 1))
	point := strings.Replace(f[0], "thread_state", "thread state", 1)
	cfg := Config{ID: f[1], CgroupParent: f[2], PIDNamespace: f[3], KillPoint: func(name string) {
		if name == point {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			time.Sleep(time.Hour)
		}
	}}
	ctx := context.Background()
	img, mem, trap, _ := tiny(t, freePID(t))
	img.Processes[0].Threads[0].Regs.RIP += 100 // zeros: if it ran, it would die
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Rebuild(ctx, img, mem, trap), s.Park(ctx), s.Release(ctx)); err != nil {
		t.Fatal(err)
	}
	t.Fatalf("never came to %q", point)
}
