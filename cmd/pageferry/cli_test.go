package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/perf/workload"
)

// TestMain is also the roles that this program has when it runs itself.
func TestMain(m *testing.M) {
	lab.Main()
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "pager":
			os.Exit(pager.Main(os.Args[2:]))
		case "workload":
			os.Exit(workload.Main(os.Args[2:]))
		case "daemon", "restore", appliance.LazyTail:
			os.Exit(mainStatus())
		}
	}
	testutil.Main(m)
}

type outcome struct {
	status   int
	out, err string
}

// lastLine is what --json promises to be one object.
func (o outcome) lastLine(t *testing.T) map[string]any {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(o.out), "\n")
	var m map[string]any
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &m); err != nil {
		t.Fatalf("last line is no object: %v: %q", err, o.out)
	}
	return m
}

func command(t *testing.T, e appliance.Engine, args ...string) outcome {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{streams: streams{in: strings.NewReader(""), out: &out, err: &errs},
		newEngine: func() (appliance.Engine, error) {
			if e == nil {
				return nil, errors.New("no engine in this test")
			}
			return e, nil
		}}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	return outcome{status: runApp(ctx, a, args), out: out.String(), err: errs.String()}
}

// fakeDaemon answers the API as it is told.
type fakeDaemon struct {
	report   appliance.Report   // what every migration turns out to be
	progress []appliance.Report // seen by watchers before
	refuse   *appliance.APIError
	dry      appliance.DryRunReport
	got      appliance.MigrateRequest
	socket   string
}

func (d *fakeDaemon) start(t *testing.T) string {
	t.Helper()
	d.socket = testutil.Socket(t, "api")
	l, err := net.Listen("unix", d.socket)
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, status int, v any) {
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("POST /v1/migrations", func(w http.ResponseWriter, r *http.Request) {
		_ = json.NewDecoder(r.Body).Decode(&d.got)
		switch {
		case d.refuse != nil:
			answer(w, http.StatusConflict, d.refuse)
		case d.got.DryRun:
			answer(w, http.StatusOK, d.dry)
		default:
			answer(w, http.StatusAccepted, appliance.Report{ID: "ab12", SourcePID: d.got.PID})
		}
	})
	mux.HandleFunc("GET /v1/migrations", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, []appliance.Report{d.report})
	})
	mux.HandleFunc("GET /v1/migrations/{id}", func(w http.ResponseWriter, r *http.Request) {
		if r.PathValue("id") != "ab12" {
			answer(w, http.StatusNotFound, appliance.APIError{Kind: appliance.KindUnknown, Message: "no such migration"})
			return
		}
		answer(w, http.StatusOK, d.report)
	})
	mux.HandleFunc("GET /v1/migrations/{id}/events", func(w http.ResponseWriter, _ *http.Request) {
		enc := json.NewEncoder(w)
		for _, p := range d.progress {
			_ = enc.Encode(p)
		}
		if d.report.Finished() {
			_ = enc.Encode(d.report)
		}
	})
	mux.HandleFunc("POST /v1/migrations/{id}/cancel", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusAccepted, d.report)
	})
	srv := &http.Server{Handler: mux}
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-served })
	return d.socket
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args string
		want string
	}{
		{"nonsense", "unknown command"},
		{"migrate", "accepts 1 arg"},
		{"migrate 12", "where to"},
		{"migrate x --to h", "no process id"},
		{"migrate 0 --to h", "no process id"},
		{"migrate 12 --to h --nope", "unknown flag"},
		{"migrate 12 --to h --mode precpy", "mode \"precpy\" is not known"},
		{"migrate 12 --to h --mode fast", "mode \"fast\" is not known"},
		{"migrate 12 --to h --trap mouse", `trap "mouse" is not known`},
		{"migrate 12 --to h --transport roce", "transport \"roce\" is not known"},
		{"migrate 12 --to h --compress zip", "compress \"zip\" is not known"},
		{"migrate 12 --to h --max-downtime 1", "no time such as 50ms"},
		{"migrate 12 --to h --max-downtime -1s", "no time such as 50ms"},
		{"migrate 12 --to h --throttle 1", "no part of the time"},
		{"migrate 12 --to h --throttle half", "invalid argument"},
		{"migrate 12 --to h --max-bandwidth 1G", "--max-bandwidth: \"1G\": the unit \"G\" is not known; write 1Gbit for bits or 1GiB for bytes"},
		{"migrate 12 --to h --max-bandwidth 10", "the unit is missing"},
		{"migrate 12 --to h --max-bandwidth 1kbit", "less than 1Mbit"},
		{"migrate 12 --to h --lanes 17", "--lanes: 17 is not between 1 and 16"},
		{"migrate 12 --to h --lanes -1", "--lanes: -1 is not between 1 and 16"},
		{"demo --max-bandwidth fast", "--max-bandwidth: \"fast\" is not a bandwidth"},
		{"migrate 12 --to h --tcp keep", "--tcp: \"keep\" is not known"},
		{"migrate 12 --to h --pidns x", "--pidns: \"x\" is not known"},
		{"migrate 12 --to h --on-source-exit x", "--on-source-exit: \"x\" is not known"},
		{"migrate 12 --to h --address 1.2.3.4", "not OLD=NEW"},
		{"inspect", "accepts 1 arg"},
		{"inspect -- -1", "no process id"},
		{"checkpoint 12", "--dir"},
		{"checkpoint 12 --dir /tmp", "exists"},
		{"restore", "--dir"},
		{"restore --dir /no/such/dir", "no such directory"},
		{"daemon --config /no/such/file", "/no/such/file"},
		{"keys issue ../x", "../x"},
		{"demo --hops 0", "0 hops"},
		{"demo --size 1GB", "write 1GiB"},
		{"demo --tcp refuse", "refuse"},
	} {
		t.Run(c.args, func(t *testing.T) {
			o := command(t, nil, strings.Fields(c.args)...)
			if o.status != exitUsage || !strings.Contains(o.err, c.want) {
				t.Errorf("status %d, said %q; want 2 and %q", o.status, o.err, c.want)
			}
			if n := strings.Count(strings.TrimSpace(o.err), "\n"); n > 1 {
				t.Errorf("said %d lines: %q", n+1, o.err)
			}
		})
	}
}

