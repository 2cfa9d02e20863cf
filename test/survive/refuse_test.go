package survive_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/internal/testutil"
)

// migrateCommand runs "pageferry migrate" in the host, as a person does, and
// returns its exit status and what it said.
func (n *node) migrateCommand(t testing.TB, args ...string) (status int, said string) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(pageferry(t), append([]string{"migrate"}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	p, err := n.host.Start("run", cmd)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(40 * time.Second):
		_ = p.Signal(unix.SIGKILL)
		t.Fatalf("pageferry migrate %v does not end", args)
	}
	err = p.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatal(err)
	}
	if ee != nil {
		status = ee.ExitCode()
	}
	return status, out.String()
}

// refused fails the test unless the migration is refused with status and words.
func (n *node) refused(t testing.TB, status int, words string, args ...string) {
	t.Helper()
	got, said := n.migrateCommand(t, args...)
	if got != status || !strings.Contains(said, words) {
		t.Errorf("pageferry migrate %s: status %d, %q; wanted status %d and %q", strings.Join(args, " "), got, said, status, words)
	}
}

// What cannot be moved is refused with status 3 and the reason, and is not
// touched.
func TestRefused(t *testing.T) {
	begin(t)
	r := newRig(t)
	top := t
	run := func(name string, f func(t *testing.T, r *rig)) {
		top.Run(name, func(t *testing.T) {
			r = r.whole(top)
			r.watch(t)
			f(t, r)
		})
	}
	// untouched runs f with a program that must not notice.
	untouched := func(name string, f func(t *testing.T, r *rig, g *guest, pid string)) {
		run(name, func(t *testing.T, r *rig) {
			g := r.small(t, r.a)
			f(t, r, g, strconv.Itoa(g.pid))
			g.beat(3)
			g.oneOwner(0)
			r.clean(t, g)
			if g.at != r.a {
				t.Error("it has moved")
			}
			g.verify()
			r.clean(t)
		})
	}
	run("no such process", func(t *testing.T, r *rig) {
		r.a.refused(t, 3, "no such process", "31999", "--to", r.b.addr())
	})
	run("the daemon itself", func(t *testing.T, r *rig) {
		pid, err := r.a.host.PID(r.a.daemon.Load().PID())
		if err != nil {
			t.Fatal(err)
		}
		r.a.refused(t, 3, "the daemon itself", strconv.Itoa(pid), "--to", r.b.addr())
	})
	run("the init of its namespace", func(t *testing.T, r *rig) {
		r.a.refused(t, 3, "refused", "1", "--to", r.b.addr())
	})
	untouched("already traced", func(t *testing.T, r *rig, g *guest, pid string) {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), envTracer+"="+pid)
		said := newLogBuffer(t, "refused")
		cmd.Stdout = said
		tracer, err := r.a.host.Start("run", cmd)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			_ = tracer.Signal(unix.SIGKILL)
			<-tracer.Done()
		}()
		testutil.Eventually(t, 10*time.Second, func() error {
			if s := said.since(0); s != "attached\n" {
				return fmt.Errorf("the debugger says %q", s)
			}
			return nil
		})
		r.a.refused(t, 3, "traced", pid, "--to", r.b.addr())
	})
	run("children", func(t *testing.T, r *rig) {
		sh := exec.Command("/bin/sh", "-c", "sleep 1000; :")
		g := r.launch(t, r.a, sh)
		testutil.Eventually(t, 10*time.Second, func() error {
			if kids, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", g.outer(), g.outer())); len(kids) == 0 {
				return errors.New("the shell has no child yet")
			}
			return nil
		})
		r.a.refused(t, 3, "child", strconv.Itoa(g.pid), "--to", r.b.addr())
		for _, p := range r.a.processes() {
			if p.cgroup == "guest" {
				_ = unix.Kill(p.pid, unix.SIGKILL)
			}
		}
		r.clean(t)
	})
	untouched("already migrating", func(t *testing.T, r *rig, g *guest, pid string) {
		reached := make(chan struct{})
		r.a.points.do(func(point string) {
			if point == "source/recv/accept" {
				r.a.refused(t, 3, "already migrating", pid, "--to", r.b.addr())
				g.cancelAll()
				close(reached)
			}
		})
		rep, err := g.migrate(g.request("stop"))
		r.a.points.do(nil)
		select {
		case <-reached:
		default:
			t.Error("the first migration did not come as far")
		}
		if err != nil || rep.Outcome != appliance.OutcomeCanceled {
			t.Errorf("the first migration: %v %s: %s", err, rep.Outcome, rep.Reason)
		}
	})
	untouched("dead destination", func(t *testing.T, r *rig, g *guest, pid string) {
		r.b.kill()
		r.a.refused(t, 1, "connection refused", pid, "--to", r.b.addr())
		r.b.start(t)
	})
	untouched("nobody at that address", func(t *testing.T, r *rig, g *guest, pid string) {
		r.a.refused(t, 1, "connect to", pid, "--to", "127.0.0.1:9")
	})
	untouched("destination without memory", func(t *testing.T, r *rig, g *guest, pid string) {
		r.b.config = "limits: {memory_reserve: 4TiB}\n"
		r.b.restart(t)
		r.a.refused(t, 3, "of memory", pid, "--to", r.b.addr())
		r.b.config = ""
		r.b.restart(t)
	})
	untouched("a peer that is not wanted", func(t *testing.T, r *rig, g *guest, pid string) {
		r.b.config = "limits: {memory_reserve: 64MiB, peers: [somebody]}\n"
		r.b.restart(t)
		r.a.refused(t, 3, "peers", pid, "--to", r.b.addr())
		r.b.config = ""
		r.b.restart(t)
	})
	untouched("a certificate of another authority", func(t *testing.T, r *rig, g *guest, pid string) {
		other := filepath.Join(t.TempDir(), "keys")
		if err := keys.Init(other); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(r.a.path("/run/other"), 0o700); err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(r.a.path("/run/other"))
		if err := keys.Issue(other, "a", r.a.path("/run/other")); err != nil {
			t.Fatal(err)
		}
		cert, key := keys.HostFiles("a")
		ca, err := os.ReadFile(filepath.Join(other, keys.AuthorityCert))
		if err == nil {
			err = os.WriteFile(r.a.path("/run/other/ca.pem"), ca, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		r.a.config = fmt.Sprintf("tls: {ca: /run/other/ca.pem, cert: /run/other/%s, key: /run/other/%s}\n", cert, key)
		r.a.restart(t)
		r.a.refused(t, 1, "certificate", pid, "--to", r.b.addr())
		r.a.config = ""
		r.a.restart(t)
	})
	untouched("no certificate", func(t *testing.T, r *rig, g *guest, pid string) {
		r.a.config = "insecure: true # no tls:\n"
		r.a.restart(t)
		r.a.refused(t, 1, "", pid, "--to", r.b.addr())
		r.a.config = ""
		r.a.restart(t)
	})
}

// A journal on a full disk: refused at the source, and by the destination.
func TestFullDisk(t *testing.T) {
	begin(t)
	r := newRig(t)
	for _, n := range r.nodes() {
		t.Run("host "+n.name(), func(t *testing.T) {
			r.watch(t)
			g := r.small(t, r.a)
			free := n.fill(t)
			status, said := r.a.migrateCommand(t, strconv.Itoa(g.pid), "--to", r.b.addr())
			if status != 3 || !strings.Contains(said, "no space left") {
				t.Errorf("status %d, %q", status, said)
			}
			free()
			g.beat(3)
			r.clean(t, g)
			if g.at != r.a {
				t.Fatal("it has moved")
			}
			g.hop("postcopy") // as soon as there is space it goes
			g.verify()
			r.clean(t)
		})
	}
}

// fill makes the host's state directory a tiny file system that is full; the
// daemon is restarted on it. free makes room.
func (n *node) fill(t *testing.T) (free func()) {
	t.Helper()
	n.stop(t)
	run := func(script string) {
		t.Helper()
		if out, err := n.host.Run(t.Context(), "sh", "-c", script); err != nil {
			t.Fatalf("%s: %v %s", script, err, out)
		}
	}
	run("mkdir -p /var/lib/pageferry && mount -t tmpfs -o size=64k tmpfs /var/lib/pageferry && mkdir -p /var/lib/pageferry/journal")
	n.start(t)
	run("dd if=/dev/zero of=/var/lib/pageferry/filler bs=4k 2>/dev/null || true")
	return func() {
		t.Helper()
		n.stop(t)
		run("umount /var/lib/pageferry")
		n.start(t)
	}
}

// Two migrations into one host at once both work, in both directions.
func TestTwoAtOnce(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	gs := []*guest{r.small(t, r.a), r.small(t, r.a), r.small(t, r.b)}
	for range 3 {
		type end struct {
			rep appliance.Report
			err error
		}
		ends := make([]chan end, len(gs))
		for i, g := range gs {
			ends[i] = make(chan end, 1)
			go func() {
				rep, err := g.migrate(g.request("postcopy"))
				ends[i] <- end{rep, err}
			}()
		}
		for i, g := range gs {
			e := <-ends[i]
			if e.err != nil || e.rep.Outcome != appliance.OutcomeDone {
				t.Fatalf("%s: %v %s: %s", g.identity, e.err, e.rep.Outcome, e.rep.Reason)
			}
			g.at, g.pid = r.other(g.at), e.rep.DestPID
		}
		for _, g := range gs {
			g.beat(3)
		}
		r.clean(t, gs...)
	}
	for _, g := range gs {
		g.oneOwner(3)
		g.verify()
	}
	r.clean(t)
}
