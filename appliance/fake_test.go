package appliance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// fakeEngine is an engine without processes: what it is asked for is recorded,
// and a test can hold or fail each step. Pids below 100 cannot be carried.
type fakeEngine struct {
	facts HostFacts

	mu     sync.Mutex
	calls  []string
	gates  map[string]chan struct{} // a step waits for the closing of its gate
	fails  map[string]error
	gone   map[int]bool
	lanes  []LaneOptions // that lanes were asked for with
	memory page.Range    // what its processes have
}

func newFakeEngine() *fakeEngine {
	return &fakeEngine{gates: map[string]chan struct{}{}, fails: map[string]error{}, gone: map[int]bool{}}
}

// hold makes a step wait until the returned function is called.
func (e *fakeEngine) hold(step string) (release func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ch := make(chan struct{})
	e.gates[step] = ch
	return sync.OnceFunc(func() {
		e.mu.Lock()
		delete(e.gates, step)
		e.mu.Unlock()
		close(ch)
	})
}

func (e *fakeEngine) fail(step string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fails[step] = err
}

func (e *fakeEngine) did(step string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.calls, step)
}

func (e *fakeEngine) history() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.calls, " ")
}

func (e *fakeEngine) step(ctx context.Context, name string) error {
	e.mu.Lock()
	e.calls = append(e.calls, name)
	gate, err := e.gates[name], e.fails[name]
	e.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return err
}

const fakeMemory = 64 << 20

func (e *fakeEngine) Inspect(pid int, _ SourceOptions) (Inspection, error) {
	if pid == 99999 {
		return Inspection{}, errors.New("no such process")
	}
	in := Inspection{PID: pid, Comm: "fake", Threads: 3, MemoryBytes: fakeMemory, Movable: pid >= 100,
		Items: []InspectionItem{{Kind: "descriptor", What: "0 /dev/null", Carried: true}}}
	if !in.Movable {
		in.Items = append(in.Items, InspectionItem{Kind: "descriptor", What: "7 packet socket", Reason: "packet sockets stay with their host"})
	}
	return in, nil
}

func (e *fakeEngine) NewSourceProcess(pid int, opts SourceOptions) (migrate.Process, migrate.Offer, error) {
	in, err := e.Inspect(pid, opts)
	if err != nil {
		return nil, migrate.Offer{}, err
	}
	if !in.Movable {
		return nil, migrate.Offer{}, &migrate.Refusal{Reasons: in.Refusals()}
	}
	f, err := hostFacts()
	if err != nil {
		return nil, migrate.Offer{}, err
	}
	o := migrate.Offer{Mode: opts.Mode, HostPID: pid, PID: pid, Comm: "fake", Threads: 3, MemoryBytes: fakeMemory,
		PageSize: page.Size, Machine: f.Machine, XFeatures: f.XFeatures, XSize: f.XSize, Kernel: f.Kernel,
		PIDNamespace: opts.PIDNamespace, PlainPages: opts.PlainPages, Lanes: opts.BulkLanes, Trap: opts.Trap, Keep: opts.Keep}
	if e.did("offer-too-much") {
		o.MemoryBytes = 1 << 50
	}
	return &fakeProcess{e: e, pid: pid}, o, nil
}

func (e *fakeEngine) AdoptSource(_ context.Context, _ transport.MigrationID, pid int, _ SourceOptions) (migrate.Process, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.calls = append(e.calls, fmt.Sprintf("adopt-%d", pid))
	if e.gone[pid] {
		return nil, fmt.Errorf("process %d: %w", pid, migrate.ErrGone)
	}
	return &fakeProcess{e: e, pid: pid, held: true}, nil
}

func (e *fakeEngine) NewLanes(o LaneOptions) (migrate.Lanes, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lanes = append(e.lanes, o)
	return &fakeLanes{e: e}, nil
}

func (e *fakeEngine) NewHost(HostOptions) (Host, error) { return &fakeHost{e: e}, nil }

type fakeProcess struct {
	e    *fakeEngine
	pid  int
	held bool
}

func (p *fakeProcess) Isolate(ctx context.Context) error { return p.e.step(ctx, "isolate") }
func (p *fakeProcess) Track(ctx context.Context) (string, error) {
	return "fake", p.e.step(ctx, "track")
}
func (p *fakeProcess) Look(ctx context.Context) (migrate.Look, error) {
	l := migrate.Look{Layout: []byte("layout")}
	if !p.e.memory.Empty() {
		l.Content = page.NewSet(p.e.memory)
	}
	return l, p.e.step(ctx, "look")
}
func (p *fakeProcess) Throttle(float64) error           { return nil }
func (p *fakeProcess) SwitchNears()                     {}
func (p *fakeProcess) Peek(*page.Set) (page.Set, error) { return page.Set{}, nil }
func (p *fakeProcess) Freeze(ctx context.Context) (migrate.State, error) {
	return migrate.State{Image: []byte("image")}, p.e.step(ctx, "freeze")
}
func (p *fakeProcess) Hold(ctx context.Context) error {
	p.held = true
	return p.e.step(ctx, "hold")
}
func (p *fakeProcess) Held(context.Context) (bool, error) { return p.held, nil }
func (p *fakeProcess) Thaw(ctx context.Context) error     { return p.e.step(ctx, "thaw") }
func (p *fakeProcess) Kill(ctx context.Context) error     { return p.e.step(ctx, "kill") }
func (p *fakeProcess) Close() error                       { return nil }
func (p *fakeProcess) ReadPages(page.Space, []page.Range, []byte) error {
	return errors.New("nothing is asked for")
}
func (p *fakeProcess) BeforeCommit(ctx context.Context) error { return p.e.step(ctx, "before-commit") }
func (p *fakeProcess) AtSwitch(ctx context.Context) error     { return p.e.step(ctx, "at-switch") }
func (p *fakeProcess) OnSourceExit(ctx context.Context) error { return p.e.step(ctx, "source-exit") }