func TestExitStatusFollowsTheOutcome(t *testing.T) {
	for o, want := range map[appliance.Outcome]int{
		appliance.OutcomeDone: 0, appliance.OutcomeFailed: 1, appliance.OutcomeCanceled: 1,
		appliance.OutcomeRefused: 3, appliance.OutcomeInDoubt: 4, appliance.OutcomeLost: 4,
	} {
		t.Run(string(o), func(t *testing.T) {
			d := &fakeDaemon{report: appliance.Report{ID: "ab12", SourcePID: 12, Peer: "h", Outcome: o, Reason: "because", State: "x", Rounds: []appliance.Round{}},
				progress: []appliance.Report{{ID: "ab12", State: "preparing", Comm: "redis", MaxBandwidth: 1250e6}, {ID: "ab12", State: "serving", PagesTotal: 100, PagesResident: 40}}}
			socket := d.start(t)
			got := command(t, nil, "migrate", "12", "--to", "h", "--json", "--socket", socket, "--address", "1.1.1.1=2.2.2.2", "--tcp", "close",
				"--max-bandwidth", "10Gbit", "--lanes", "4")
			if got.status != want {
				t.Errorf("status %d, want %d: %s", got.status, want, got.err)
			}
			if m := got.lastLine(t); m["outcome"] != string(o) || m["id"] != "ab12" {
				t.Errorf("last line %v", m)
			}
			if !strings.Contains(got.err, "60 of 100 pages left") || !strings.Contains(got.err, "preparing") ||
				!strings.Contains(got.err, "at most 10 Gbit/s (1.16 GiB/s)") {
				t.Errorf("progress: %q", got.err)
			}
			if want != 0 && !strings.Contains(got.err, "because") {
				t.Errorf("does not say why: %q", got.err)
			}
			if d.got.PID != 12 || d.got.To != "h" || d.got.TCP != "close" || d.got.Addresses["1.1.1.1"] != "2.2.2.2" ||
				d.got.MaxBandwidth != "10Gbit" || d.got.Lanes != 4 {
				t.Errorf("asked for %+v", d.got)
			}
			if w := command(t, nil, "watch", "ab12", "--socket", socket); w.status != want {
				t.Errorf("watch: status %d", w.status)
			}
			if s := command(t, nil, "show", "ab12", "--socket", socket); s.status != 0 || !strings.Contains(s.out, string(o)) {
				t.Errorf("show: %+v", s)
			}
		})
	}
}

