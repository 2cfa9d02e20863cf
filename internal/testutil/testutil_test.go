package testutil

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

// probe is a testing.TB that notes failures instead of failing, for tests of
// the checks themselves.
type probe struct {
	testing.TB
	errors   []string
	cleanups []func()
	skipped  bool
}

func (p *probe) Helper()                   {}
func (p *probe) Name() string              { return "probe" }
func (p *probe) Logf(string, ...any)       {}
func (p *probe) Failed() bool              { return len(p.errors) > 0 }
func (p *probe) Cleanup(f func())          { p.cleanups = append(p.cleanups, f) }
func (p *probe) Errorf(f string, a ...any) { p.errors = append(p.errors, fmt.Sprintf(f, a...)) }
func (p *probe) Fatalf(f string, a ...any) { p.Errorf(f, a...); runtime.Goexit() }
func (p *probe) Fatal(a ...any)            { p.errors = append(p.errors, fmt.Sprint(a...)); runtime.Goexit() }
func (p *probe) Skip(a ...any)             { p.skipped = true; runtime.Goexit() }
func (p *probe) finish() {
	for len(p.cleanups) > 0 {
		f := p.cleanups[len(p.cleanups)-1]
		p.cleanups = p.cleanups[:len(p.cleanups)-1]
		f()
	}
}

// on runs f against a probe, as a test would run.
func on(t *testing.T, f func(p *probe)) *probe {
	p := &probe{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer p.finish()
		f(p)
	}()
	<-done
	return p
}

func (p *probe) has(s string) bool { return strings.Contains(strings.Join(p.errors, "\n"), s) }

func TestRequireSkipsOrFails(t *testing.T) {
	never := Requirement{"the moon", func() error { return fmt.Errorf("too far") }}
	t.Setenv(envLedger, "")
	before := len(Ledger())
	t.Setenv(envRequireAll, "")
	if p := on(t, func(p *probe) { Require(p, never) }); !p.skipped || len(p.errors) > 0 {
		t.Errorf("without %s: %+v", envRequireAll, p.errors)
	}
	t.Setenv(envRequireAll, "1")
	if p := on(t, func(p *probe) { Require(p, never) }); p.skipped || !p.has("too far") {
		t.Errorf("with %s: %+v", envRequireAll, p.errors)
	}
	l := Ledger()[before:]
	if len(l) != 1 || !l[0].Skipped || !strings.Contains(l[0].Reason, "the moon: too far") {
		t.Errorf("ledger: %+v", l)
	}
	// It was no real skip: the ledger of this package must not tell of one.
	ledger.mu.Lock()
	ledger.entries = ledger.entries[:before]
	ledger.mu.Unlock()
}

func TestNoLeaksFindsWhatIsLeft(t *testing.T) {
	NoLeaks(t)
	leaks := takeSnapshot()
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	go func() { <-stop }()
	file := filepath.Join(os.TempDir(), "pageferry-left")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// The shell ends at once and leaves its child to whoever adopts orphans.
	out, err := exec.Command("sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!").Output()
	if err != nil {
		t.Fatal(err)
	}
	var orphan int
	if _, err := fmt.Sscan(string(out), &orphan); err != nil {
		t.Fatal(err)
	}
	Adopt(t, orphan)
	var found string
	Eventually(t, 5*time.Second, func() error {
		found = strings.Join(takeSnapshot().minus(leaks), "\n")
		for _, want := range []string{
			"descriptor " + fmt.Sprint(f.Fd()) + " -> /dev/null", "TestNoLeaksFindsWhatIsLeft.func",
			"temporary file " + file, fmt.Sprintf("process %d (sleep)", orphan),
		} {
			if !strings.Contains(found, want) {
				return fmt.Errorf("%q not found in:\n%s", want, found)
			}
		}
		return nil
	})
	close(stop)
	f.Close()
	_ = os.Remove(file)
}

func TestNoLeaksFindsMountsAndCgroups(t *testing.T) {
	Require(t, Root, CgroupV2)
	NoLeaks(t)
	before := takeSnapshot()
	cg := filepath.Join(CgroupRoot(t), Name())
	if err := os.Mkdir(cg, 0o755); err != nil {
		t.Fatal(err)
	}
	ns := Name()
	if out, err := exec.Command("ip", "netns", "add", ns).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	found := strings.Join(takeSnapshot().minus(before), "\n")
	if err := os.Remove(cg); err != nil {
		t.Error(err)
	}
	if out, err := exec.Command("ip", "netns", "del", ns).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	for _, want := range []string{"cgroup " + cg, "namespace /run/netns/" + ns} {
		if !strings.Contains(found, want) {
			t.Errorf("%q not found in:\n%s", want, found)
		}
	}
}

