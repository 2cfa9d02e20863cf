package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// The model: one process, two hosts whose daemons die and come back, a link
// that breaks, two disks. It knows the truth, and looks at it whenever it
// changes.

// copyState is one copy of the process, as the kernel has it.
type copyState int

const (
	copyNone    copyState = iota
	copyRunning           // executes
	copyTraced            // stopped by a tracer: runs on when that dies
	copyHeld              // in a frozen cgroup, whoever dies
	copyDead              // was killed
)

func (c copyState) String() string {
	return [...]string{"none", "running", "traced", "held", "dead"}[c]
}

type world struct {
	mu  sync.Mutex
	rng *rand.Rand

	// The truth.
	src        copyState
	srcRan     int // how often it began to run: a capture is of one of these
	dst        copyState
	dstOf      int // srcRan of the capture that it was built from
	dstRan     bool
	arrival    bool // skeleton, pager, run directory
	finished   bool // Finish was called
	epoch      uint32
	missing    int // pages that the destination's copy lacks
	mem        modelMem
	lanes      *fakeLanes
	overruled  bool // a person took the responsibility
	srcLost    bool // the source's copy was killed while pages were missing
	violations []string
	trace      []string

	disks map[Role]*disk
	lives map[Role]*life
	links []*link

	// What goes wrong.
	chaos   bool     // faults happen at random
	faults  int      // how many more
	baddisk bool     // the journals fail more often than anything else
	stuck   []string // operations that always fail
	plan    []planned
	planned bool           // one of them has happened
	seen    map[string]int // kill points
	mode    Mode
	auto    bool // the model of plan decides about rounds
	blocked bool // nothing can be dialled
	wipe    Role // whose journal is lost at a crash
	wiped   bool
	after   []string // points passed since the first planned fault
}

// planned is a fault at a kill point; those of a plan happen one after the other.
type planned struct {
	point string
	what  fault
}

type fault int

const (
	faultCrash fault = iota
	faultCut
	faultStall
	faults
)

func (f fault) String() string { return [...]string{"crash", "cut", "stall"}[f] }

// life is one run of a daemon, from its start to its end.
type life struct {
	w      *world
	role   Role
	dead   bool // guarded by w.mu
	ctx    context.Context
	cancel context.CancelFunc
	accept chan *fakeLane // of a destination that listens; guarded by w.mu
}

func newWorld(seed uint64, mode Mode) *world {
	return &world{
		rng: rand.New(rand.NewPCG(seed, 1)), src: copyRunning, mode: mode, seen: map[string]int{},
		disks: map[Role]*disk{RoleSource: newDisk(1), RoleDestination: newDisk(2)},
		lives: map[Role]*life{},
	}
}

func (w *world) logf(format string, args ...any) {
	w.trace = append(w.trace, fmt.Sprintf(format, args...))
	if len(w.trace) > maxTrace {
		panic("no end:\n" + strings.Join(w.trace[:500], "\n") + "\n...\n" + strings.Join(w.trace[maxTrace-500:], "\n"))
	}
}

// maxTrace is far more than happens in the longest run: a loop that virtual
// time lets spin is found, before it takes all memory.
const maxTrace = 100_000

func (w *world) violate(format string, args ...any) {
	v := fmt.Sprintf(format, args...)
	w.violations = append(w.violations, v)
	w.logf("VIOLATION: %s", v)
}

// setSrc and setDst change the truth. Caller holds w.mu.
func (w *world) setSrc(c copyState) {
	if w.src == c {
		return
	}
	w.logf("  source's copy: %v -> %v", w.src, c)
	if c == copyRunning {
		w.srcRan++
		if w.dst == copyRunning {
			w.violate("two owners: the source's copy runs again while the destination's does")
		}
		if w.dstRan && !w.overruled {
			w.violate("the source's copy runs again after the destination's has run")
		}
	}
	if c == copyDead && w.missing > 0 && !w.overruled {
		w.violate("the source's copy was killed while %d pages were missing", w.missing)
	}
	w.src = c
}

func (w *world) setDst(c copyState) {
	if w.dst == c {
		return
	}
	w.logf("  destination's copy: %v -> %v", w.dst, c)
	if c == copyRunning {
		w.dstRan = true
		if w.src == copyRunning || w.src == copyTraced {
			w.violate("two owners: the destination's copy runs while the source's is %v", w.src)
		}
		if w.dstOf != w.srcRan {
			w.violate("the destination's copy is of run %d, the source has run %d since", w.dstOf, w.srcRan)
		}
	}
	w.dst = c
}

// here ends the goroutine of a daemon that is dead. Caller does not hold w.mu.
func (l *life) here() {
	l.w.mu.Lock()
	dead := l.dead
	l.w.mu.Unlock()
	if dead {
		runtime.Goexit()
	}
}

// crash is kill -9 of the daemon.
func (l *life) crash() {
	w := l.w
	w.mu.Lock()
	if l.dead {
		w.mu.Unlock()
		return
	}
	l.dead = true
	w.logf("%s: killed", l.role)
	if l.role == RoleSource {
		if w.src == copyTraced {
			w.setSrc(copyRunning)
		}
		if w.lanes != nil {
			w.lanes.breakLocked()
		}
	}
	links := w.links
	w.links = nil
	w.mu.Unlock()
	for _, k := range links {
		k.end(l.role)
	}
	l.cancel()
}

func (w *world) breakLinks(stall bool) {
	w.mu.Lock()
	links := w.links
	if !stall {
		w.links = nil
	}
	w.mu.Unlock()
	for _, k := range links {
		if stall {
			k.stall()
		} else {
			k.cut()
		}
	}
}

// point is every kill point of both daemons.
func (l *life) point(name string) {
	l.here()
	w := l.w
	w.mu.Lock()
	w.seen[name]++
	w.logf("%s", name)
	if w.planned && !slices.Contains(w.after, name) {
		w.after = append(w.after, name)
	}
	what, hit := fault(0), false
	switch {
	case len(w.plan) > 0 && w.plan[0].point == name:
		what, hit = w.plan[0].what, true
		w.plan, w.planned = w.plan[1:], true
	case w.chaos && w.faults > 0 && w.rng.IntN(25) == 0:
		what, hit = fault(w.rng.IntN(int(faults))), true
		w.faults--
	}
	w.mu.Unlock()
	if !hit {
		return
	}
	switch what {
	case faultCrash:
		l.crash()
		runtime.Goexit()
	case faultCut, faultStall:
		w.mu.Lock()
		w.logf("link: %v", what)
		w.mu.Unlock()
		w.breakLinks(what == faultStall)
	}
}

var errInjected = errors.New("injected")

// trouble is a random failure of one operation. Caller holds w.mu.
func (w *world) trouble(what string) error {
	if slices.Contains(w.stuck, what) {
		return fmt.Errorf("%s: %w", what, errInjected)
	}
	odds := 40
	if w.baddisk && strings.Contains(what, "journal") {
		odds = 3
	}
	if w.chaos && w.faults > 0 && w.rng.IntN(odds) == 0 {
		w.faults--
		w.logf("  %s fails", what)
		return fmt.Errorf("%s: %w", what, errInjected)
	}
	return nil
}

// work takes virtual time.
func (l *life) work(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	l.here()
	return context.Cause(ctx)
}

// dump is all that happened. Caller does not hold w.mu.
func (w *world) dump() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.trace, "\n")
}
