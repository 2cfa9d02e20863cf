package appliance

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/proc"
	"github.com/pageferry/pageferry/transport"
)

// Daemon is one host's part of pageferry. Make it with NewDaemon.
type Daemon struct {
	config   Config
	engine   Engine
	log      *slog.Logger
	registry *registry
	links    links

	stopping chan struct{} // closed when Run begins to end

	// runs counts the migrations that run. No migration begins once closed is
	// set, so that Wait never races with Add.
	mu     sync.Mutex
	base   context.Context // of the migrations, which outlive API calls
	closed bool
	runs   sync.WaitGroup
	fabric *Fabric
}

// links is everything between two daemons: the listener, the handover's state
// machines over a control lane, the journal. The tests of the API replace it.
type links interface {
	// open goes on with what the journal holds unfinished, in the background.
	open(ctx context.Context) error
	// run listens for peers until ctx ends. It calls ready when it does.
	run(ctx context.Context, ready func()) error
	// send runs the source's side to its end. It keeps m's report up to date
	// and says in the end what came out.
	send(ctx context.Context, m *migration, to string, p migrate.Process, o migrate.Offer, opts SourceOptions) (Outcome, error)
	// rehearse puts an offer to a destination, measures, and takes it back.
	rehearse(ctx context.Context, to string, p migrate.Process, o migrate.Offer, opts SourceOptions) (migrate.Rehearsal, error)
	// resolve carries out a person's decision about a migration, of which rep is
	// the last that was heard.
	resolve(ctx context.Context, id transport.MigrationID, rep Report, owner string) error
	// shown and unkeep are Host's, of what arrives here.
	shown(ctx context.Context, id transport.MigrationID) (Memory, error)
	unkeep(id transport.MigrationID) error
	// close comes last, when nothing of all this runs any more.
	close() error
}

// NewDaemon checks the configuration and makes the directories; nothing listens
// before Run.
func NewDaemon(c Config, e Engine, log *slog.Logger) (*Daemon, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	host, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("host name: %w", err)
	}
	c = c.WithDefaults(host)
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	for _, dir := range []string{c.StateDir, c.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("daemon: %w", err)
		}
	}
	reg, err := openRegistry(filepath.Join(c.StateDir, "reports"), c.Limits.Reports)
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	d := &Daemon{config: c, engine: e, log: log, registry: reg, stopping: make(chan struct{}), fabric: NewFabric(c.SoftRoCE, log)}
	d.links = &handover{d: d}
	return d, nil
}

// Config is the configuration with its defaults.
func (d *Daemon) Config() Config { return d.config }

// Info says who the daemon is.
func (d *Daemon) Info() DaemonInfo {
	return DaemonInfo{Name: d.config.Name, PID: os.Getpid(), Listen: d.config.Listen}
}

// Run serves until ctx ends, then lets go of everything in good order:
// migrations before the commit are aborted, those after it wait in the journal
// for the next daemon; restored processes and their pagers live on.
func (d *Daemon) Run(ctx context.Context) error {
	unlock, err := lockRunDir(d.config.RunDir)
	if err != nil {
		return err
	}
	defer unlock()

	l, err := listenAPI(d.config.Socket)
	if err != nil {
		return err
	}
	defer l.Close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	d.mu.Lock()
	d.base = ctx
	d.mu.Unlock()
	context.AfterFunc(ctx, sync.OnceFunc(func() {
		d.mu.Lock()
		d.closed = true
		d.mu.Unlock()
		close(d.stopping)
	}))

	// First what an earlier daemon left, then peers, then the API: a peer that
	// asks after a migration gets the answer of the journal, and whoever can
	// reach the API finds everything in place.
	if err := d.links.open(ctx); err != nil {
		cancel()
		d.runs.Wait()
		return errors.Join(err, d.links.close())
	}
	ready := make(chan struct{})
	g.Go(func() error { return d.links.run(ctx, sync.OnceFunc(func() { close(ready) })) })
	g.Go(func() error {
		select {
		case <-ready:
		case <-ctx.Done():
			return nil
		}
		d.log.Info("ready", "name", d.config.Name, "listen", d.config.Listen, "socket", d.config.Socket)
		return (&api{d: d, log: d.log}).serve(ctx, l, authorised)
	})
	g.Go(func() error { return d.serveNetwork(ctx, ready) })
	err = g.Wait()
	d.runs.Wait()
	if cerr := d.links.close(); cerr != nil {
		d.log.Warn("closing", "err", cerr)
	}
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// lockRunDir keeps a second daemon out: two would fight over one journal.
func lockRunDir(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "daemon.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("daemon: another daemon runs with run_dir %s", dir)
	}
	return func() { f.Close() }, nil
}

// begin starts f in the background, unless the daemon is stopping.
func (d *Daemon) begin(f func(ctx context.Context)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.base == nil {
		return errors.New("the daemon is stopping")
	}
	ctx := d.base
	d.runs.Go(func() { f(ctx) })
	return nil
}

