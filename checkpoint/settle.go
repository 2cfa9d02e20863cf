package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// Backing is what stands behind a part of a private mapping of the device. With none
// of Shadow, Path and Read that is zeros.
type Backing struct {
	// Bytes is for how much, from the beginning of the part that was asked about on,
	// this holds; 0 for all of it.
	Bytes uint64
	// Later says that it cannot be settled now: pages are still missing.
	Later bool
	// Shadow is private anonymous memory of the same process that has the content
	// and that nobody uses, except where the program has written to the mapping. It
	// becomes the program's memory, and is best congruent to the mapping's address
	// modulo 2 MiB. Its place stays mapped, see Release.
	Shadow page.Addr
	// Path is a file of this host with the same content, which then is mapped in the
	// device's place: the process must be able to open it by that name, else Read
	// serves.
	Path string
	// Read gives the content that the mapping has where the program has not written,
	// from an offset of its file on; beyond the end of the file zeros. It is called
	// while the process runs.
	Read func(ctx context.Context, offset uint64, buf []byte) error
}

// SettlePart is a part of a mapping that is about to be replaced in a stop.
type SettlePart struct {
	page.Range           // where the program has it
	Ino        uint64    // of its file
	Offset     uint64    // of its beginning, in the file
	Shadow     page.Addr // what takes its place
	Aside      page.Addr // where it is moved to, and unmapped later; 0: it is unmapped at once
}

// SettleConfig says what is settled and how.
type SettleConfig struct {
	// Dev is the device of the mappings to be replaced, as makedev gives it.
	Dev uint64
	// Backing says what stands behind m, a part of such a mapping. Required.
	Backing func(m proc.Mapping) Backing
	// Stopped, if set, is called while the process stands still, after all its
	// threads have stopped and before anything is read: the caller unregisters the
	// shadows of the parts from its userfaultfd, if it has one. zeroed are
	// all addresses in the shadows at which the mapping shows zeros where the program has
	// not written: what it has given up (MADV_DONTNEED), and what never had content. There
	// may be something in the shadow nevertheless, that it had written when it was copied
	// there. The session is locked meanwhile.
	Stopped func(ctx context.Context, parts []SettlePart) (zeroed page.Set, err error)
	// Certain, if set, is called in the same stop with parts of which Stopped was told, at
	// the moment from which on they will be replaced whatever becomes of this program: only
	// then may the mappings themselves be unregistered. Until then the process may find
	// itself running with them as they are.
	Certain func(ctx context.Context, parts []SettlePart) error
	// Kept, if set, is called in the same stop with parts that Stopped was told of and
	// that have not been replaced.
	Kept func(parts []SettlePart)
	// Early, if set, allows to copy what the program has written of a part over its
	// shadow while it runs, of mappings that are registered for WP_ASYNC. It is called
	// while the process stands still, once or more for a part, before each such copying.
	// From then on the shadow is not what has arrived: the caller unregisters it, for a
	// write to it from outside must not wait, and nobody else may need it. That can only
	// be a process that sees the same file and exists by now: one that is forked later
	// has all that is copied as its own. So where there is such a process it fails, and
	// what is written is copied in stops, as it is where Early is not set.
	Early func(ctx context.Context, parts []SettlePart) error
	// Moves says that Certain leaves mappings registered that have SettlePart.Aside, and
	// that what the userfaultfd tells of their move there, and of their end, is read
	// meanwhile: the calls wait for that. To unregister memory for write protection
	// takes the kernel 0.11 us for each page, so a stop replaces much more then.
	Moves bool
	// Replaced, if set, is called while the process runs, with parts that have been
	// replaced and of which nothing is mapped any more.
	Replaced func(parts []SettlePart)
	// Limit is how long the process may stand still at once; 0 means 2 ms. What one
	// stop costs beyond our control (hundreds of threads) can exceed it.
	Limit time.Duration
	// Patience is how long the threads may take to stop, while those that have stand
	// still; 0 means up to 50 ms. Tries is how often in a row that may fail; 0 means 100.
	Patience time.Duration
	Tries    int
	// Run is how long the process runs between two stops, as a multiple of the time
	// that it stood still; 0 means 1.
	Run float64
	// Ahead is how many bytes Read fills before they are settled, and how many may lie
	// aside before they are unmapped; 0 means 16 MiB.
	Ahead uint64
	// Slice is how long a mapping may be, in bytes, to be replaced only when nothing of
	// it is Later; 0 means 64 MiB. Of a longer one aligned parts of that length are
	// replaced when they are complete, so that its memory is not there twice. Until the
	// last is, mremap(2) across it fails with EFAULT on kernels before 6.17.
	Slice uint64
	Log   *slog.Logger // nil discards
}

