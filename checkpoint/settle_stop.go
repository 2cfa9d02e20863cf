package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// settlePatience is how long threads may take to stop, at first: one that waits for
// the child of a vfork or for a disk does not, and all others stand still meanwhile.
const (
	settlePatience     = 3 * time.Millisecond
	settlePatienceMost = 50 * time.Millisecond
)

// errNoStop says that not all threads stopped in time.
var errNoStop = errors.New("its threads do not all stop in time")

// still calls f, on the tracer's thread, while every thread stands still, or only the
// main one, and returns how long they did. f gets their ids, the leader first.
func (s *Session) still(ctx context.Context, main bool, f func(tids []int) error) (took time.Duration, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return 0, err
	}
	if s.held || len(s.threads) > 0 {
		return 0, fmt.Errorf("%w: frozen already", ErrState)
	}
	if s.waits == nil && sys.WideNumbers() {
		s.waits = map[int]wait{}
	}
	if err := s.openMemory(); err != nil {
		return 0, err
	}
	if s.tr == nil {
		s.tr = proc.NewTracer()
	}
	var loose error
	s.tr.Do(func() {
		began := time.Now()
		if err = s.seizeAll(ctx, main); err == nil {
			tids := make([]int, len(s.threads))
			for i, th := range s.threads {
				tids[i] = th.tid
			}
			err = f(tids)
		}
		loose = s.detachAll()
		took = time.Since(began)
	})
	if loose != nil { // see letGo
		s.tr.Close()
		s.tr = nil
	}
	return took, err
}

// settleArena is enough for the calls of one stop, in bytes: mostRuns and mostPieces
// see to that.
const (
	settleArena = 384 << 10
	settleNote  = 16 << 10
)

// stop calls f while the process stands still, with a target that batches can be
// made for, and waits before it until the process has run for long enough.
func (t *Settler) stop(ctx context.Context, f func(tids []int) error) error {
	return t.stopSome(ctx, false, f)
}

// stopSome is stop, or with main one of the main thread only, for what concerns nothing
// that the program knows of.
func (t *Settler) stopSome(ctx context.Context, main bool, f func(tids []int) error) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Until(t.rest)):
	}
	within, cancel := context.WithTimeout(ctx, t.patience)
	defer cancel()
	var inside time.Duration
	stopped := false
	took, err := t.s.still(within, main, func(tids []int) error {
		stopped = true
		if t.mem != nil {
			// Addresses mean nothing in another program.
			if err := t.mem.Alive(); err != nil {
				return err
			}
		}
		if err := t.ready(tids, main); err != nil {
			return err
		}
		began := time.Now()
		err := f(tids)
		inside = time.Since(began)
		return errors.Join(err, t.leave())
	})
	t.rest = time.Now().Add(time.Duration(float64(took) * t.cfg.Run))
	if !stopped {
		t.rep.Failed++
		t.fails++
		if ctx.Err() == nil && (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrStuck)) {
			t.patience = min(2*t.patience, t.cfg.Patience)
			return fmt.Errorf("%w: %w", errNoStop, err)
		}
		return err
	}
	t.fails = 0
	if main {
		t.rep.Halts = append(t.rep.Halts, took)
		return err
	}
	t.rep.Stops = append(t.rep.Stops, took)
	t.cost.stopped(took - inside + t.held)
	t.held = 0
	return err
}

// ready makes the target good for this stop. With main, where other threads run, that is
// not possible if it is lost.
func (t *Settler) ready(tids []int, main bool) error {
	if t.target != nil && t.tr != t.s.tr {
		// The tracer had to end; what it left is taken away like a dead one's.
		t.left = append(t.left, t.target.Areas()[0])
		_ = t.target.Drop()
		t.target = nil
	}
	if t.target != nil {
		err := t.target.Again(tids[0])
		if err == nil {
			return nil
		}
		if main || !errors.Is(err, inject.ErrLost) {
			return err
		}
		// Unmapped where it is too small, let be where something else is there.
		if err := t.dismantle(tids[0]); err != nil {
			t.cfg.Log.Debug("the area for injected calls was lost", "pid", t.s.pid, "error", err)
		}
	}
	if main {
		return inject.ErrLost
	}
	target, err := inject.BootstrapKept(t.s.tr, t.s.pid, tids[0],
		inject.Room{Threads: len(tids) + len(tids)/2 + 8, Arena: settleArena, Note: settleNote, Maps: t.maps})
	if err != nil {
		return err
	}
	t.target, t.tr = target, t.s.tr
	return nil
}

// leave ends what was done in a stop.
func (t *Settler) leave() error {
	if t.target == nil {
		return nil
	}
	deliver, sig, err := t.target.Rest()
	t.pass(deliver, sig)
	return err
}

func (t *Settler) pass(deliver map[int]unix.Signal, sig unix.Signal) {
	for _, th := range t.s.threads {
		if d := deliver[th.tid]; d != 0 {
			th.deliver = d
		}
	}
	if sig != 0 {
		t.s.stopSig = sig
	}
}

// dismantle takes the target out of the process.
func (t *Settler) dismantle(tid int) error {
	target := t.target
	t.target = nil
	if err := target.Again(tid); err != nil && !target.Intact() {
		return errors.Join(err, target.Drop())
	}
	err := target.Close(tid)
	deliver := map[int]unix.Signal{tid: target.Deliver(tid)}
	t.pass(deliver, target.Stopped())
	return err
}

// forsaken finds what a dead settler has left in the process: areas for injected
// calls, and the memory that its note tells of.
func (t *Settler) forsaken() {
	t.left, t.lost = nil, page.Set{}
	if t.target != nil && t.tr != t.s.tr {
		_ = t.target.Drop()
		t.target = nil
	}
	for _, k := range inject.Left(t.maps, t.mem) {
		if t.target != nil && t.target.Areas()[0] == k.Range {
			continue
		}
		t.left = append(t.left, k.Range)
		for _, r := range noted(k.Note) {
			for _, s := range t.shadowsIn(r) {
				t.lost.Add(s)
			}
		}
	}
}

// errInside says that a thread is on its way out of what a dead settler has left.
var errInside = errors.New("a thread executes what another left in the process")

// clearLeft unmaps what forsaken has found: the memory first, for it is the area that
// tells of it. A batch of the dead one may still be under way, and map more: only when
// no thread is in an area is it known what there is.
func (t *Settler) clearLeft(ctx context.Context) error {
	if len(t.left) == 0 {
		return nil
	}
	if err := t.again(ctx, t.outside); err != nil {
		return err
	}
	if err := t.flags(); err != nil {
		return err
	}
	t.forsaken()
	if err := t.sweep(ctx, &t.lost); err != nil {
		return err
	}
	return t.again(ctx, t.clear)
}

// clear unmaps the areas that were found.
func (t *Settler) clear(tids []int) error {
	if len(t.left) == 0 {
		return nil
	}
	if err := t.outside(tids); err != nil {
		return err
	}
	b := t.target.Batch()
	for _, r := range t.left {
		b.Call(unix.SYS_MUNMAP, uint64(r.Start), r.Bytes())
	}
	t.left = nil
	return b.Run(tids[0])
}

// outside fails with errInside where a thread is in an area that forsaken has found.
func (t *Settler) outside(tids []int) error {
	for _, r := range t.left {
		for _, tid := range tids {
			if in, err := t.target.Inside(tid, r); err != nil {
				return err
			} else if in {
				return errInside
			}
		}
	}
	return nil
}

// addrs of a mapping's part.
func from(r page.Range, at page.Addr) page.Range {
	return page.Range{Start: at, End: at + page.Addr(r.Bytes())}
}
