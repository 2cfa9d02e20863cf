package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/pageferry/pageferry/appliance/journal"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// handover is the real links: it hands journal, engine and transport to the
// state machines of migrate, and what they say to the registry.
type handover struct {
	d        *Daemon
	journals migrate.Journals
	store    io.Closer // the same
	net      *network
	host     Host
	dest     *migrate.Destination
	hello    migrate.Hello
	gate     *gate
	kill     func(string) // see EnvKillPoints

	mu       sync.Mutex
	arriving map[transport.MigrationID]*migration
	sending  map[transport.MigrationID]*sending
}

// open opens the journal and takes up what an earlier daemon left.
func (h *handover) open(ctx context.Context) (err error) {
	d, c := h.d, h.d.config
	facts, err := hostFacts()
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	store, err := journal.Open(filepath.Join(c.StateDir, "journal"), journal.Options{})
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	h.journals, h.store = store, store
	if h.net, err = newNetwork(c, d.log); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	hostOpts := HostOptions{StateDir: c.StateDir, RunDir: filepath.Join(c.RunDir, "arrivals"), FilesDir: c.FilesDir, Pager: []string{exe, "pager"},
		WindowBytes: int64(c.Window), IdleSleep: c.Idle == "sleep", Fabric: d.fabric, Logger: d.log}
	d.fabric.Sweep()
	if c.PageLanes == "tls" {
		hostOpts.TLS = c.TLS
	}
	if h.host, err = d.engine.NewHost(hostOpts); err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	h.hello = migrate.Hello{Host: c.Name, PageSize: page.Size, XFeatures: facts.XFeatures, XSize: facts.XSize,
		Kernel: facts.Kernel, Machine: facts.Machine}
	h.arriving = map[transport.MigrationID]*migration{}
	h.sending = map[transport.MigrationID]*sending{}
	h.kill = killPoint()
	h.gate = newGate(h.host, newAdmission(facts, c))
	h.dest, err = migrate.NewDestination(migrate.DestinationConfig{
		Host: h.gate, Journals: h.journals, Hello: h.hello, Log: d.log, OnProgress: h.progress, KillPoint: h.kill,
	})
	if err != nil {
		return fmt.Errorf("daemon: %w", err)
	}
	if err := h.dest.Recover(ctx); err != nil {
		// What could not be taken up stays in the journal; a host is not given
		// up for it.
		d.log.Error("arrivals of an earlier daemon", "err", err)
	}
	return h.recoverSources(ctx)
}

// recoverSources goes on with every migration that left here and is not over.
// There may be several of one process: those that were aborted, and whose
// destination does not know it yet, and the newest. Only that one may touch the
// process, which may belong to another host by now.
func (h *handover) recoverSources(_ context.Context) error {
	recs, err := h.journals.List()
	if err != nil {
		h.d.log.Error("journal", "err", err)
	}
	recs = slices.DeleteFunc(recs, func(r migrate.Record) bool { return r.Role != migrate.RoleSource })
	slices.SortFunc(recs, func(a, b migrate.Record) int { return b.Started.Compare(a.Started) })
	taken := map[int]bool{}
	for _, rec := range recs {
		_, as := recallLanes(string(rec.Hint))
		m := newMigration(rec.Migration, RoleSource, Report{
			Mode: string(rec.Mode), Engine: "native", Trap: cmp.Or(as.Trap, TrapAuto), Transport: "tcp",
			SourcePID: rec.SourcePID, State: rec.State, Peer: rec.PeerAddress, Comm: rec.Comm, Started: rec.Started,
			MaxBandwidth: as.MaxBandwidth, Lanes: as.BulkLanes, Kept: as.Keep,
			Remarks: []string{"taken up from the journal of an earlier daemon"},
		})
		older := taken[rec.SourcePID]
		taken[rec.SourcePID] = true
		if older {
			m.pid = 0 // it keeps nobody from the process
		}
		if err := h.d.registry.add(m); err != nil {
			return fmt.Errorf("recovery: %w", err)
		}
		if err := h.d.begin(func(ctx context.Context) { h.recoverSource(ctx, m, rec, older) }); err != nil {
			return err
		}
	}
	return nil
}