// peerAddress adds the default port.
func peerAddress(to string) (string, error) {
	if to == "" {
		return "", errors.New("no destination is named; say --to HOST")
	}
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		host, port = strings.Trim(to, "[]"), strconv.Itoa(DefaultPort)
	}
	if p, err := strconv.ParseUint(port, 10, 16); err != nil || p == 0 || host == "" {
		return "", fmt.Errorf("destination %q is not HOST or HOST:PORT", to)
	}
	return net.JoinHostPort(host, port), nil
}

// hold takes hold of the process that a request names.
func (d *Daemon) hold(pid int, opts SourceOptions) (migrate.Process, migrate.Offer, error) {
	if pid == os.Getpid() {
		return nil, migrate.Offer{}, &migrate.Refusal{Reasons: []string{fmt.Sprintf("process %d is the daemon itself", pid)}}
	}
	p, o, err := d.engine.NewSourceProcess(pid, opts)
	if err != nil {
		return nil, o, fmt.Errorf("process %d: %w", pid, err)
	}
	return p, o, nil
}

// Migrate begins a migration and returns its first report. What becomes of it
// is in the registry.
func (d *Daemon) Migrate(req MigrateRequest) (Report, error) {
	opts, err := d.options(req)
	if err != nil {
		return Report{}, err
	}
	to, err := peerAddress(req.To)
	if err != nil {
		return Report{}, &UsageError{Msg: err.Error()}
	}
	if opts.Transport == TransportRDMA {
		if err := d.fabric.possible(to, d.config.PageLanes == "plain"); err != nil {
			return Report{}, &migrate.Refusal{Reasons: []string{fmt.Sprintf("transport rdma: %v", err)}}
		}
	}
	if opts.Migration, err = requestedID(req.ID); err != nil {
		return Report{}, err
	}
	if rep, ok := d.registry.known(opts.Migration, RoleSource); ok {
		return rep, nil // it is asked for again
	}
	if err := sameProcess(req); err != nil {
		return Report{}, err
	}
	m := newMigration(opts.Migration, RoleSource, Report{
		Mode: opts.modeText(), Engine: "native", Trap: cmp.Or(opts.Trap, TrapAuto), Transport: "tcp",
		SourcePID: req.PID, State: "checking", Peer: req.To, Started: time.Now(),
		MaxBandwidth: opts.MaxBandwidth, Lanes: opts.BulkLanes, Kept: opts.Keep,
	})
	if err := d.registry.add(m); err != nil {
		return Report{}, err
	}
	p, offer, err := d.hold(req.PID, opts)
	if err != nil {
		d.registry.forget(m)
		return Report{}, err
	}
	expected := d.foresee(opts, to, offer)
	m.update(func(r *Report) {
		r.Comm, r.BytesMemory = offer.Comm, offer.MemoryBytes
		r.Predicted = expected
	})
	err = d.begin(func(ctx context.Context) {
		outcome, err := d.links.send(ctx, m, to, p, offer, opts)
		if cerr := p.Close(); cerr != nil {
			d.log.Warn("closing process", "migration", m.id, "pid", req.PID, "err", cerr)
		}
		d.end(m, outcome, err)
	})
	if err != nil {
		p.Close()
		d.registry.forget(m)
		return Report{}, err
	}
	rep, _ := m.snapshot()
	return rep, nil
}

// requestedID is the id that a request names, or a new one.
func requestedID(text string) (id transport.MigrationID, err error) {
	if text == "" {
		return newMigrationID()
	}
	if id, err = transport.ParseMigrationID(text); err != nil {
		return id, &UsageError{Msg: fmt.Sprintf("%q is no id of a migration: 32 hexadecimal digits", text)}
	}
	return id, nil
}

// sameProcess refuses a pid that is another process's by now.
func sameProcess(req MigrateRequest) error {
	if req.Started == 0 {
		return nil
	}
	st, err := proc.ReadStat(req.PID)
	if err == nil && st.StartTime != req.Started {
		err = errors.New("the number is another process's by now")
	}
	if err != nil {
		return &migrate.Refusal{Reasons: []string{fmt.Sprintf("process %d: %v", req.PID, err)}}
	}
	return nil
}

func newMigrationID() (id transport.MigrationID, err error) {
	if _, err := rand.Read(id[:]); err != nil {
		return id, fmt.Errorf("migration id: %w", err)
	}
	return id, nil
}

// end closes a migration's books. Outcome "" leaves it to a later daemon.
func (d *Daemon) end(m *migration, outcome Outcome, err error) {
	if outcome == "" {
		d.registry.forget(m)
		return
	}
	serr := d.registry.finish(m, func(r *Report) {
		r.Outcome = outcome
		if r.TotalMS == 0 {
			r.TotalMS = ms(time.Since(r.Started))
		}
		if err != nil {
			r.Reason = err.Error()
		}
		if outcome == OutcomeCanceled {
			r.Reason = fmt.Sprintf("canceled; process %d runs on here", r.SourcePID)
		}
	})
	if serr != nil {
		d.log.Error("keeping the report", "migration", m.id, "err", serr)
	}
	rep, _ := m.snapshot()
	pid := rep.SourcePID
	if m.role == RoleDestination {
		pid = rep.DestPID
	}
	d.log.Info("finished", "migration", m.id, "role", m.role, "pid", pid, "outcome", outcome, "reason", rep.Reason)
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