func TestRefusedByTheDaemon(t *testing.T) {
	d := &fakeDaemon{refuse: &appliance.APIError{Kind: appliance.KindRefused, Message: "process 12: refused: it has a packet socket", Reasons: []string{"x"}}}
	o := command(t, nil, "migrate", "12", "--to", "h", "--json", "--socket", d.start(t))
	if o.status != exitRefused || !strings.Contains(o.err, "packet socket") {
		t.Errorf("%+v", o)
	}
	if m := o.lastLine(t); m["outcome"] != "refused" || m["source_pid"] != 12.0 {
		t.Errorf("last line %v", m)
	}
}

func TestDryRun(t *testing.T) {
	d := &fakeDaemon{dry: appliance.DryRunReport{Destination: "host-b", Reasons: []string{},
		Inspection: appliance.Inspection{PID: 12, Comm: "redis", Movable: true, Items: []appliance.InspectionItem{{Kind: "thread", What: "4", Carried: true}}}}}
	socket := d.start(t)
	o := command(t, nil, "migrate", "12", "--to", "h", "--dry-run", "--socket", socket)
	if o.status != 0 || !strings.Contains(o.out, "host-b would take it") || !d.got.DryRun {
		t.Errorf("%+v", o)
	}
	d.dry.Reasons = []string{"not enough memory"}
	if o := command(t, nil, "migrate", "12", "--to", "h", "--dry-run", "--json", "--socket", socket); o.status != exitRefused ||
		!strings.Contains(o.err, "not enough memory") || o.lastLine(t)["destination"] != "host-b" {
		t.Errorf("%+v", o)
	}
	d.dry.Reasons, d.dry.Inspection.Movable = nil, false
	d.dry.Inspection.Items = append(d.dry.Inspection.Items, appliance.InspectionItem{Kind: "descriptor", What: "9", Reason: "is odd"})
	if o := command(t, nil, "migrate", "12", "--to", "h", "--dry-run", "--socket", socket); o.status != exitRefused || !strings.Contains(o.err, "is odd") {
		t.Errorf("%+v", o)
	}
}

func TestListAndUnknown(t *testing.T) {
	d := &fakeDaemon{report: appliance.Report{ID: "ab12", Comm: "redis", SourcePID: 12, Outcome: appliance.OutcomeDone}}
	socket := d.start(t)
	if o := command(t, nil, "list", "--socket", socket); o.status != 0 || !strings.Contains(o.out, "ab12") || !strings.Contains(o.out, "redis") {
		t.Errorf("%+v", o)
	}
	o := command(t, nil, "list", "--json", "--socket", socket)
	if ms, ok := o.lastLine(t)["migrations"].([]any); !ok || len(ms) != 1 {
		t.Errorf("%+v", o)
	}
	if o := command(t, nil, "show", "zz", "--socket", socket); o.status != exitUsage {
		t.Errorf("%+v", o)
	}
	if o := command(t, nil, "list", "--socket", "/no/such/socket"); o.status != exitFailed || !strings.Contains(o.err, "pageferry daemon") {
		t.Errorf("no daemon: %+v", o)
	}
	// The daemon goes away while it is being watched.
	d.report.Outcome = ""
	if o := command(t, nil, "watch", "ab12", "--socket", socket); o.status != exitInDoubt || !strings.Contains(o.err, "pageferry show ab12") {
		t.Errorf("daemon gone: %+v", o)
	}
}

// inspectOnly is an engine that knows how to inspect.
type inspectOnly struct {
	appliance.Engine
	in appliance.Inspection
}

func (e inspectOnly) Inspect(int, appliance.SourceOptions) (appliance.Inspection, error) {
	return e.in, nil
}

func (e inspectOnly) NewSourceProcess(int, appliance.SourceOptions) (migrate.Process, migrate.Offer, error) {
	return nil, migrate.Offer{}, errors.New("cannot be held")
}

