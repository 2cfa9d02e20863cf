package appliance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
)

func TestMain(m *testing.M) { testutil.Main(m) }

// testLogger writes to the test's log, which shows it where the test fails.
func testLogger(t *testing.T) *slog.Logger {
	return slog.New(slog.NewTextHandler(logWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type logWriter struct{ t *testing.T }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Log(string(bytes.TrimSpace(p)))
	return len(p), nil
}

func hostConfig(t *testing.T, name string) Config {
	t.Helper()
	dir := t.TempDir()
	return Config{Name: name, Insecure: true, Listen: testutil.FreePort(t),
		StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
		Socket: testutil.Socket(t, name), Limits: Limits{MemoryReserve: 1 << 20}}
}

func twoDaemons(t *testing.T) (a, b *fakeHostDaemon) {
	t.Helper()
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	return startDaemon(t, hostConfig(t, "a"), newFakeEngine()), startDaemon(t, hostConfig(t, "b"), newFakeEngine())
}

func finish(t *testing.T, h *fakeHostDaemon, id string) Report {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, err := h.client.Watch(ctx, id, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestMigrateBetweenDaemons(t *testing.T) {
	a, b := twoDaemons(t)
	for _, mode := range []string{"postcopy", "stop"} {
		r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen, Mode: mode})
		if err != nil {
			t.Fatal(err)
		}
		got := finish(t, a, r.ID)
		if got.Outcome != OutcomeDone || got.DestPID != 4711 || got.Mode != mode || got.PagesTotal != 1000 || got.Comm != "fake" {
			t.Fatalf("%s: %+v", mode, got)
		}
		if got.DowntimeMS <= 0 || got.TotalMS < got.DowntimeMS || got.Faults.P50us != 40 || got.BytesWire == 0 {
			t.Errorf("%s: not measured: %+v", mode, got)
		}
		testutil.Eventually(t, 10*time.Second, func() error {
			_, there, err := b.registry.find(r.ID)
			if err != nil {
				return err
			}
			if there.Role != RoleDestination || there.Outcome != OutcomeDone || there.Mode != mode || there.SourcePID != 4242 {
				return fmt.Errorf("at the destination: %+v", there)
			}
			return nil
		})
	}
	if h := a.engine.history(); !strings.Contains(h, "isolate freeze hold before-commit at-switch") || !strings.Contains(h, "source-exit kill") {
		t.Errorf("the source did %s", h)
	}
	if h := b.engine.history(); !strings.Contains(h, "rebuild release") || !strings.Contains(h, "rebuild-all release") {
		t.Errorf("the destination did %s", h)
	}
	// Reports survive the daemon.
	a.stop()
	again := startDaemon(t, a.Config(), newFakeEngine())
	rs, err := again.client.List(t.Context())
	if err != nil || len(rs) != 2 || rs[0].Outcome != OutcomeDone {
		t.Errorf("after a restart: %+v, %v", rs, err)
	}
}

func TestRefusals(t *testing.T) {
	a, b := twoDaemons(t)
	var api *APIError
	// By the engine, before the destination is asked.
	_, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 50, To: b.Config().Listen})
	if !errors.As(err, &api) || api.Kind != KindRefused || !strings.Contains(err.Error(), "packet socket") {
		t.Errorf("a process that cannot be carried: %v", err)
	}
	// The daemon itself.
	_, err = a.client.Migrate(t.Context(), MigrateRequest{PID: os.Getpid(), To: b.Config().Listen})
	if !errors.As(err, &api) || api.Kind != KindRefused {
		t.Errorf("the daemon itself: %v", err)
	}
	// By what there is on the way to the destination.
	_, err = a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen, Transport: TransportRDMA})
	if !errors.As(err, &api) || api.Kind != KindRefused || !strings.Contains(err.Error(), "an address of this host") {
		t.Errorf("by RDMA to this host itself: %v", err)
	}
	// By the destination.
	_ = a.engine.step(t.Context(), "offer-too-much")
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	got := finish(t, a, r.ID)
	if got.Outcome != OutcomeRefused || !strings.Contains(got.Reason, "of memory") {
		t.Errorf("too much memory: %+v", got)
	}
	if a.engine.did("isolate") {
		t.Error("touched before it was refused")
	}
	for _, req := range []MigrateRequest{
		{PID: 0, To: "x"}, {PID: 1000}, {PID: 1000, To: "host:0"}, {PID: 1000, To: "h", Mode: "precpy"},
		{PID: 1000, To: "h", Mode: "stop", MaxDowntimeMS: 10}, {PID: 1000, To: "h", Mode: "hybrid", MaxDowntimeMS: -1},
		{PID: 1000, To: "h", Mode: "hybrid", Throttle: 0.5}, {PID: 1000, To: "h", Mode: "precopy", Throttle: 1},
		{PID: 1000, To: "h", Trap: "fused"}, {PID: 1000, To: "h", Transport: "rmda"}, {PID: 1000, To: "h", TCP: "keep"},
		{PID: 1000, To: "h", PIDNS: "x"}, {PID: 1000, To: "h", OnSourceExit: "x"},
	} {
		if _, err := a.client.Migrate(t.Context(), req); !errors.As(err, &api) || api.Kind != KindUsage {
			t.Errorf("%+v: %v", req, err)
		}
	}
	if rs := a.registry.list(); len(rs) != 1 {
		t.Errorf("%d reports, want that of the one that began", len(rs))
	}
}

