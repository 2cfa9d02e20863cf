package appliance

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/restore"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/transport"
)

// arrivalRecord is what a restarted daemon must know of an arrival. It lies in
// the arrival's run directory, which does not survive a reboot, as the process
// itself does not.
type arrivalRecord struct {
	Epoch      uint32 `json:"epoch"`
	PlainPages bool   `json:"plain_pages"`
	Lanes      int    `json:"lanes"`
	// Released: the process was let run, as PID. That it is not there any more
	// then means that it has ended.
	Released bool `json:"released"`
	PID      int  `json:"pid"`
	// Resident: every page has arrived and the pager was told to end.
	Resident bool `json:"resident"`
	// Gone: the source's copy ended before all pages were here, and what is
	// missing is poisoned. Resident then says only that the pager was told to end.
	Gone bool `json:"gone,omitempty"`
	// Trap is how what has not arrived is trapped.
	Trap string `json:"trap,omitempty"`
	// Keep: what shows its memory stays when every page is here, until Unkeep.
	Keep bool `json:"keep,omitempty"`
	// Free: the pager has let go of its memory, and only shows the source's.
	Free bool `json:"free,omitempty"`
	// Lost: nobody kept its memory, and it was ended.
	Lost bool `json:"lost"`
}

// arrival is one migration on its way in. The daemon's goroutines share it.
type arrival struct {
	id   transport.MigrationID
	host *host
	dir  string // run directory: the pager's socket, the record
	log  *slog.Logger

	// pagerGroup and keeperGroup are the cgroups of these two: the end of the
	// daemon's service must not be theirs.
	pagerGroup, keeperGroup string

	// all: it does not run before every page is here (mode stop). Not known of an
	// arrival that was adopted.
	all bool

	skeleton *restore.Skeleton           // nil where it has ended by itself
	image    atomic.Pointer[image.Image] // from Rebuild on
	showing  showing                     // likewise
	lacked   []int                       // files that it maps from there: known when Rebuild has looked

	// revival is held by whoever puts another pager in the place of a dead one;
	// taken before mu.
	revival sync.Mutex
	said    string // by the last that died; under revival

	// unkept is closed when nothing is to be kept any more. Made with the arrival.
	unkept chan struct{}

	mu    sync.Mutex
	pager *pager.Client // nil where none is needed any more
	// another: it has taken over from one that died.
	another bool
	record  arrivalRecord
	key     []byte
	stats   pager.Stats // the last that was seen
	done    bool        // aborted, or let go of
	noShow  error       // why it is not shown
	release func()      // see path; nil where nothing is to be let go of
}

// headStart is how long a process that was just released has lanes and processors
// for what it needs to answer its first requests. 4 GiB take 1 % longer for it.
const headStart = 30 * time.Millisecond

func newLaneKey() []byte {
	k := make([]byte, 32)
	rand.Read(k) // never fails
	return k
}

func (a *arrival) pagerConfig() pager.Config {
	c := pager.Config{
		Command: a.host.opts.Pager, ID: a.id, Dir: a.dir,
		Window: int(a.host.opts.WindowBytes), BulkLanes: a.record.Lanes,
		Cgroup: a.pagerGroup, KeeperCgroup: a.keeperGroup, IdleSleep: a.host.opts.IdleSleep, ShowDir: a.host.showDir(a.id),
	}
	if !a.all {
		c.HeadStart = headStart
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

func (a *arrival) LaneKey() []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.key
}

func (a *arrival) Rebuild(ctx context.Context, st migrate.State, all bool) error {
	begin := time.Now()
	img, err := image.Decode(st.Image)
	if err != nil {
		return err
	}
	var rest restore.Rest
	if st.Rest != nil {
		rest = func(ctx context.Context) ([]image.Memory, error) {
			mem, err := st.Rest(ctx)
			return imageMemory(mem), err
		}
	}
	decoded := time.Now()
	shown, err := a.showBeside(ctx, img)
	if err != nil {
		return err
	}
	defer shown() // whatever comes: nobody else knows how far it is
	defer a.abandonFiles(ctx)()
	if err := a.skeleton.RebuildWith(ctx, img, imageMemory(st.Memory), rest, trap{a, all}); err != nil {
		return a.lacks(err)
	}
	rebuilt := time.Now()
	if all {
		if err := a.retry(ctx, func(p *pager.Client) error { return p.WaitResident(ctx) }); err != nil {
			return err
		}
		if err := a.hold(ctx, img); err != nil {
			return err
		}
	}
	filled := time.Now()
	err = a.skeleton.Park(ctx)
	a.log.Debug("rebuilt", "decode", decoded.Sub(begin), "rebuild", rebuilt.Sub(decoded), "pages", filled.Sub(rebuilt),
		"park", time.Since(filled))
	return err
}

func imageMemory(in []migrate.Memory) (out []image.Memory) {
	for _, m := range in {
		out = append(out, image.Memory{Space: m.Space, Lazy: m.Lazy, Eager: m.Eager, Hot: m.Hot, Guards: m.Guards, Dirty: m.Dirty})
	}
	return out
}

// trap is the pager as the skeleton sees it.
type trap struct {
	*arrival
	all bool // fetch everything at once: nothing runs before it is there
}

func (a trap) Adopt(ctx context.Context, ad restore.Adoption) error {
	defer ad.Close()
	pa := pagerAdoption(ad)
	pa.Group, pa.Shown = a.skeleton.Cgroup(), len(a.lacked) > 0
	begin := time.Now()
	err := a.current().Adopt(ctx, pa)
	a.log.Debug("memory adopted", "regions", len(pa.Regions), "took", time.Since(begin))
	if err == nil && a.all {
		err = a.Fetch(ctx)
	}
	return err
}

func (a trap) WaitEager(ctx context.Context) error {
	begin := time.Now()
	defer func() { a.log.Debug("eager pages in place", "waited", time.Since(begin)) }()
	return a.retry(ctx, func(p *pager.Client) error { return p.WaitEager(ctx) })
}

func (a *arrival) Release(ctx context.Context) (int, error) {
	if a.skeleton == nil {
		return a.record.PID, nil
	}
	if a.lost() {
		return 0, errLost
	}
	if err := a.skeleton.Release(ctx); err != nil {
		return 0, gone(err)
	}
	pid := a.skeleton.PID()
	a.mu.Lock()
	a.record.Released, a.record.PID = true, pid
	if err := a.saveRecord(); err != nil {
		// A daemon that comes back to an ended process will think it lost.
		a.log.Warn("release not noted", "err", err)
	}
	a.mu.Unlock()
	if a.lost() { // in this moment
		return 0, errors.Join(errLost, a.end(ctx))
	}
	return pid, nil
}

func (a *arrival) lost() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.record.Lost
}

