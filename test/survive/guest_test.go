package survive_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
)

// guest is a program that moves.
type guest struct {
	r        *rig
	t        testing.TB
	at       *node // where it lives
	pid      int   // what that host calls it
	self     int   // what it calls itself, wherever it is
	comm     string
	identity string
	report   string
	output   string
	compress string // of its requests, as the others are
	trap     string
	shown    string
}

var guests atomic.Uint32

// launch starts a program on host a, as a service manager would: a session of
// its own, nothing of a terminal.
func (r *rig) launch(t testing.TB, n *node, cmd *exec.Cmd) *guest {
	t.Helper()
	g := &guest{r: r, t: t, at: n, output: filepath.Join(t.TempDir(), "output")}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	out, err := os.OpenFile(g.output, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = null, out, out
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	// High up, so that the numbers of its threads are free on the other host,
	// too: it keeps them then.
	n.lastPID(t, 20000+500*int(guests.Load()%20))
	p, err := n.host.Start("guest", cmd)
	n.lastPID(t, 300)
	if err != nil {
		t.Fatal(err)
	}
	if g.pid, err = n.host.PID(p.PID()); err != nil {
		t.Fatal(err)
	}
	g.comm, g.self = filepath.Base(cmd.Path), g.pid
	t.Cleanup(func() {
		g.end()
		if b, _ := os.ReadFile(g.output); t.Failed() {
			t.Logf("what %s printed:\n%s", g.identity, b[max(0, len(b)-4096):])
		}
	})
	return g
}

// lastPID has the host count on from pid.
func (n *node) lastPID(t testing.TB, pid int) {
	t.Helper()
	if _, err := n.host.Run(context.Background(), "sh", "-c", fmt.Sprintf("echo %d > /proc/sys/kernel/ns_last_pid", pid)); err != nil {
		t.Fatal(err)
	}
}

// selfChecking launches one of test/programs, which sends heartbeats.
func (r *rig) selfChecking(t testing.TB, n *node, args ...string) *guest {
	t.Helper()
	id := fmt.Sprintf("guest-%d", guests.Add(1))
	report := filepath.Join(t.TempDir(), "report")
	cmd := exec.Command(args[0], append(args[1:], "--report", report, "--identity", id, "--heartbeat", r.recorder.Address)...)
	g := r.launch(t, n, cmd)
	g.identity, g.report = id, report
	testutil.Eventually(t, patience(60*time.Second), func() error {
		b, _ := os.ReadFile(g.output)
		if !strings.Contains(string(b), "ready") {
			return fmt.Errorf("%v is not ready: %s", cmd.Args, b)
		}
		return nil
	})
	g.beat(2)
	return g
}

// small is a C program with threads, registers, timers and memory that checks
// itself, small enough to move in a moment.
func (r *rig) small(t testing.TB, n *node, args ...string) *guest {
	t.Helper()
	dir := filepath.Dir(testutil.Socket(t, "x"))
	return r.selfChecking(t, n, append([]string{testutil.CC(t, "everything"), "--only", "regs,sync,timers,memory",
		"--threads", "2", "--mem", "4", "--beat-us", "2000", "--sigcont-ok", "--dir", dir}, args...)...)
}

// beat waits for n more heartbeats.
func (g *guest) beat(n uint64) {
	g.t.Helper()
	before := g.r.recorder.Beats(g.identity).Count
	testutil.Eventually(g.t, patience(20*time.Second), func() error {
		if s := g.said(); s != "" {
			g.t.Fatalf("%s: %s", g.identity, s)
		}
		if b := g.r.recorder.Beats(g.identity).Count; b < before+n {
			return fmt.Errorf("%s: %d heartbeats, wanted %d more than %d", g.identity, b, n, before)
		}
		return nil
	})
}

// said is what the program reported, "" if nothing.
func (g *guest) said() string {
	b, _ := os.ReadFile(g.report)
	return strings.TrimSpace(string(b))
}

// oneOwner fails the test unless the heartbeats came from one copy at a time,
// with at most that many moves.
func (g *guest) oneOwner(moves int) {
	g.t.Helper()
	b := g.r.recorder.Beats(g.identity)
	if len(b.Forks) > 0 {
		g.t.Errorf("%s had two owners: %s (%d times)", g.identity, b.Forks[0], len(b.Forks))
	}
	for _, s := range b.Bad {
		g.t.Errorf("%s: %s", g.identity, s)
	}
	if len(b.Epochs) > moves+1 {
		g.t.Errorf("%s: heartbeats from %d senders in turn, at most %d wanted: %v", g.identity, len(b.Epochs), moves+1, b.Epochs)
	}
}

// verify lets the program check everything and end.
func (g *guest) verify() {
	g.t.Helper()
	pid := g.outer()
	if pid == 0 {
		g.t.Fatalf("%s, pid %d of host %s, is gone; it reported %q", g.identity, g.pid, g.at.name(), g.said())
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		g.t.Fatal(err)
	}
	testutil.Eventually(g.t, patience(30*time.Second), func() error {
		if s := g.said(); s == "" {
			return fmt.Errorf("%s, pid %d of host %s, does not end on SIGTERM:\n%s", g.identity, g.pid, g.at.name(), threads(pid))
		}
		return nil
	})
	if s := g.said(); s != "ok" {
		g.t.Errorf("%s, pid %d of host %s, is not unharmed: %s", g.identity, g.pid, g.at.name(), s)
	}
}

// threads says what each thread of a process is at.
func threads(pid int) string {
	var b strings.Builder
	dirs, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, d := range dirs {
		read := func(name string) string {
			b, _ := os.ReadFile(filepath.Join(d, name))
			return strings.TrimSpace(string(b))
		}
		fmt.Fprintf(&b, "%s %s: syscall %s, waits in %s;", filepath.Base(d), read("comm"), read("syscall"), read("wchan"))
		for line := range strings.Lines(read("status")) {
			if strings.HasPrefix(line, "Sig") || strings.HasPrefix(line, "ShdPnd") || strings.HasPrefix(line, "State") {
				b.WriteString(" " + strings.Join(strings.Fields(line), " "))
			}
		}
		b.WriteString("\n")
	}
	return b.String()
}

// outer is what this program calls the guest, 0 where it is not there.
func (g *guest) outer() int { return g.at.outer(g.pid) }

// outer is what this program calls process pid of the host, 0 for none.
func (n *node) outer(pid int) int {
	for _, p := range n.processes() {
		if p.inner == pid {
			return p.pid
		}
	}
	return 0
}

// process is one of a host, as /proc tells without asking its memory.
type process struct {
	pid, inner int // here, and as the host calls it
	self       int // as it calls itself
	comm       string
	state      byte
	cgroup     string // below the host's
}

// processes lists all in the host's cgroups but its init.
func (n *node) processes() []process {
	var out []process
	_ = filepath.WalkDir(n.host.Cgroup(), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() || path == n.host.Cgroup() {
			return nil
		}
		b, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		for _, f := range strings.Fields(string(b)) {
			p := process{cgroup: strings.TrimPrefix(path, n.host.Cgroup()+"/")}
			p.pid, _ = strconv.Atoi(f)
			if p.describe() {
				out = append(out, p)
			}
		}
		return nil
	})
	return out
}