func TestCancel(t *testing.T) {
	a, b := twoDaemons(t)
	release := b.engine.hold("rebuild")
	defer release()
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if !b.engine.did("rebuild") {
			return errors.New("not rebuilding yet")
		}
		return nil
	})
	// The same process again, while it is on its way.
	var api *APIError
	if _, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen}); !errors.As(err, &api) || api.Kind != KindRefused {
		t.Errorf("a second migration of the process: %v", err)
	}
	if _, err := b.client.Cancel(t.Context(), r.ID); err == nil {
		t.Error("canceled at the destination")
	}
	if _, err := a.client.Cancel(t.Context(), r.ID[:8]); err != nil {
		t.Fatal(err)
	}
	got := finish(t, a, r.ID)
	if got.Outcome != OutcomeCanceled || !strings.Contains(got.Reason, "4242 runs on") {
		t.Errorf("%+v", got)
	}
	if !a.engine.did("thaw") || a.engine.did("kill") {
		t.Errorf("the source did %s", a.engine.history())
	}
	if _, err := a.client.Cancel(t.Context(), r.ID); err == nil || !strings.Contains(err.Error(), "over") {
		t.Errorf("canceling what is over: %v", err)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if !b.engine.did("abort") {
			return errors.New("the destination has not aborted")
		}
		return nil
	})
}

// TestLastWordBeforeTheCommit: what the process says then keeps it here.
func TestLastWordBeforeTheCommit(t *testing.T) {
	a, b := twoDaemons(t)
	a.engine.fail("before-commit", errors.New("SIGHUP came"))
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	if got := finish(t, a, r.ID); got.Outcome != OutcomeFailed || !strings.Contains(got.Reason, "SIGHUP came") {
		t.Errorf("%+v", got)
	}
	if !a.engine.did("hold") || !a.engine.did("thaw") || a.engine.did("at-switch") || a.engine.did("kill") {
		t.Errorf("the source did %s", a.engine.history())
	}
}

func TestCancelTooLate(t *testing.T) {
	a, b := twoDaemons(t)
	release := b.engine.hold("resident")
	defer release()
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if !b.engine.did("resident") {
			return errors.New("does not run yet")
		}
		return nil
	})
	testutil.Eventually(t, 10*time.Second, func() error {
		if now, _ := a.client.Show(t.Context(), r.ID); now.State != migrate.SourceServing.String() {
			return fmt.Errorf("the source is %s", now.State)
		}
		return nil
	})
	if _, err := a.client.Cancel(t.Context(), r.ID); err == nil || !strings.Contains(err.Error(), "committed") {
		t.Errorf("canceled after the switch: %v", err)
	}
	release()
	if got := finish(t, a, r.ID); got.Outcome != OutcomeDone {
		t.Errorf("%+v", got)
	}
}

func TestTwoIntoOneHost(t *testing.T) {
	a, b := twoDaemons(t)
	release := b.engine.hold("resident")
	defer release()
	var ids []string
	for pid := range 3 {
		r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 1000 + pid, To: b.Config().Listen})
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, r.ID)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if n := b.links.(*handover).gate.claims.count(); n != 3 {
			return fmt.Errorf("%d arriving", n)
		}
		return nil
	})
	release()
	for _, id := range ids {
		if got := finish(t, a, id); got.Outcome != OutcomeDone {
			t.Errorf("%+v", got)
		}
	}
}