// The file of the ledger can be read again.
func TestLedgerFile(t *testing.T) {
	want := []Entry{{Test: "a.TestX/y", Reason: ""}, {Test: "a.TestZ", Skipped: true, Reason: "needs root: two\tparts"}}
	got := ParseLedger("ran\ta.TestX/y\t\nskipped\ta.TestZ\tneeds root: two\tparts\nhalf a li")
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestChild(t *testing.T) {
	NoLeaks(t)
	Child(t, time.Minute, func(t *testing.T) {
		if !InChild() {
			t.Error("not in a child")
		}
	})
}

// The tests of Child's failures run a test binary as Child would.
func TestChildBody(t *testing.T) {
	switch os.Getenv("PAGEFERRY_TEST_BODY") {
	case "fails":
		Child(t, time.Minute, func(t *testing.T) { t.Error("on purpose") })
	case "hangs":
		Child(t, 100*time.Millisecond, func(t *testing.T) { select {} })
	}
}

func TestChildFails(t *testing.T) {
	NoLeaks(t)
	for body, want := range map[string]string{"fails": "on purpose", "hangs": "the child ran longer than 100ms"} {
		cmd := exec.Command(os.Args[0], "-test.run=^TestChildBody$", "-test.v")
		cmd.Env = append(os.Environ(), "PAGEFERRY_TEST_BODY="+body)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("a body that %s: %v\n%s", body, err, out)
		}
	}
}

// The guard ends what a killed test process leaves behind.
func TestGuardBody(t *testing.T) {
	if file := os.Getenv("PAGEFERRY_TEST_GUARDED"); file != "" {
		p := Start(t, "sleep", "1000")
		if err := os.WriteFile(file, fmt.Append(nil, p.Pid()), 0o600); err != nil {
			t.Fatal(err)
		}
		select {}
	}
}

func TestGuard(t *testing.T) {
	NoLeaks(t)
	file := filepath.Join(t.TempDir(), "pid")
	cmd := exec.Command(os.Args[0], "-test.run=^TestGuardBody$")
	cmd.Env = append(os.Environ(), "PAGEFERRY_TEST_GUARDED="+file)
	p := StartCmd(t, cmd, time.Minute)
	var pid int
	Eventually(t, 20*time.Second, func() error {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		_, err = fmt.Sscan(string(b), &pid)
		return err
	})
	guarded := Adopt(t, pid)
	p.mu.Lock()
	o := p.current
	p.mu.Unlock()
	if err := o.child.Process.Kill(); err != nil { // only it, not what it started
		t.Fatal(err)
	}
	select {
	case <-guarded.Gone():
	case <-time.After(20 * time.Second):
		t.Error("the guard did not end the program of a killed test process")
	}
}

func TestStart(t *testing.T) {
	NoLeaks(t)
	p := Start(t, "sh", "-c", "echo hello; exec sleep 1000")
	p.WaitText("hello", 10*time.Second)
	if !p.Alive() {
		t.Error("not alive")
	}
	p.Kill()
	if err := p.Wait(10 * time.Second); err == nil {
		t.Error("killed, and no exit error")
	}
}

func TestRecorder(t *testing.T) {
	NoLeaks(t)
	for _, r := range []*Recorder{NewRecorder(t), NewUDPRecorder(t, "127.0.0.1:0")} {
		network, addr, _ := strings.Cut(r.Address, ":")
		if network == "unix" {
			network = "unixgram"
		}
		c, err := net.Dial(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		send := func(s string) {
			if _, err := c.Write([]byte(s)); err != nil {
				t.Fatal(err)
			}
		}
		send("beat p 1 a")
		send("beat p 2 b gap 5000")
		send("beat p 2 b gap 5000") // the network may do that
		send("beat p 4 c ok")       // and lose one
		var b Beats
		Eventually(t, 5*time.Second, func() error {
			if b = r.Beats("p"); b.Count < 3 {
				return fmt.Errorf("%+v", b)
			}
			return nil
		})
		if len(b.Forks) > 0 || b.Duplicates != 1 || b.Gap != 5000 || !b.OK || len(b.Epochs) != 1 {
			t.Errorf("%s: %+v", r.Address, b)
		}
		if network == "unixgram" && b.Epochs[0].Sender != fmt.Sprintf("pid %d", os.Getpid()) {
			t.Errorf("sender %q", b.Epochs[0].Sender)
		}
		if p := r.Problems(0); len(p) > 0 {
			t.Errorf("one owner was denied: %v", p)
		}
		send("beat p 4 d") // a second owner's
		send("beat p 3 e") // and this one's too
		send("beat q 1 f bad sum is wrong")
		Eventually(t, 5*time.Second, func() error {
			if b := r.Beats("q"); b.Count == 0 {
				return fmt.Errorf("%+v", b)
			}
			return nil
		})
		p := strings.Join(r.Problems(0), "\n")
		for _, want := range []string{"p had two owners: 2 times", "q: sum is wrong"} {
			if !strings.Contains(p, want) {
				t.Errorf("%q not found in %s", want, p)
			}
		}
	}
}

func TestServers(t *testing.T) {
	Require(t, Program("redis-server"), Program("memcached"))
	NoLeaks(t)
	for _, tcp := range []bool{false, true} {
		r := RedisWith(t, RedisConfig{TCP: tcp})
		r.Populate(1000, 100)
		d := r.Digest()
		r.Do("SET", "key:5", "else")
		if r.Digest() == d {
			t.Error("the digest does not see a changed key")
		}
	}
	for _, m := range []*MemcachedServer{Memcached(t), MemcachedTCP(t)} {
		m.Populate(200, 1000)
		m.Verify(200, 1000)
	}
}