type fakeLanes struct{ e *fakeEngine }

func (l *fakeLanes) Open(ctx context.Context, _ uint32, _ []byte, _ migrate.Process) error {
	return l.e.step(ctx, "lanes")
}
func (l *fakeLanes) Round(uint32, bool, *page.Set, *page.Set) {}
func (l *fakeLanes) Saved() migrate.Saved                     { return migrate.Saved{} }
func (l *fakeLanes) Lost() <-chan error                       { return nil }
func (l *fakeLanes) BytesSent() uint64                        { return 1234 }
func (l *fakeLanes) Close() error                             { return nil }

type fakeHost struct{ e *fakeEngine }

func (h *fakeHost) Prepare(ctx context.Context, peer transport.Peer, id transport.MigrationID, _ migrate.Offer) (migrate.Arrival, error) {
	if err := h.e.step(ctx, "prepare"); err != nil {
		return nil, err
	}
	h.e.mu.Lock()
	h.e.calls = append(h.e.calls, "peer="+peer.Name)
	h.e.mu.Unlock()
	return &fakeArrival{e: h.e, id: id}, nil
}

func (h *fakeHost) Adopt(_ context.Context, id transport.MigrationID) (migrate.Arrival, error) {
	return &fakeArrival{e: h.e, id: id}, nil
}
func (h *fakeHost) Lane(_ transport.LaneID, conn *os.File) error { return conn.Close() }
func (h *fakeHost) Shown(context.Context, transport.MigrationID) (Memory, error) {
	return Memory{Dir: "/shown", Kept: true, PagesTotal: 1000, PagesResident: 7}, nil
}
func (h *fakeHost) Unkeep(transport.MigrationID) error {
	return h.e.step(context.Background(), "unkeep")
}
func (h *fakeHost) Close() error { return nil }

type fakeArrival struct {
	e  *fakeEngine
	id transport.MigrationID

	mu    sync.Mutex
	epoch uint32
}

func (a *fakeArrival) LaneKey() []byte { return make([]byte, 32) }
func (a *fakeArrival) Land(ctx context.Context, b migrate.Batch) (l migrate.Landed, err error) {
	for i := range b.Classes {
		l.Pages += b.Classes[i].Pages()
	}
	return l, a.e.step(ctx, "land")
}
func (a *fakeArrival) Rebuild(ctx context.Context, st migrate.State, all bool) error {
	if _, err := st.Rest(ctx); err != nil {
		return err
	}
	if all {
		return a.e.step(ctx, "rebuild-all")
	}
	return a.e.step(ctx, "rebuild")
}
func (a *fakeArrival) Release(ctx context.Context) (int, error) {
	return 4711, a.e.step(ctx, "release")
}
func (a *fakeArrival) Fetch(ctx context.Context) error    { return a.e.step(ctx, "fetch") }
func (a *fakeArrival) Resident(ctx context.Context) error { return a.e.step(ctx, "resident") }
func (a *fakeArrival) Finish(ctx context.Context) error   { return a.e.step(ctx, "finish") }
func (a *fakeArrival) Abort(ctx context.Context) error    { return a.e.step(ctx, "abort") }
func (a *fakeArrival) Close() error                       { return nil }
func (a *fakeArrival) NewEpoch(context.Context) (uint32, []byte, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.epoch++
	return a.epoch + 1, make([]byte, 32), nil
}
func (a *fakeArrival) Stats() migrate.ArrivalStats {
	return migrate.ArrivalStats{PagesTotal: 1000, PagesResident: 1000, PagesZero: 10, PagesFaulted: 5,
		BytesWire: 4 << 20, FaultP50us: 40, FaultP99us: 80, FaultMaxus: 90}
}

// fakeHostDaemon is a daemon on a fake engine, running.
type fakeHostDaemon struct {
	*Daemon
	engine *fakeEngine
	client *Client
	stop   func()
}

// startDaemon runs a daemon until the test ends, or stop is called.
func startDaemon(t *testing.T, c Config, e *fakeEngine) *fakeHostDaemon {
	t.Helper()
	d, err := NewDaemon(c, e, testLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	client := NewClient(d.Config().Socket)
	h := &fakeHostDaemon{Daemon: d, engine: e, client: client}
	h.stop = sync.OnceFunc(func() {
		client.Close()
		cancel()
		if err := <-ran; err != nil {
			t.Errorf("daemon %s: %v", d.Config().Name, err)
		}
	})
	t.Cleanup(h.stop)
	for {
		if _, err := client.Info(t.Context()); err == nil {
			return h
		}
		select {
		case err := <-ran:
			ran <- err
			t.Fatalf("daemon %s ended: %v", d.Config().Name, err)
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		default:
		}
	}
}