func TestLimitOfIncoming(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	a := startDaemon(t, hostConfig(t, "a"), newFakeEngine())
	c := hostConfig(t, "b")
	c.Limits.Incoming = 1
	b := startDaemon(t, c, newFakeEngine())
	release := b.engine.hold("resident")
	defer release()
	first, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 1000, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if !b.engine.did("resident") {
			return errors.New("the first does not run yet")
		}
		return nil
	})
	second, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 1001, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	if got := finish(t, a, second.ID); got.Outcome != OutcomeRefused || !strings.Contains(got.Reason, "limits.incoming") {
		t.Errorf("the second: %+v", got)
	}
	release()
	if got := finish(t, a, first.ID); got.Outcome != OutcomeDone {
		t.Errorf("the first: %+v", got)
	}
}

func TestDryRunLeavesNothing(t *testing.T) {
	a, b := twoDaemons(t)
	rep, err := a.client.DryRun(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil || len(rep.Reasons) != 0 || rep.Destination != "b" || !rep.Inspection.Movable {
		t.Fatalf("%+v, %v", rep, err)
	}
	if o := rep.Outlook; o == nil || o.Measured == nil || o.Link != nil || len(o.Predictions) != 0 || !strings.Contains(o.Unmeasured, "too little") {
		t.Errorf("a process without memory: %+v", o)
	}
	a.engine.memory = page.Range{Start: 1 << 30, End: 1<<30 + fakeMemory}
	rep, err = a.client.DryRun(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil || rep.Outlook == nil {
		t.Fatalf("%+v, %v", rep, err)
	}
	if o := rep.Outlook; o.Unmeasured != "" || o.Link == nil || !(o.Link.BytesPerSecond > 0) || !strings.Contains(o.Link.From, "MiB of its pages") ||
		len(o.Predictions) != 4 || o.Auto != migrate.ModeHybrid || o.Measured.BytesMemory != fakeMemory {
		t.Errorf("%+v", o)
	}
	_ = a.engine.step(t.Context(), "offer-too-much")
	rep, err = a.client.DryRun(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil || len(rep.Reasons) != 1 || rep.Outlook != nil {
		t.Fatalf("%+v, %v", rep, err)
	}
	if a.engine.did("isolate") || a.engine.did("freeze") {
		t.Errorf("touched: %s", a.engine.history())
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if rs := b.registry.list(); len(rs) != 0 {
			return fmt.Errorf("the destination keeps %+v", rs)
		}
		return nil
	})
}

// TestDaemonsComeBack stops both daemons after the switch; their successors
// bring the migration to its end.
func TestDaemonsComeBack(t *testing.T) {
	a, b := twoDaemons(t)
	release := b.engine.hold("resident")
	defer release()
	r, err := a.client.Migrate(t.Context(), MigrateRequest{PID: 4242, To: b.Config().Listen})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		if now, _ := a.client.Show(t.Context(), r.ID); now.State != migrate.SourceServing.String() {
			return fmt.Errorf("the source is %s", now.State)
		}
		return nil
	})
	a.stop()
	b.stop()
	if a.engine.did("kill") || a.engine.did("thaw") {
		t.Fatalf("the source's daemon did %s", a.engine.history())
	}
	a2, b2 := startDaemon(t, a.Config(), newFakeEngine()), startDaemon(t, b.Config(), newFakeEngine())
	got := finish(t, a2, r.ID)
	if got.Outcome != OutcomeDone {
		t.Errorf("%+v", got)
	}
	if !a2.engine.did("adopt-4242") || !a2.engine.did("kill") {
		t.Errorf("the new source's daemon did %s", a2.engine.history())
	}
	testutil.Eventually(t, 10*time.Second, func() error {
		_, there, err := b2.registry.find(r.ID)
		if err != nil || there.Outcome != OutcomeDone {
			return fmt.Errorf("at the destination: %+v, %v", there, err)
		}
		return nil
	})
}

func TestAPISocketIsPrivate(t *testing.T) {
	a, _ := twoDaemons(t)
	fi, err := os.Stat(a.Config().Socket)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	// A request whose sender is not known is not served.
	w := httptest.NewRecorder()
	authorised((&api{d: a.Daemon, log: testLogger(t)}).handler()).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/v1/daemon", nil))
	if w.Code != http.StatusForbidden {
		t.Errorf("a stranger got %d", w.Code)
	}
	// Nobody else may take the place.
	d, err := NewDaemon(a.Config(), newFakeEngine(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("a second daemon: %v", err)
	}
}
