package appliance

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/rdma"
	"github.com/pageferry/pageferry/transport"
)

// host is the destination's end of the native engine: it joins skeletons
// (checkpoint/restore) and pagers (appliance/pager).
type host struct {
	opts HostOptions
	log  *slog.Logger
	kill func(string) // see EnvKillPoints
	// noFUSE is why arriving processes cannot be shown as files; nil: they can.
	noFUSE error

	mu       sync.Mutex
	arrivals map[transport.MigrationID]*arrival
}

func newHost(opts HostOptions) (*host, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &host{opts: opts, log: log, kill: killPoint(), arrivals: map[transport.MigrationID]*arrival{}}
	if h.kill != nil {
		inject.KillPoint = func(p string) { h.kill("inject/" + p) }
	}
	if err, takeOver := fusemem.Probe(); err != nil || takeOver != nil {
		h.noFUSE = errors.Join(err, takeOver)
		log.Info("arriving processes are not shown as files", "why", h.noFUSE)
	}
	sweep(log)
	sweepLeft(log)
	return h, nil
}

func (h *host) dir(id transport.MigrationID) string {
	return filepath.Join(h.opts.RunDir, id.String())
}

// showDir is where an arriving process is shown as files.
func (h *host) showDir(id transport.MigrationID) string {
	return filepath.Join(filepath.Dir(h.opts.RunDir), id.String())
}

// trap is how what is missing of o is trapped here.
func (h *host) trap(o migrate.Offer) string {
	if o.Trap != TrapFUSE && h.noFUSE != nil {
		return TrapUFFD
	}
	return cmp.Or(o.Trap, TrapAuto)
}

// Prepare makes pager and skeleton, so that the freeze finds them waiting.
func (h *host) Prepare(ctx context.Context, peer transport.Peer, id transport.MigrationID, o migrate.Offer) (_ migrate.Arrival, err error) {
	a := &arrival{
		id: id, host: h, dir: h.dir(id), log: h.log.With("migration", id), all: o.Mode.Whole(),
		record: arrivalRecord{Epoch: 1, PlainPages: o.PlainPages, Lanes: max(1, o.Lanes), Trap: h.trap(o), Keep: o.Keep},
		key:    newLaneKey(), unkept: make(chan struct{}),
	}
	if o.Keep && a.record.Trap == TrapUFFD {
		return nil, &migrate.Refusal{Reasons: []string{fmt.Sprintf("its memory is to be kept readable, and this host cannot show it: %v", h.noFUSE)}}
	}
	if err := os.MkdirAll(h.opts.RunDir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Mkdir(a.dir, 0o700); err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.Abort(context.WithoutCancel(ctx)))
		}
	}()
	if err := a.saveRecord(); err != nil {
		return nil, err
	}
	if err := a.makePagerGroups(); err != nil {
		return nil, err
	}
	cfg := restore.Config{
		ID: id.String(), PIDNamespace: o.PIDNamespace, PID: o.PID, PGID: o.PGID, SID: o.SID,
		Monotonic: o.Monotonic, Boottime: o.Boottime, ClocksAt: o.Heard, Addresses: o.Addresses, Log: a.log, KillPoint: h.kill,
	}
	if a.record.Trap != TrapUFFD {
		cfg.FileAt, cfg.Exe = a.fileAt, a.exe
	}
	if a.record.Trap == TrapFUSE {
		cfg.Image = fusemem.ImagePath(h.showDir(id))
	}
	if a.skeleton, err = restore.Prepare(ctx, cfg); err != nil {
		return nil, err
	}
	if a.pager, err = pager.Start(ctx, a.pagerConfig()); err != nil {
		return nil, err
	}
	go a.watch(a.pager)
	if err := a.pager.NewEpoch(ctx, a.record.Epoch); err != nil {
		return nil, err
	}
	h.mu.Lock()
	h.arrivals[id] = a
	h.mu.Unlock()
	return a, nil
}