func (c *SettleConfig) defaults() {
	if c.Limit == 0 {
		c.Limit = 2 * time.Millisecond
	}
	if c.Patience == 0 {
		c.Patience = settlePatienceMost
	}
	if c.Tries == 0 {
		c.Tries = settleFails
	}
	if c.Run == 0 {
		c.Run = 1
	}
	if c.Ahead == 0 {
		c.Ahead = 16 << 20
	}
	if c.Slice == 0 {
		c.Slice = 64 << 20
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// Skipped is a mapping that was left as it is.
type Skipped struct {
	proc.Mapping
	Why error
}

// SettleReport is what Settle has done.
type SettleReport struct {
	Stops    []time.Duration // how long the process stood still, from before the first thread was stopped to the last one let go
	Halts    []time.Duration // how long its main thread alone did, to unmap what is not needed any more
	Settled  uint64          // bytes of mappings that were replaced
	Copied   uint64          // bytes of pages that the program had written, copied in stops
	Early    uint64          // bytes of such that were copied while it ran
	Filled   uint64          // bytes that Read gave and that were not zero
	Later    uint64          // bytes that Backing put off
	Retried  int             // parts that had changed when the process stood still
	Failed   int             // stops that did not come about
	Skipped  []Skipped       // what cannot be settled
	Duration time.Duration
}

// Quantile is the length of the stop of that rank, from 0 to 1 for the longest.
func (r *SettleReport) Quantile(q float64) time.Duration {
	if len(r.Stops) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(r.Stops))
	return s[min(len(s)-1, int(q*float64(len(s))))]
}

func (r *SettleReport) String() string {
	return fmt.Sprintf("%d stops, median %v, p99 %v, longest %v, and %d of the main thread, longest %v; %d bytes settled, %d copied and %d before, %d filled, %d put off, %d skipped, in %v",
		len(r.Stops), r.Quantile(0.5), r.Quantile(0.99), r.Quantile(1), len(r.Halts), slices.Max(append(r.Halts, 0)),
		r.Settled, r.Copied, r.Early, r.Filled, r.Later, len(r.Skipped), r.Duration)
}

// Settler replaces a running process's private mappings of files of one device by
// plain anonymous memory, in stops that are short. Each part of a mapping is
// replaced by one mremap(2) of memory that has its content already. Whenever this
// program dies, each part is either as it was or replaced, and another Settler goes
// on from there; what a dead one has left in the process it takes away.
//
// A settler keeps an area for injected calls in the process until Close. Between
// two stops that is memory like any other, that nothing uses and children do not
// inherit.
//
// Not for concurrent use. Nothing else may stop the process meanwhile.
type Settler struct {
	s   *Session
	cfg SettleConfig

	target *inject.Target // nil where none is in the process
	tr     *proc.Tracer   // of target

	rep      SettleReport
	cost     settleCost
	patience time.Duration
	fails    int           // stops in a row that did not come about
	rest     time.Time     // before which the process runs
	held     time.Duration // in this stop: what holding the other threads cost

	// taken are addresses of the caller's shadows that have moved away.
	taken page.Set
	// touched are shadows that got their anon_vma before a part of them moved away.
	touched page.Set
	// Of ours in the process, beside the area: places for mappings to be moved to,
	// mappings that were, and shadows that were made.
	asides, old, made page.Set
	// bad are paths that the process cannot map, and why.
	bad map[string]error

	// space is the address space that all of this is about.
	space *proc.Memory

	// Of one round:
	mem   *proc.Memory
	pm    *proc.Pagemap
	look  *proc.Lookup
	maps  []proc.Mapping
	good  time.Time // until when the flags in maps are believed
	buf   []byte
	asked map[proc.Piece]Backing
	done  []SettlePart // that Replaced has not been told of
	// refused: Early has failed, and is not asked again.
	refused bool
	next    page.Addr // where a mapping can be moved to
	// What a dead settler has left: areas for injected calls, and other memory.
	left []page.Range
	lost page.Set
}

// NewSettler prepares to settle the process of s; it changes nothing yet.
func NewSettler(s *Session, cfg SettleConfig) (*Settler, error) {
	if cfg.Backing == nil {
		return nil, &Error{"settle", s.pid, errors.New("nothing says what stands behind its mappings")}
	}
	cfg.defaults()
	return &Settler{s: s, cfg: cfg, cost: settleCost{slow: 2, told: costTold}, patience: min(settlePatience, cfg.Patience), bad: map[string]error{}}, nil
}

// settleTries is how many rounds in a row may settle nothing.
const settleTries = 4

// Settle replaces what of within is mapped from the device now, all where within is
// nil, and returns when nothing is left but what is reported as skipped or put off.
// The report covers this call, also where it fails.
func (t *Settler) Settle(ctx context.Context, within []page.Range) (rep SettleReport, err error) {
	t.rep, t.refused = SettleReport{}, false
	began := time.Now()
	for idle := 0; ; {
		before := t.rep.Settled
		t.rep.Skipped, t.rep.Later = nil, 0
		var open int
		open, err = t.round(ctx, within)
		if errors.Is(err, proc.ErrGone) && ctx.Err() == nil && t.s.Alive() == nil {
			err, open = nil, 1 // it has called exec
		}
		if err != nil || open == 0 {
			break
		}
		if idle++; t.rep.Settled > before {
			idle = 0
		}
		if idle >= settleTries {
			break
		}
	}
	t.rep.Duration = time.Since(began)
	if err != nil {
		err = &Error{"settle", t.s.pid, err}
	}
	return t.rep, err
}

// Left are the mappings of the device that the process has now.
func (t *Settler) Left() ([]proc.Mapping, error) {
	maps, err := proc.ReadMaps(t.s.pid)
	if err != nil {
		return nil, &Error{"read the mappings of", t.s.pid, err}
	}
	return slices.DeleteFunc(maps, func(m proc.Mapping) bool { return m.Dev != t.cfg.Dev || m.Ino == 0 }), nil
}

// Close takes what is ours out of the process, which stops once more for it.
// Idempotent.
func (t *Settler) Close() error {
	if t.tr == nil {
		return t.forget() // it was never touched
	}
	defer t.forget()
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	err := t.open()
	if err == nil {
		defer t.shut()
		if t.forsaken(); len(t.left) > 0 {
			if err = t.flags(); err == nil {
				t.forsaken()
			}
		}
	}
	if err == nil {
		for tries := 0; tries < 10; tries++ {
			if err = errors.Join(t.clearLeft(ctx), t.sweep(ctx, &t.made), t.tidy(ctx)); err == nil {
				err = t.again(ctx, func(tids []int) error {
					// An area of our own, where the tracer had to end since.
					if err := t.clear(tids); err != nil {
						return err
					}
					return t.dismantle(tids[0])
				})
			}
			if !errors.Is(err, errInside) {
				break
			}
		}
	}
	if t.target != nil {
		_ = t.target.Drop()
	}
	t.target, t.tr = nil, nil
	if err != nil && !errors.Is(err, proc.ErrGone) {
		return &Error{"end settling", t.s.pid, err}
	}
	return nil
}

// forget drops what is known of an address space.
func (t *Settler) forget() (err error) {
	for _, s := range []*page.Set{&t.taken, &t.touched, &t.asides, &t.old, &t.made} {
		*s = page.Set{}
	}
	t.done = nil
	if t.space != nil {
		err = t.space.Close()
	}
	t.space = nil
	return err
}
