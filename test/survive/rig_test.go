package survive_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

// rig is two hosts with a daemon in each.
type rig struct {
	t        testing.TB // of the test that made it
	lab      *lab.Lab
	a, b     *node
	keys     string
	recorder *testutil.Recorder
	broken   bool // a test has failed on it
	cfg      lab.Config
	yaml     string // of each node's configuration
	// killed: a test ended a daemon or a pager. Where none did, no pager may end.
	killed atomic.Bool
}

// node is one host and its daemon.
type node struct {
	r      *rig
	host   *lab.Host
	points *points
	log    *logBuffer
	config string   // without what all nodes have; more lines of YAML
	limits []string // command by which the daemon is run, if it is to be run by one
	daemon atomic.Pointer[lab.Program]

	starting sync.Mutex // guards that daemon is the one that runs
	mounts   string     // of the host, when nothing had happened yet
}

// newRig makes a rig for one test and its subtests. Call begin before the first.
func newRig(t *testing.T) *rig {
	t.Helper()
	return newRigIn(t, lab.Config{}, "")
}

// newRigIn makes it in a lab that is not like the others, of nodes with more lines of YAML.
func newRigIn(t testing.TB, cfg lab.Config, config string) *rig {
	t.Helper()
	r := &rig{t: t, cfg: cfg, yaml: config, keys: filepath.Join(t.TempDir(), "keys")}
	r.recorder = testutil.NewRecorder(t)
	if err := keys.Init(r.keys); err != nil {
		t.Fatal(err)
	}
	cfg.Name = testutil.Name()
	l, err := lab.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.lab = l
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	r.a, r.b = r.newNode(l.Hosts()[0]), r.newNode(l.Hosts()[1])
	for _, n := range r.nodes() {
		if n.config = config; len(cfg.Addrs) > 0 {
			n.config += fmt.Sprintf("listen: %s:%d\n", n.addr(), appliance.DefaultPort)
		}
		n.start(t)
	}
	t.Cleanup(r.end)
	return r
}

// patience is d, or longer in a guest, whose processors are emulated.
func patience(d time.Duration) time.Duration {
	if vmtest.Inside() {
		return 8 * d
	}
	return d
}

// whole is the rig, or a new one where a test has failed on it.
func (r *rig) whole(t *testing.T) *rig {
	t.Helper()
	if !r.broken {
		return r
	}
	return newRigIn(t, r.cfg, r.yaml)
}

// begin is what every test does first.
func begin(t *testing.T) {
	t.Helper()
	pageferry(t)
	testutil.NoLeaks(t)
}

func (r *rig) nodes() []*node { return []*node{r.a, r.b} }

// other is the host across.
func (r *rig) other(n *node) *node {
	if n == r.a {
		return r.b
	}
	return r.a
}

func (r *rig) newNode(h *lab.Host) *node {
	r.t.Helper()
	n := &node{r: r, host: h, points: newPoints(r.t), log: newLogBuffer(r.t, h.Name())}
	if err := os.MkdirAll(n.path("/run/pageferry"), 0o700); err != nil {
		r.t.Fatal(err)
	}
	if err := keys.Issue(r.keys, h.Name(), n.path("/run/pageferry")); err != nil {
		r.t.Fatal(err)
	}
	ca, err := os.ReadFile(filepath.Join(r.keys, keys.AuthorityCert))
	if err == nil {
		err = os.WriteFile(n.path("/run/pageferry/"+keys.AuthorityCert), ca, 0o644)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	n.mounts = n.mountinfo()
	return n
}

// path is a path of the host as seen from here.
func (n *node) path(p string) string { return filepath.Join(n.host.Root(), p) }

// name is the host's.
func (n *node) name() string { return n.host.Name() }

// start runs a daemon and waits until it answers.
func (n *node) start(t testing.TB) {
	t.Helper()
	n.launch(t)
	if err := n.await(); err != nil {
		t.Fatal(err)
	}
}

// launch runs a daemon.
func (n *node) launch(t testing.TB) {
	t.Helper()
	cert, key := keys.HostFiles(n.name())
	text := fmt.Sprintf("name: %s\nlog_level: debug\n", n.name())
	if !strings.Contains(n.config, "limits:") {
		text += "limits: {memory_reserve: 64MiB}\n"
	}
	if !strings.Contains(n.config, "tls:") {
		text += fmt.Sprintf("tls: {ca: /run/pageferry/%s, cert: /run/pageferry/%s, key: /run/pageferry/%s}\n", keys.AuthorityCert, cert, key)
	}
	if err := os.WriteFile(n.path("/run/pageferry/config.yaml"), []byte(text+n.config), 0o600); err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(n.limits), pageferry(t), "daemon", "--config", "/run/pageferry/config.yaml")
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), appliance.EnvKillPoints+"="+n.points.path)
	cmd.Stdout, cmd.Stderr = n.log, n.log
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	// It may come to a point at which it is to be killed before Start returns.
	n.starting.Lock()
	defer n.starting.Unlock()
	p, err := n.host.Start("daemon", cmd)
	if err != nil {
		t.Fatal(err)
	}
	n.daemon.Store(p)
}

