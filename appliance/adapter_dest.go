package appliance

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
)

// host is the destination's end of the native engine: it joins skeletons
// (checkpoint/restore) and pagers (appliance/pager).
type host struct {
	opts HostOptions
	log  *slog.Logger

	mu       sync.Mutex
	arrivals map[transport.MigrationID]*arrival
}

// arrivalRecord is what a restarted daemon must know of an arrival. It lies in
// the arrival's run directory, which does not survive a reboot, as the process
// itself does not.
type arrivalRecord struct {
	Epoch      uint32 `json:"epoch"`
	PlainPages bool   `json:"plain_pages"`
	Lanes      int    `json:"lanes"`
	// Resident: every page has arrived and the pager was told to end.
	Resident bool `json:"resident"`
}

// arrival is one migration on its way in. The daemon's goroutines share it.
type arrival struct {
	id   transport.MigrationID
	host *host
	dir  string // run directory: the pager's socket, the record
	log  *slog.Logger

	skeleton *restore.Skeleton

	mu     sync.Mutex
	pager  *pager.Client
	record arrivalRecord
	key    []byte
	stats  pager.Stats // the last that was seen
	done   bool        // resident and finished, or aborted
}

func newHost(opts HostOptions) (*host, error) {
	log := opts.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &host{opts: opts, log: log, arrivals: map[transport.MigrationID]*arrival{}}, nil
}

func (h *host) dir(id transport.MigrationID) string {
	return filepath.Join(h.opts.RunDir, id.String())
}