func TestInspect(t *testing.T) {
	testutil.Require(t, testutil.Root)
	in := appliance.Inspection{PID: 7, Comm: "x", Unit: "x.service", Parent: "systemd", Restarts: true, Movable: true}
	if o := command(t, inspectOnly{in: in}, "inspect", "7"); o.status != 0 || !strings.Contains(o.out, "It can move") || !strings.Contains(o.out, "--on-source-exit") {
		t.Errorf("%+v", o)
	}
	// What cannot be measured is said, and nothing predicted.
	o := command(t, inspectOnly{in: in}, "inspect", "7", "--measure", "--json")
	if m := o.lastLine(t); o.status != 0 || m["pid"] != 7.0 || m["unmeasured"] != "cannot be held" || len(m["predictions"].([]any)) != 0 {
		t.Errorf("%+v", o)
	}
	for _, args := range []string{"inspect 7 --measure --link fast", "inspect 7 --link 1Gbit", "inspect 7 --measure --link none"} {
		if o := command(t, inspectOnly{in: in}, strings.Fields(args)...); o.status != exitUsage {
			t.Errorf("%s: %+v", args, o)
		}
	}
	in.Movable, in.Items = false, []appliance.InspectionItem{{Kind: "descriptor", What: "3 packet socket", Reason: "cannot be carried"}}
	for _, cmd := range []string{"inspect 7", "inspect 7 --json", "checkpoint 7 --dir " + filepath.Join(t.TempDir(), "ck")} {
		if o := command(t, inspectOnly{in: in}, strings.Fields(cmd)...); o.status != exitRefused || !strings.Contains(o.out+o.err, "packet socket") {
			t.Errorf("%s: %+v", cmd, o)
		}
	}
}

func TestDoctor(t *testing.T) {
	o := command(t, nil, "doctor", "--json")
	m := o.lastLine(t)
	fs, ok := m["findings"].([]any)
	if !ok || len(fs) < 10 {
		t.Fatalf("%v", m)
	}
	for _, f := range fs {
		f := f.(map[string]any)
		if f["verdict"] != "ok" && f["fix"] == nil {
			t.Errorf("no fix for %v", f)
		}
	}
	if want := map[bool]int{true: 0, false: 1}[m["ready"] == true]; o.status != want {
		t.Errorf("status %d, ready %v", o.status, m["ready"])
	}
}

func TestKeys(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "authority")
	if o := command(t, nil, "keys", "init", "--dir", dir); o.status != 0 {
		t.Fatalf("%+v", o)
	}
	o := command(t, nil, "keys", "issue", "host-a", "--dir", dir)
	if o.status != 0 || !strings.Contains(o.out, "cert: "+filepath.Join(dir, "host-a.pem")) {
		t.Fatalf("%+v", o)
	}
	// What it prints is a configuration that a daemon takes.
	if _, err := appliance.ParseConfig("printed", []byte(o.out)); err != nil {
		t.Error(err)
	}
	if o := command(t, nil, "keys", "init", "--dir", dir); o.status != exitFailed {
		t.Errorf("an authority was replaced: %+v", o)
	}
}

func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
		if o := command(t, nil, "completion", shell); o.status != 0 || !strings.Contains(o.out, "pageferry") {
			t.Errorf("%s: status %d", shell, o.status)
		}
	}
	o := command(t, nil, "__complete", "migrate", "1", "--mode", "")
	for _, want := range []string{"postcopy", "stop"} {
		if !strings.Contains(o.out, want) {
			t.Errorf("--mode completes to %q", o.out)
		}
	}
	d := &fakeDaemon{report: appliance.Report{ID: "ab12", Comm: "redis"}}
	if o := command(t, nil, "__complete", "--socket", d.start(t), "show", ""); !strings.Contains(o.out, "ab12") {
		t.Errorf("ids complete to %q", o.out)
	}
	for _, hidden := range []string{"pager", appliance.LazyTail} {
		if o := command(t, nil, "--help"); strings.Contains(o.out, "  "+hidden+" ") {
			t.Errorf("%s is shown", hidden)
		}
	}
}

func TestLineProgressIsSparse(t *testing.T) {
	var b bytes.Buffer
	now := time.Unix(0, 0)
	p := &lineProgress{w: &b, every: time.Second, now: func() time.Time { return now }}
	for i := range 100 {
		p.update(appliance.Report{State: "serving", PagesTotal: 1000, PagesResident: uint64(i), BytesWire: uint64(i) << 20})
		now = now.Add(50 * time.Millisecond)
	}
	if n := strings.Count(b.String(), "\n"); n != 5 {
		t.Errorf("%d lines in five seconds:\n%s", n, b.String())
	}
	if !strings.Contains(b.String(), "20.0 MiB/s") {
		t.Errorf("the rate is not there:\n%s", b.String())
	}
}

func TestErrorsAreOneLine(t *testing.T) {
	err := errors.Join(errors.New("a"), fmt.Errorf("b\nc"))
	if got := oneLine(err); got != "a; b; c" {
		t.Error(got)
	}
}