var errEnded = errors.New("the daemon has ended")

// await waits until the daemon answers.
func (n *node) await() error {
	c := n.api()
	defer c.Close()
	deadline := time.Now().Add(patience(20 * time.Second))
	for {
		_, err := c.Info(context.Background())
		if err == nil {
			return nil
		}
		select {
		case <-n.daemon.Load().Done():
			return fmt.Errorf("host %s: %w: %v\n%s", n.name(), errEnded, n.daemon.Load().Wait(), n.log.tail(4000))
		case <-time.After(2 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("host %s: the daemon does not answer: %w\n%s", n.name(), err, n.log.tail(4000))
		}
	}
}

// kill ends the daemon as kill -9 does.
func (n *node) kill() {
	n.r.killed.Store(true)
	n.starting.Lock()
	p := n.daemon.Load()
	n.starting.Unlock()
	_ = p.Signal(unix.SIGKILL)
	<-p.Done()
}

// stop ends it in good order.
func (n *node) stop(t testing.TB) {
	t.Helper()
	p := n.daemon.Load()
	_ = p.Signal(unix.SIGTERM)
	select {
	case <-p.Done():
	case <-time.After(patience(20 * time.Second)):
		t.Errorf("the daemon of host %s does not end on SIGTERM\n%s", n.name(), n.log.tail(4000))
		n.kill()
		return
	}
	if err := p.Wait(); err != nil {
		t.Errorf("the daemon of host %s ended with: %v\n%s", n.name(), err, n.log.tail(4000))
	}
}

// restart ends the daemon in good order and starts another.
func (n *node) restart(t testing.TB) {
	t.Helper()
	n.stop(t)
	n.start(t)
}

// killed reports whether the daemon has ended.
func (n *node) killed() bool {
	select {
	case <-n.daemon.Load().Done():
		return true
	default:
		return false
	}
}

// end is the last thing that happens to a rig before its hosts go.
func (r *rig) end() {
	for _, n := range r.nodes() {
		n.points.do(nil)
		if !r.broken {
			n.stop(r.t)
		}
	}
}

func (n *node) api() *appliance.Client {
	return appliance.NewClient(n.path(appliance.DefaultSocket))
}

// addr is where its peers reach it.
func (n *node) addr() string { return n.host.Addr().String() }

// list is every migration that the daemon knows.
func (n *node) list() ([]appliance.Report, error) {
	c := n.api()
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience(10*time.Second))
	defer cancel()
	return c.List(ctx)
}

// logBuffer is what a daemon has said. Safe for concurrent use.
type logBuffer struct {
	mu   sync.Mutex
	b    bytes.Buffer
	file io.Writer // a copy
}

// newLogBuffer writes a copy into the directory PAGEFERRY_LOGS, if that is set: a test that
// hangs shows nothing else.
func newLogBuffer(t testing.TB, name string) *logBuffer {
	l := &logBuffer{file: io.Discard}
	if dir := os.Getenv("PAGEFERRY_LOGS"); dir != "" {
		f, err := os.Create(filepath.Join(dir, name+".log"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		l.file = f
	}
	return l
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, _ = l.file.Write(p)
	return l.b.Write(p)
}

func (l *logBuffer) len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Len()
}

func (l *logBuffer) since(at int) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b.Bytes()[at:])
}

func (l *logBuffer) tail(n int) string { return l.since(max(0, l.len()-n)) }

// watch prints, if a test fails, what the daemons said during it and what their
// goroutines are at, and gives the rig up.
func (r *rig) watch(t *testing.T) {
	at := map[*node]int{r.a: r.a.log.len(), r.b: r.b.log.len()}
	r.killed.Store(false)
	t.Cleanup(func() {
		for _, n := range r.nodes() {
			s := n.log.since(at[n])
			if i := strings.Index(s, "pager has died"); i >= 0 && !r.killed.Load() {
				t.Errorf("a pager of host %s ended by itself: %s", n.name(), s[i:min(len(s), i+6000)])
			}
		}
		if !t.Failed() {
			return
		}
		r.broken = true
		for _, n := range r.nodes() {
			s := n.log.since(at[n])
			if len(s) > 12000 {
				s = "[...]" + s[len(s)-12000:]
			}
			t.Logf("daemon of host %s:\n%s", n.name(), s)
			if n.killed() {
				continue
			}
			now := n.log.len()
			_ = n.daemon.Load().Signal(unix.SIGQUIT)
			select {
			case <-n.daemon.Load().Done():
			case <-time.After(10 * time.Second):
				n.kill()
			}
			t.Logf("its goroutines:\n%s", n.log.since(now))
		}
	})
}