// Prepare makes pager and skeleton, so that the freeze finds them waiting.
func (h *host) Prepare(ctx context.Context, peer transport.Peer, id transport.MigrationID, o migrate.Offer) (_ migrate.Arrival, err error) {
	a := &arrival{
		id: id, host: h, dir: h.dir(id), log: h.log.With("migration", id),
		record: arrivalRecord{Epoch: 1, PlainPages: o.PlainPages, Lanes: max(1, o.Lanes)},
		key:    newLaneKey(),
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
	a.skeleton, err = restore.Prepare(ctx, restore.Config{
		ID: id.String(), PIDNamespace: o.PIDNamespace, PID: o.PID,
		Monotonic: o.Monotonic, Boottime: o.Boottime, Addresses: o.Addresses, Log: a.log,
	})
	if err != nil {
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
	a := &arrival{id: id, host: h, dir: h.dir(id), log: h.log.With("migration", id), key: newLaneKey()}
	b, err := os.ReadFile(filepath.Join(a.dir, "arrival.json"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: arrival %s: %w", migrate.ErrGone, id, err)
	}
	if err == nil {
		err = json.Unmarshal(b, &a.record)
	}
	if err != nil {
		return nil, fmt.Errorf("arrival %s: %w", id, err)
	}
	a.skeleton, err = restore.Reattach(ctx, restore.Config{ID: id.String(), Log: a.log})
	if errors.Is(err, restore.ErrNoSkeleton) {
		// Without a process nobody needs the pager and what is in the directory.
		if p, perr := pager.Connect(ctx, a.pagerConfig()); perr == nil {
			err = errors.Join(err, p.Abort(ctx))
		}
		return nil, fmt.Errorf("%w: %w", migrate.ErrGone, errors.Join(err, os.RemoveAll(a.dir)))
	}
	if err != nil {
		return nil, fmt.Errorf("arrival %s: %w", id, err)
	}
	if err := a.reachPager(ctx); err != nil && !a.record.Resident {
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
	if lane.Epoch != epoch {
		return fmt.Errorf("lane of epoch %d, this is epoch %d", lane.Epoch, epoch)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return p.AttachLane(ctx, lane, key, conn)
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

func newLaneKey() []byte {
	k := make([]byte, 32)
	rand.Read(k) // never fails
	return k
}

func (a *arrival) pagerConfig() pager.Config {
	c := pager.Config{
		Command: a.host.opts.Pager, ID: a.id, Dir: a.dir,
		Window: int(a.host.opts.WindowBytes), BulkLanes: a.record.Lanes,
	}
	if t := a.host.opts.TLS; t != nil && !a.record.PlainPages {
		c.TLS = &pager.TLS{CA: t.CA, Cert: t.Cert, Key: t.Key}
	}
	return c
}

// saveRecord replaces the record. Caller holds a.mu or is alone.
func (a *arrival) saveRecord() error {
	b, err := json.Marshal(a.record)
	if err != nil {
		return err
	}
	tmp := filepath.Join(a.dir, ".arrival.json")
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(a.dir, "arrival.json"))
}

// reachPager connects to the living pager, or makes a new one in the place of a
// dead one.
func (a *arrival) reachPager(ctx context.Context) error {
	p, err := pager.Connect(ctx, a.pagerConfig())
	if errors.Is(err, pager.ErrNoPager) {
		p, err = pager.Takeover(ctx, a.pagerConfig(), 0)
	}
	if err != nil {
		return fmt.Errorf("pager: %w", err)
	}
	a.mu.Lock()
	a.pager = p
	a.mu.Unlock()
	go a.watch(p)
	return nil
}

// watch follows a pager's events until it or the client is gone, and puts
// another in its place if it died before its time.
func (a *arrival) watch(p *pager.Client) {
	for ev := range p.Events() {
		a.mu.Lock()
		if ev.Stats.PagesTotal != 0 {
			a.stats = ev.Stats
		}
		a.mu.Unlock()
		switch ev.Kind {
		case pager.LaneLost:
			a.log.Warn("page lane lost", "lane", ev.Lane.Kind, "index", ev.Lane.Index, "err", ev.Err)
		case pager.Exited:
			a.mu.Lock()
			gone := a.done || a.pager != p
			a.mu.Unlock()
			if gone {
				return
			}
			a.log.Warn("pager has died, another takes over", "err", ev.Err)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			if err := a.reachPager(ctx); err != nil {
				a.log.Error("no pager could take over; the process waits at its next missing page", "err", err)
			}
			cancel()
			return
		}
	}
}

// current is the pager of the moment.
func (a *arrival) current() *pager.Client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pager
}

// retry runs f on the pager, and again on the one that takes over when it dies.
func (a *arrival) retry(ctx context.Context, f func(p *pager.Client) error) error {
	for {
		p := a.current()
		err := f(p)
		if !errors.Is(err, pager.ErrGone) {
			return err
		}
		deadline := time.NewTimer(30 * time.Second)
		for a.current() == p {
			select {
			case <-ctx.Done():
				deadline.Stop()
				return ctx.Err()
			case <-deadline.C:
				return err
			case <-time.After(10 * time.Millisecond):
			}
		}
		deadline.Stop()
		// Whoever takes over fetches nothing until it is told to.
		if err := a.current().Fetch(ctx); err != nil && !errors.Is(err, pager.ErrGone) {
			return err
		}
	}
}

func (a *arrival) LaneKey() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.key
}

func (a *arrival) Rebuild(ctx context.Context, st migrate.State, all bool) error {
	img, err := image.Decode(st.Image)
	if err != nil {
		return err
	}
	mem := make([]image.Memory, len(st.Memory))
	for i, m := range st.Memory {
		mem[i] = image.Memory{Space: m.Space, Lazy: m.Lazy, Eager: m.Eager, Hot: m.Hot}
	}
	if err := a.skeleton.Rebuild(ctx, img, mem, a); err != nil {
		return err
	}
	if all {
		if err := a.Fetch(ctx); err != nil {
			return err
		}
		if err := a.retry(ctx, func(p *pager.Client) error { return p.WaitResident(ctx) }); err != nil {
			return err
		}
	}
	return a.skeleton.Park(ctx)
}

// Adopt and WaitEager make an arrival the trap of its skeleton.
func (a *arrival) Adopt(ctx context.Context, ad restore.Adoption) error {
	defer ad.UFFD.Close()
	defer ad.Mem.Close()
	pa := pager.Adoption{
		Space: ad.Space, PID: ad.PID, UFFD: ad.UFFD, Mem: ad.Mem,
		Lazy: ad.Memory.Lazy, Eager: ad.Memory.Eager, Hot: ad.Memory.Hot,
	}
	for _, r := range ad.Regions {
		kind := pager.Trapped
		if r.Kind == restore.RegionWrite {
			kind = pager.Written
		}
		pa.Regions = append(pa.Regions, pager.Region{Range: r.Range, Kind: kind, Shared: r.Shared})
	}
	p := a.current()
	if err := p.Adopt(ctx, pa); err != nil {
		return err
	}
	return p.Fetch(ctx)
}

func (a *arrival) WaitEager(ctx context.Context) error {
	return a.retry(ctx, func(p *pager.Client) error { return p.WaitEager(ctx) })
}

func (a *arrival) Release(ctx context.Context) (int, error) {
	if err := a.skeleton.Release(ctx); err != nil {
		return 0, err
	}
	return a.skeleton.PID(), nil
}

func (a *arrival) Fetch(ctx context.Context) error {
	return a.retry(ctx, func(p *pager.Client) error { return p.Fetch(ctx) })
}

func (a *arrival) Resident(ctx context.Context) error {
	p := a.current()
	if p == nil { // an earlier daemon saw to it
		return nil
	}
	if err := a.retry(ctx, func(p *pager.Client) error { return p.WaitResident(ctx) }); err != nil {
		return err
	}
	p = a.current()
	st, serr := p.Stats(ctx)
	a.mu.Lock()
	if serr == nil {
		a.stats = st
	}
	a.record.Resident, a.done = true, true
	err := a.saveRecord()
	a.mu.Unlock()
	if err != nil {
		return err
	}
	if err := p.Finish(ctx); err != nil && !errors.Is(err, pager.ErrGone) {
		return err
	}
	return nil
}

// Finish removes what Adopt would find.
func (a *arrival) Finish(context.Context) error {
	a.host.forget(a.id)
	return os.RemoveAll(a.dir)
}

func (a *arrival) Abort(ctx context.Context) error {
	a.mu.Lock()
	a.done = true
	p := a.pager
	a.mu.Unlock()
	a.host.forget(a.id)
	var err error
	// First the process: without its pager it would read zeros.
	if a.skeleton != nil {
		if err = a.skeleton.Abort(ctx); err != nil {
			return err
		}
	}
	if p != nil {
		err = p.Abort(ctx)
	}
	return errors.Join(err, os.RemoveAll(a.dir))
}

func (a *arrival) NewEpoch(ctx context.Context) (uint32, []byte, error) {
	a.mu.Lock()
	a.record.Epoch++
	epoch := a.record.Epoch
	a.key = newLaneKey()
	key := a.key
	err := a.saveRecord()
	a.mu.Unlock()
	if err != nil {
		return 0, nil, err
	}
	return epoch, key, a.retry(ctx, func(p *pager.Client) error { return p.NewEpoch(ctx, epoch) })
}

func (a *arrival) Stats() migrate.ArrivalStats {
	a.mu.Lock()
	p, st := a.pager, a.stats
	done := a.done
	a.mu.Unlock()
	if p != nil && !done {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if fresh, err := p.Stats(ctx); err == nil {
			st = fresh
		}
	}
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	return migrate.ArrivalStats{
		PagesTotal: st.PagesTotal, PagesResident: st.PagesResident, PagesZero: st.PagesZero,
		PagesFaulted: st.PagesFaulted, PagesDouble: st.PagesDouble, BytesWire: st.BytesWire,
		FaultP50us: us(st.FaultP50), FaultP99us: us(st.FaultP99), FaultMaxus: us(st.FaultMax),
	}
}

func (a *arrival) Close() error {
	a.host.forget(a.id)
	return a.letGo()
}

// letGo closes handles; process and pager stay.
func (a *arrival) letGo() error {
	a.mu.Lock()
	a.done = true
	p := a.pager
	a.mu.Unlock()
	var err error
	if p != nil {
		err = p.Close()
	}
	return err
}