// Adopt takes up what an earlier daemon left: the frozen or running process by
// its cgroup, the pager by its socket or, where it died too, by its keeper.
func (h *host) Adopt(ctx context.Context, id transport.MigrationID) (migrate.Arrival, error) {
	a := &arrival{id: id, host: h, dir: h.dir(id), log: h.log.With("migration", id), key: newLaneKey(), unkept: make(chan struct{})}
	b, err := os.ReadFile(filepath.Join(a.dir, "arrival.json"))
	if errors.Is(err, os.ErrNotExist) {
		// Prepare had hardly begun, or Finish hardly not ended.
		return nil, errors.Join(fmt.Errorf("%w: arrival %s: %w", migrate.ErrGone, id, err), os.RemoveAll(a.dir))
	}
	if err == nil {
		err = json.Unmarshal(b, &a.record)
	}
	if err != nil {
		return nil, fmt.Errorf("arrival %s: %w", id, err)
	}
	a.skeleton, err = restore.Reattach(ctx, restore.Config{ID: id.String(), Log: a.log, KillPoint: h.kill})
	if errors.Is(err, restore.ErrNoSkeleton) {
		// What read zeros may have ended for that.
		ended := a.record.Released && !a.record.Lost && (a.record.Resident || pager.Kept(a.dir))
		// Without a process nobody needs the pager and what is in the directory.
		if ended && !a.record.Resident {
			a.record.Resident = true // for the next daemon: the pager will not be there to tell
			if err := a.saveRecord(); err != nil {
				return nil, fmt.Errorf("arrival %s: %w", id, err)
			}
		}
		if perr := errors.Join(pager.Abandoned(a.dir), removePagerGroups(ctx, id)); perr != nil {
			return nil, fmt.Errorf("arrival %s: %w", id, perr)
		}
		if ended { // by itself
			return a, nil
		}
		return nil, fmt.Errorf("%w: %w", migrate.ErrGone, errors.Join(err, os.RemoveAll(a.dir)))
	}
	if err == nil {
		err = a.makePagerGroups()
	}
	if err != nil {
		return nil, fmt.Errorf("arrival %s: %w", id, err)
	}
	if err := a.revive(ctx, nil); err != nil {
		if errors.Is(err, migrate.ErrGone) {
			err = errors.Join(err, a.Abort(ctx))
		}
		return nil, fmt.Errorf("arrival %s: %w", id, err)
	}
	h.mu.Lock()
	h.arrivals[id] = a
	h.mu.Unlock()
	return a, nil
}

// Lane hands a page lane's connection to the pager that it is for.
func (h *host) Lane(lane transport.LaneID, conn *os.File) error {
	defer conn.Close()
	h.mu.Lock()
	a := h.arrivals[lane.Migration]
	h.mu.Unlock()
	if a == nil {
		return fmt.Errorf("lane for unknown migration %s", lane.Migration)
	}
	a.mu.Lock()
	p, key, epoch := a.pager, a.key, a.record.Epoch
	a.mu.Unlock()
	if p == nil {
		return fmt.Errorf("lane for migration %s, of which every page is here", lane.Migration)
	}
	if lane.Epoch != epoch {
		return fmt.Errorf("lane of epoch %d, this is epoch %d", lane.Epoch, epoch)
	}
	ctx, cancel := context.WithTimeout(context.Background(), upgradeLimit)
	defer cancel()
	var path *rdma.Path
	var noPath error
	if lane.RDMA {
		path, noPath = a.path(ctx, conn)
	}
	return p.AttachLane(ctx, lane, key, conn, path, noPath)
}

// Close lets go of all arrivals; pagers and processes live on.
func (h *host) Close() error {
	h.mu.Lock()
	as := h.arrivals
	h.arrivals = map[transport.MigrationID]*arrival{}
	h.mu.Unlock()
	var err error
	for _, a := range as {
		err = errors.Join(err, a.letGo())
	}
	return err
}

func (h *host) forget(id transport.MigrationID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.arrivals, id)
}