// describe fills in what /proc/PID/status says; false where it is gone.
func (p *process) describe() bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		v = strings.TrimSpace(v)
		switch k {
		case "Name":
			p.comm = v
		case "State":
			p.state = v[0]
		case "NSpid":
			// The second is the host's own; others are namespaces within.
			if f := strings.Fields(v); len(f) > 1 {
				p.inner, _ = strconv.Atoi(f[1])
				p.self, _ = strconv.Atoi(f[len(f)-1])
			}
		}
	}
	return p.state != 'Z' && p.state != 'X'
}

// end kills the program wherever it is.
func (g *guest) end() {
	for _, n := range g.r.nodes() {
		for _, p := range n.processes() {
			if p.self != g.self || p.comm != g.comm {
				continue
			}
			if fd, err := unix.PidfdOpen(p.pid, 0); err == nil {
				_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
				_ = unix.Close(fd)
			}
		}
	}
}

// request is how the tests move things, where nothing else matters.
func (g *guest) request(mode string) appliance.MigrateRequest {
	return appliance.MigrateRequest{PID: g.pid, To: g.r.other(g.at).addr(), Mode: mode, TCP: "close", Compress: g.compress, Trap: g.trap, Shown: g.shown}
}

// migrate begins to move it to the other host and follows that to its end.
func (g *guest) migrate(req appliance.MigrateRequest) (appliance.Report, error) {
	return g.migrateWithin(patience(time.Minute), req)
}

func (g *guest) migrateWithin(limit time.Duration, req appliance.MigrateRequest) (appliance.Report, error) {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	c := g.at.api()
	defer c.Close()
	rep, err := c.Migrate(ctx, req)
	if err != nil {
		return rep, err
	}
	return c.Watch(ctx, rep.ID, nil)
}

// meanwhile moves the guest, which must work, and calls during when the source says for
// the first time what when waits for.
func (g *guest) meanwhile(req appliance.MigrateRequest, when func(rep appliance.Report) bool, during func(n *node, id string)) appliance.Report {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	c := g.at.api()
	defer c.Close()
	rep, err := c.Migrate(ctx, req)
	if err != nil {
		g.t.Fatal(err)
	}
	called := false
	rep, err = c.Watch(ctx, rep.ID, func(rep appliance.Report) {
		if !called && when(rep) {
			called = true
			during(g.r.other(g.at), rep.ID)
		}
	})
	if err != nil || rep.Outcome != appliance.OutcomeDone {
		g.t.Fatalf("%s: %v, %s: %s", g.identity, err, rep.Outcome, rep.Reason)
	}
	if !called {
		g.t.Fatalf("%s: it was over before it could be looked at", g.identity)
	}
	return rep
}

// hop moves it to the other host, which must work.
func (g *guest) hop(mode string) appliance.Report {
	g.t.Helper()
	return g.hopAs(g.request(mode))
}

// hopAs is hop by a request that says more.
func (g *guest) hopAs(req appliance.MigrateRequest) appliance.Report {
	g.t.Helper()
	rep, err := g.migrate(req)
	// Events of inotify that the program has not read yet are there for a moment, and
	// so are files that it is about to remove, and its children.
	passing := func() bool {
		return strings.Contains(rep.Reason, "unread events") || strings.Contains(rep.Reason, "a process with children") || strings.Contains(rep.Reason, "/watched/f open or mapped")
	}
	for tries := 0; err == nil && tries < 5 && passing(); tries++ {
		rep, err = g.migrate(req)
	}
	if err == nil && strings.Contains(rep.Reason, migrate.ErrNoConvergence.Error()) {
		// On a busy host the link may be slower than the program.
		req.MaxDowntimeMS = 3000
		rep, err = g.migrate(req)
	}
	if err != nil {
		g.t.Fatal(err)
	}
	if rep.Outcome != appliance.OutcomeDone {
		g.t.Fatalf("%s, pid %d, from host %s: %s: %s", g.identity, g.pid, g.at.name(), rep.Outcome, rep.Reason)
	}
	g.at, g.pid = g.r.other(g.at), rep.DestPID
	return rep
}