func (h *handover) recoverSource(ctx context.Context, m *migration, rec migrate.Record, older bool) {
	opts := SourceOptions{Migration: rec.Migration, Mode: rec.Mode, Hint: rec.Hint, Logger: h.d.log,
		PlainPages: h.d.config.PageLanes == "plain", BulkLanes: h.d.config.BulkLanes,
		TCP: h.d.config.Defaults.TCP, OnSourceExit: h.d.config.Defaults.OnSourceExit}
	if _, as := recallLanes(string(rec.Hint)); as.BulkLanes != 0 {
		opts.BulkLanes, opts.MaxBandwidth, opts.Compress, opts.Transport = as.BulkLanes, as.MaxBandwidth, as.Compress, as.Transport
	}
	var p migrate.Process = othersProcess{}
	var err error
	if !older {
		if p, err = h.d.engine.AdoptSource(ctx, rec.Migration, rec.SourcePID, opts); errors.Is(err, migrate.ErrGone) {
			p, err = goneProcess{}, nil
		}
	}
	if err != nil {
		h.d.end(m, OutcomeInDoubt, fmt.Errorf("process %d could not be taken up again (restart the daemon to try once more): %w", rec.SourcePID, err))
		return
	}
	defer p.Close()
	offer := migrate.Offer{Mode: rec.Mode, HostPID: rec.SourcePID, Comm: rec.Comm}
	src, closeLanes, err := h.source(m, rec.PeerAddress, p, offer, opts)
	if err != nil {
		h.d.end(m, OutcomeInDoubt, err)
		return
	}
	defer closeLanes()
	defer h.departs(m.id, src)()
	m.running(src.Cancel)
	res, err := src.Recover(ctx)
	h.finish(ctx, m, src, res, err)
}

// source puts a migrate.Source together.
func (h *handover) source(m *migration, to string, p migrate.Process, o migrate.Offer, opts SourceOptions) (*migrate.Source, func(), error) {
	lo, err := h.laneOptions(m.id, to, opts)
	if err != nil {
		return nil, nil, err
	}
	lo.OnTransport = func(name, remark string) { m.update(func(r *Report) { r.goesOver(name, remark) }) }
	lanes, err := h.d.engine.NewLanes(lo)
	if err != nil {
		return nil, nil, err
	}
	if l, ok := lanes.(oneSided); ok {
		if n, ok := p.(*process); ok {
			n.onFrozen = l
		}
	}
	cfg := h.config(m.id, to, p, o)
	cfg.Lanes, cfg.MaxDowntime, cfg.Throttle, cfg.Auto = lanes, opts.MaxDowntime, opts.Throttle, opts.Auto
	cfg.AddressOrder = opts.AddressOrder
	cfg.OnProgress = func(p migrate.Progress) { m.update(func(r *Report) { r.follow(p) }) }
	if hooks, ok := p.(SourceHooks); ok {
		cfg.AtSwitch, cfg.OnSourceExit = hooks.AtSwitch, hooks.OnSourceExit
	}
	if clocks, ok := p.(Clocks); ok {
		cfg.Clocks = clocks.Clocks
	}
	if check, ok := p.(CommitCheck); ok {
		cfg.BeforeCommit = check.BeforeCommit
	}
	src, err := migrate.NewSource(cfg)
	if err != nil {
		lanes.Close()
		return nil, nil, err
	}
	return src, func() {
		if err := lanes.Close(); err != nil {
			h.d.log.Debug("closing page lanes", "migration", m.id, "err", err)
		}
	}, nil
}

func (h *handover) config(id transport.MigrationID, to string, p migrate.Process, o migrate.Offer) migrate.SourceConfig {
	return migrate.SourceConfig{
		ID: id, Process: p, Journals: h.journals, Address: to, Hello: h.hello, Offer: o, Log: h.d.log, KillPoint: h.kill,
		Dial: func(ctx context.Context) (transport.Lane, transport.Peer, error) {
			return h.net.dial(ctx, to)
		},
	}
}

func (h *handover) send(ctx context.Context, m *migration, to string, p migrate.Process, o migrate.Offer, opts SourceOptions) (Outcome, error) {
	src, closeLanes, err := h.source(m, to, p, o, opts)
	if err != nil {
		return OutcomeFailed, err
	}
	defer closeLanes()
	defer h.departs(m.id, src)()
	m.running(src.Cancel)
	res, err := src.Run(ctx)
	h.finish(ctx, m, src, res, err)
	return "", nil
}

// finish reports what came out, and then goes on until the other side knows as
// well: the journal is kept as long.
func (h *handover) finish(ctx context.Context, m *migration, src *migrate.Source, res migrate.Result, err error) {
	if res.Outcome == migrate.OutcomeDone {
		d := func(ms float64) time.Duration { return time.Duration(ms * float64(time.Millisecond)) }
		h.d.log.Debug("switched", "migration", m.id, "downtime", d(res.DowntimeMS), "freeze", d(res.FreezeMS), "send", d(res.SendMS),
			"rebuild", d(res.RebuildMS), "hold", d(res.HoldMS), "commit", d(res.CommitMS), "accept", d(res.AcceptMS), "release", d(res.ReleaseMS))
	}
	if res.Outcome != "" {
		m.update(func(r *Report) { r.result(res) })
	}
	outcome := outcomeOf(m, res, err)
	h.d.end(m, outcome, err)
	if res.Unsettled {
		h.settle(ctx, m, src)
	} else if outcome == OutcomeInDoubt || outcome == OutcomeLost {
		h.awaitResolve(ctx, m)
	}
}

