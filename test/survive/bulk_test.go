package survive_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/bulk"
	"github.com/pageferry/pageferry/appliance/keys"
	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/internal/testutil"
)

// fleet is a rig with an operator, who has a certificate and a place for runs.
type fleet struct {
	*rig
	t   *testing.T
	dir string // of the operator, as host a sees it
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	begin(t)
	f := &fleet{rig: newRigIn(t, lab.Config{}, "api_listen: :7301\noperators: [operator]\n"), t: t, dir: "/run/pageferry/operator"}
	f.watch(t)
	out := f.a.path(f.dir)
	if err := os.MkdirAll(out, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"operator", "stranger"} {
		if err := keys.Issue(f.keys, name, out); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// file writes a configuration in which who asks, and returns its path on host a.
func (f *fleet) file(who, rest string) string {
	f.t.Helper()
	cert, key := keys.HostFiles(who)
	text := fmt.Sprintf("name: run\ntls: {ca: /run/pageferry/%s, cert: %s/%s, key: %s/%s}\nhosts:\n  %s: {address: %s}\n  %s: {address: %s}\n%s",
		keys.AuthorityCert, f.dir, cert, f.dir, key, f.a.name(), f.a.addr(), f.b.name(), f.b.addr(), rest)
	if err := os.WriteFile(f.a.path(f.dir+"/bulk.yaml"), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
	return f.dir + "/bulk.yaml"
}

// operator is a pageferry bulk of the operator, on host a.
type operator struct {
	*lab.Program
	out, err bytes.Buffer
}

func (f *fleet) start(what, file string) *operator {
	f.t.Helper()
	o := new(operator)
	cmd := exec.Command(pageferry(f.t), "bulk", what, "--state", f.dir+"/runs", "--json", file)
	cmd.Stdout, cmd.Stderr = &o.out, &o.err
	p, err := f.a.host.Start("run", cmd)
	if err != nil {
		f.t.Fatal(err)
	}
	o.Program = p
	return o
}

// items waits for the end, and returns the exit status and what became of each.
func (o *operator) items(t *testing.T) (status int, items map[int]bulk.Item) {
	t.Helper()
	select {
	case <-o.Done():
	case <-time.After(2 * time.Minute):
		_ = o.Signal(unix.SIGKILL)
		t.Fatalf("bulk does not end: %s", o.err.String())
	}
	var ee *exec.ExitError
	if err := o.Wait(); errors.As(err, &ee) {
		status = ee.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	var got struct{ Items []bulk.Item }
	lines := strings.Split(strings.TrimSpace(o.out.String()), "\n")
	if last := lines[len(lines)-1]; last != "" {
		if err := json.Unmarshal([]byte(last), &got); err != nil {
			t.Fatalf("%v: %s", err, last)
		}
	}
	items = map[int]bulk.Item{}
	for _, i := range got.Items {
		items[i.PID] = i
	}
	return status, items
}

// arrived goes on with guests that a run has moved.
func (f *fleet) arrived(items map[int]bulk.Item, gs ...*guest) {
	f.t.Helper()
	for _, g := range gs {
		i, ok := items[g.pid]
		if !ok || i.State != bulk.Done {
			f.t.Fatalf("%s, process %d: %+v", g.identity, g.pid, i)
		}
		g.at, g.pid = f.other(g.at), i.DestPID
		g.beat(2)
	}
}

// A run moves what its groups select, goes on after its kill, and does nothing where all
// is done.
func TestBulk(t *testing.T) {
	f := newFleet(t)
	var gs []*guest
	for range 4 {
		gs = append(gs, f.small(t, f.a))
	}
	stays := f.small(t, f.b)
	file := f.file("operator", fmt.Sprintf("limits: {at_once: 2}\ngroups:\n  - {name: all, select: [{command: everything}], to: [%s], max_bandwidth: 20MiB}\n", f.b.name()))

	o := f.start("plan", file)
	if status, _ := o.items(t); status != 0 || strings.Count(o.out.String(), `"state":"waiting"`) != len(gs) || !strings.Contains(o.out.String(), `"total_ms"`) {
		t.Errorf("plan: status %d, %s %s", status, o.out.String(), o.err.String())
	}
	// It is killed when the first has begun.
	o = f.start("run", file)
	testutil.Eventually(t, 30*time.Second, func() error {
		rs, err := f.a.list()
		if err != nil || len(rs) == 0 {
			return fmt.Errorf("nothing moves: %w", err)
		}
		return nil
	})
	if err := o.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-o.Done()
	o = f.start("run", file)
	testutil.Eventually(t, 10*time.Second, func() error { return f.locked("run") })
	again := f.start("run", file)
	if status, _ := again.items(t); status != 3 || !strings.Contains(again.err.String(), "another coordinator") {
		t.Errorf("a second coordinator beside the first: status %d, %s", status, again.err.String())
	}
	status, items := o.items(t)
	if status != 0 || len(items) != len(gs) {
		t.Fatalf("status %d, %d items: %s", status, len(items), o.err.String())
	}
	f.arrived(items, gs...)
	rs, err := f.b.list()
	if err != nil || len(rs) != len(gs) {
		t.Errorf("%d migrations have come to host b, of %d processes: %v", len(rs), len(gs), err)
	}
	o = f.start("run", file)
	if status, _ := o.items(t); status != 0 || strings.Contains(o.err.String(), "moves to") {
		t.Errorf("run when all is done: status %d, %s", status, o.err.String())
	}
	for _, g := range append(gs, stays) {
		g.verify()
	}
	f.noRuns()
	f.clean(t)
}

// locked reports whether a coordinator has a run.
func (f *fleet) locked(run string) error {
	db, err := os.Open(f.a.path(f.dir + "/runs/" + run + ".db"))
	if err != nil {
		return err
	}
	defer db.Close()
	if err := unix.Flock(int(db.Fd()), unix.LOCK_SH|unix.LOCK_NB); !errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("nobody has run %s: %v", run, err)
	}
	return nil
}

// A host is evacuated while the other's daemon is killed, a process exits and one does not
// converge: the table says which is where, and running it again finishes.
func TestBulkEvacuation(t *testing.T) {
	f := newFleet(t)
	var gs []*guest
	for range 3 {
		gs = append(gs, f.small(t, f.a))
	}
	wild := f.selfChecking(t, f.a, testutil.GoProgram(t, "./test/programs/workload"), "--size", "64MiB", "--rate", "400MiB/s", "--pattern", "uniform")
	ends := f.launch(t, f.a, exec.Command("sleep", "1000"))
	groups := func(mode string) string {
		return fmt.Sprintf(`evacuate: [%s]
groups:
  - {name: calm, select: [{command: everything}], max_bandwidth: 20MiB}
  - {name: wild, select: [{command: workload}], after: [calm], max_bandwidth: 20MiB, %s}
  - {name: short, select: [{command: sleep}], after: [wild], optional: true}
`, f.a.name(), mode)
	}
	o := f.start("run", f.file("operator", groups("mode: precopy, max_downtime: 1ms, retries: 0")))
	testutil.Eventually(t, 30*time.Second, func() error {
		rs, err := f.a.list()
		if err != nil || len(rs) == 0 {
			return fmt.Errorf("nothing moves: %w", err)
		}
		return nil
	})
	f.b.kill()
	ends.end()
	f.b.start(t)
	status, items := o.items(t)
	if status != 1 || items[wild.pid].State != bulk.Failed || !strings.Contains(items[wild.pid].Reason, "converge") {
		t.Errorf("status %d, what does not converge: %+v", status, items[wild.pid])
	}
	if i := items[ends.pid]; i.State != bulk.Gone {
		t.Errorf("what has ended: %+v", i)
	}
	f.arrived(items, gs...)
	wild.beat(2)
	o = f.start("run", f.file("operator", groups("mode: hybrid")))
	status, items = o.items(t)
	if status != 0 {
		t.Errorf("again: status %d, %s", status, o.err.String())
	}
	f.arrived(items, wild)
	for _, g := range append(gs, wild) {
		g.verify()
	}
	f.noRuns()
	f.clean(t)
}

// What has moved is brought back where the file says so and another cannot be moved; a
// budget is shared out, and a pidfile is read where it lies.
func TestBulkReturn(t *testing.T) {
	f := newFleet(t)
	g := f.small(t, f.a)
	wild := f.selfChecking(t, f.a, testutil.GoProgram(t, "./test/programs/workload"), "--size", "64MiB", "--rate", "400MiB/s", "--pattern", "uniform")
	if err := os.WriteFile(f.a.path("/run/pageferry/operator/wild.pid"), fmt.Appendln(nil, wild.pid), 0o600); err != nil {
		t.Fatal(err)
	}
	o := f.start("run", f.file("operator", fmt.Sprintf(`budget: 400Mbit
limits: {at_once: 2}
on_failure: return
retries: 0
groups:
  - {name: calm, select: [{host: %[1]s, command: everything}], to: [%[2]s]}
  - {name: wild, select: [{host: %[1]s, pidfile: %[3]s/wild.pid}], to: [%[2]s], after: [calm], mode: precopy, max_downtime: 1ms}
`, f.a.name(), f.b.name(), f.dir)))
	status, items := o.items(t)
	if status != 1 || items[g.pid].State != bulk.Returned || items[wild.pid].State != bulk.Failed {
		t.Fatalf("status %d, %+v, %s", status, items, o.err.String())
	}
	rs, err := f.a.list()
	if err != nil || len(rs) != 3 {
		t.Fatalf("%d migrations at host a: %v", len(rs), err)
	}
	for _, r := range rs {
		if r.SourcePID == wild.pid && r.MaxBandwidth != 25_000_000 {
			t.Errorf("its part of the budget was %d bytes per second", r.MaxBandwidth)
		}
		if r.Role == appliance.RoleDestination {
			g.pid = r.DestPID
		}
	}
	for _, g := range []*guest{g, wild} {
		g.beat(2)
		g.verify()
	}
	f.noRuns()
	f.clean(t)
}

// The same request is carried out once, and one for another process of that number not at
// all.
func TestRequestedTwice(t *testing.T) {
	f := newFleet(t)
	g := f.small(t, f.a)
	c := f.a.api()
	defer c.Close()
	req := g.request("postcopy")
	req.ID, req.Started = strings.Repeat("5a", 16), 1
	if _, err := c.Migrate(t.Context(), req); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a process that began at another time: %v", err)
	}
	req.Started = 0
	for range 2 {
		if rep, err := c.Migrate(t.Context(), req); err != nil || rep.ID != req.ID {
			t.Fatalf("%s: %v", rep.ID, err)
		}
		if rep, err := c.Watch(t.Context(), req.ID, nil); err != nil || rep.Outcome != appliance.OutcomeDone {
			t.Fatalf("%s %s: %v", rep.Outcome, rep.Reason, err)
		} else if g.at == f.a {
			g.at, g.pid = f.b, rep.DestPID
		}
	}
	if rs, err := f.a.list(); err != nil || len(rs) != 1 {
		t.Errorf("%d migrations: %v", len(rs), err)
	}
	g.beat(2)
	g.verify()
	f.noRuns()
	f.clean(t)
}

// noRuns removes what the operator has on host a.
func (f *fleet) noRuns() {
	f.t.Helper()
	if err := os.RemoveAll(f.a.path(f.dir)); err != nil {
		f.t.Error(err)
	}
}

// Who is no operator gets nothing, and is named in the log.
func TestBulkStranger(t *testing.T) {
	f := newFleet(t)
	g := f.small(t, f.a)
	o := f.start("run", f.file("stranger", "groups: [{name: all, select: [{command: everything}], to: ["+f.b.name()+"]}]\n"))
	if status, _ := o.items(t); status == 0 || !strings.Contains(o.err.String(), "operators") {
		t.Errorf("status %d: %s", status, o.err.String())
	}
	if log := f.a.log.tail(1 << 20); !strings.Contains(log, "operator=stranger") || !strings.Contains(log, "allowed=false") {
		t.Error("the log of host a does not tell")
	}
	if rs, err := f.a.list(); err != nil || len(rs) > 0 {
		t.Errorf("%d migrations: %v", len(rs), err)
	}
	g.verify()
	f.noRuns()
	f.clean(t)
}