func (a *arrival) Fetch(ctx context.Context) error {
	return a.retry(ctx, func(p *pager.Client) error { return p.Fetch(ctx) })
}

func (a *arrival) Resident(ctx context.Context) error {
	if a.gone() { // an earlier daemon may have got no further than to note it
		if err := a.poison(ctx); err != nil {
			return a.endPoisoned(ctx, err)
		}
	}
	p := a.current()
	if p == nil { // an earlier daemon saw to it
		return a.sound()
	}
	if err := a.arrived(ctx); err != nil {
		return err
	}
	if err := a.keep(ctx); err != nil {
		return err
	}
	var st pager.Stats
	serr := error(pager.ErrGone)
	if p = a.current(); p != nil {
		st, serr = p.Stats(ctx)
	}
	if serr == nil && st.FilesLost && !a.gone() {
		a.filesGone(errors.New("the process, or what it has forked, was refused pages of them"))
	}
	a.mu.Lock()
	if serr == nil && !a.record.Gone {
		a.stats = st
	}
	a.record.Resident = true
	err := a.saveRecord()
	a.mu.Unlock()
	if err != nil {
		return err
	}
	// One that dies on the way is replaced once more: the keeper would hold
	// traps that nobody answers, and the process wait for ever.
	if err := a.retry(ctx, func(p *pager.Client) error { return p.Finish(ctx) }); err != nil {
		return err
	}
	a.mu.Lock()
	a.pager = nil
	a.mu.Unlock()
	a.leavePath()
	a.clearGroups(ctx)
	return a.sound()
}

// arrived returns when every page is here and the process has memory of its own.
func (a *arrival) arrived(ctx context.Context) error {
	waiting, cancel := context.WithCancel(ctx)
	all, done := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(done)
		all <- a.retry(waiting, func(p *pager.Client) error { return p.WaitResident(waiting) })
	}()
	defer func() {
		cancel()
		<-done
	}()
	return a.settle(ctx, all)
}

// Finish removes what Adopt would find.
func (a *arrival) Finish(ctx context.Context) error {
	a.host.forget(a.id)
	sweep(a.log)
	a.clearGroups(ctx)
	a.keepNothing()
	return os.RemoveAll(a.dir)
}

func (a *arrival) Abort(ctx context.Context) error {
	a.mu.Lock()
	a.done = true
	a.mu.Unlock()
	a.host.forget(a.id)
	// First the process, also one that runs (migrate says when): without its
	// pager it would read zeros.
	if a.skeleton != nil {
		if err := a.end(ctx); err != nil {
			return err
		}
	}
	a.revival.Lock() // or a pager that takes over just now would stay
	defer a.revival.Unlock()
	var err error
	if p := a.current(); p != nil {
		err = p.Abort(ctx)
	}
	if err = errors.Join(err, pager.Abandoned(a.dir), removePagerGroups(ctx, a.id)); err != nil {
		return err
	}
	a.leavePath()
	return os.RemoveAll(a.dir)
}

// NewEpoch is 0 where no page is missing any more, and no lanes are needed.
func (a *arrival) NewEpoch(ctx context.Context) (uint32, []byte, error) {
	a.mu.Lock()
	if a.record.Resident || a.record.Gone {
		a.mu.Unlock()
		return 0, nil, nil
	}
	a.record.Epoch++
	epoch := a.record.Epoch
	a.key = newLaneKey()
	key := a.key
	err := a.saveRecord()
	a.mu.Unlock()
	if err != nil {
		return 0, nil, err
	}
	err = a.retry(ctx, func(p *pager.Client) error { return p.NewEpoch(ctx, epoch) })
	if a.complete() { // meanwhile
		return 0, nil, nil
	}
	return epoch, key, err
}

// Stats is what the pager said last, about ten times a second: it is asked for
// during the downtime and must not wait.
func (a *arrival) Stats() migrate.ArrivalStats {
	a.mu.Lock()
	st := a.stats
	a.mu.Unlock()
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	return migrate.ArrivalStats{
		PagesTotal: st.PagesTotal, PagesResident: st.PagesResident, PagesZero: st.PagesZero,
		PagesFaulted: st.PagesFaulted, PagesDouble: st.PagesDouble, BytesWire: st.BytesWire, PagesLanded: st.PagesLanded, PagesOneSided: st.PagesOneSided,
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