// settle goes on until the other side knows.
func (h *handover) settle(ctx context.Context, m *migration, src *migrate.Source) {
	if err := src.Settle(ctx); err != nil && ctx.Err() == nil {
		h.d.log.Error("the destination does not know the outcome", "migration", m.id, "err", err)
	}
}

// outcomeOf is the report's word for what migrate returned; "" for what the next
// daemon goes on with.
func outcomeOf(m *migration, res migrate.Result, err error) Outcome {
	switch res.Outcome {
	case migrate.OutcomeDone:
		return OutcomeDone
	case migrate.OutcomeRefused:
		return OutcomeRefused
	case migrate.OutcomeInDoubt:
		return OutcomeInDoubt
	case migrate.OutcomeLost:
		return OutcomeLost
	case migrate.OutcomeAborted:
		if m.wasCanceled() || errors.Is(err, migrate.ErrCancelled) {
			return OutcomeCanceled
		}
	case migrate.OutcomeInterrupted:
		return ""
	}
	return OutcomeFailed // also where it never came to run
}

// run serves peers until ctx ends, then lets go of what has arrived.
func (h *handover) run(ctx context.Context, ready func()) error {
	err := h.net.serve(ctx, ready, incoming{
		control: func(lane transport.Lane, peer transport.Peer) {
			err := h.dest.Serve(withPeer(ctx, peer), lane, peer)
			if err != nil && ctx.Err() == nil {
				h.d.log.Warn("peer", "name", peer.Name, "address", peer.Address, "err", err)
			}
		},
		lane: func(id transport.LaneID, conn *os.File) {
			if err := h.host.Lane(id, conn); err != nil && ctx.Err() == nil {
				h.d.log.Warn("page lane", "migration", id.Migration, "lane", id.Kind, "err", err)
			}
		},
	})
	return errors.Join(err, h.dest.Close(), h.host.Close())
}

func (h *handover) close() error {
	var err error
	if h.net != nil {
		err = h.net.close()
	}
	if h.store != nil {
		err = errors.Join(err, h.store.Close())
	}
	return err
}

// progress keeps the reports of what arrives. migrate calls it at every change
// and it must not block.
func (h *handover) progress(p migrate.Progress) {
	if p.State == migrate.DestEmpty.String() {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	m := h.arriving[p.ID]
	if m == nil {
		m = newMigration(p.ID, RoleDestination, Report{
			Engine: "native", Trap: cmp.Or(p.Trap, TrapAuto), Transport: "tcp", Peer: p.Peer, Comm: p.Comm, Started: p.Started, State: p.State, Kept: p.Keep,
		})
		if err := h.d.registry.add(m); err != nil {
			return // an earlier one of that id is being put away
		}
		h.arriving[p.ID] = m
	}
	m.update(func(r *Report) { r.follow(p) })
	var outcome Outcome
	switch p.State {
	case migrate.DestDone.String():
		outcome = OutcomeDone
	case migrate.DestAborted.String():
		outcome = OutcomeFailed
	case migrate.DestLost.String():
		outcome = OutcomeLost
	default:
		return
	}
	delete(h.arriving, p.ID)
	if outcome == OutcomeFailed && (strings.HasSuffix(p.Reason, onlyAsked) || strings.HasPrefix(p.Reason, refusedAtOnce)) {
		// Nothing came of it, or nothing was meant to: whoever asked has the
		// answer, and this host keeps no book of questions.
		h.d.log.Info("not taken", "migration", p.ID, "peer", p.Peer, "reason", p.Reason)
		h.d.registry.forget(m)
		return
	}
	var why error
	if p.Reason != "" {
		why = errors.New(p.Reason)
	}
	if h.d.begin(func(context.Context) { h.d.end(m, outcome, why) }) != nil {
		h.d.end(m, outcome, why) // the daemon stops, and nobody minds the wait
	}
}

// The reasons that migrate gives for an arrival that never was one.
const (
	onlyAsked     = "only asked" // migrate.Rehearse takes its offer back
	refusedAtOnce = "prepare: "  // refused by Host.Prepare
)

type peerKey struct{}

// withPeer tells Prepare, through migrate, who offers.
func withPeer(ctx context.Context, p transport.Peer) context.Context {
	return context.WithValue(ctx, peerKey{}, p)
}

func peerOf(ctx context.Context) transport.Peer {
	p, _ := ctx.Value(peerKey{}).(transport.Peer)
	return p
}
