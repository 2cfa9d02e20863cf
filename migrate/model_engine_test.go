package migrate

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/transport"
)

// fakeProcess is the process at the source.
type fakeProcess struct{ l *life }

func (p *fakeProcess) op(name string, f func(w *world) error) error {
	p.l.here()
	w := p.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble(name); err != nil {
		return err
	}
	if w.src == copyDead {
		return ErrGone
	}
	return f(w)
}

func (p *fakeProcess) Isolate(ctx context.Context) error {
	return p.op("isolate", func(*world) error { return nil })
}

func (p *fakeProcess) Freeze(ctx context.Context) (st State, err error) {
	err = p.op("freeze", func(w *world) error { w.setSrc(copyTraced); return nil })
	if err != nil {
		return State{}, err
	}
	if err := p.l.work(ctx, time.Millisecond); err != nil {
		_ = p.op("unfreeze", func(w *world) error { w.setSrc(copyRunning); return nil })
		return State{}, err
	}
	err = p.op("capture", func(w *world) error {
		st.Image = fmt.Appendf(nil, "%d", w.srcRan)
		st.Memory = []Memory{{Lazy: page.NewSet(page.Range{Start: 0x1000, End: 0x3000})}}
		st.Rest = func(ctx context.Context) (rest []Memory, err error) {
			if err := p.l.work(ctx, time.Millisecond); err != nil {
				return nil, err
			}
			rest = []Memory{{Lazy: page.NewSet(page.Range{Start: 0x3000, End: 0x5000})}}
			return rest, p.op("scan", func(w *world) error {
				if w.mem.tracked {
					rest[0].Dirty = w.takeWritten()
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		p.l.w.mu.Lock()
		p.l.w.setSrc(copyRunning)
		p.l.w.mu.Unlock()
	}
	return st, err
}

func (p *fakeProcess) Hold(ctx context.Context) error {
	return p.op("hold", func(w *world) error { w.setSrc(copyHeld); return nil })
}

func (p *fakeProcess) Held(ctx context.Context) (held bool, err error) {
	p.l.here()
	p.l.w.mu.Lock()
	defer p.l.w.mu.Unlock()
	if p.l.w.src == copyDead {
		return false, ErrGone
	}
	return p.l.w.src == copyHeld, nil
}

func (p *fakeProcess) Thaw(ctx context.Context) error {
	return p.op("thaw", func(w *world) error {
		w.setSrc(copyRunning)
		w.mem.tracked = false
		return nil
	})
}

func (p *fakeProcess) Kill(ctx context.Context) error {
	p.l.here()
	w := p.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble("kill"); err != nil {
		return err
	}
	if w.src == copyRunning {
		w.violate("a running copy was killed")
	}
	w.setSrc(copyDead)
	return nil
}

func (p *fakeProcess) ReadPages(page.Space, []page.Range, []byte) error { return nil }
func (p *fakeProcess) Close() error                                     { return nil }
func (p *fakeProcess) Describe() []byte                                 { return []byte("pid 42") }

// fakeLanes are the page lanes of one epoch.
type fakeLanes struct {
	l    *life
	lost chan error
	open bool
}

func (f *fakeLanes) Open(ctx context.Context, epoch uint32, key []byte, p Process) error {
	f.l.here()
	w := f.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble("lanes"); err != nil {
		return err
	}
	if epoch != w.epoch || string(key) != fmt.Sprint("key ", epoch) {
		return fmt.Errorf("lanes of epoch %d with key %q, it is epoch %d", epoch, key, w.epoch)
	}
	f.open, f.lost = true, make(chan error, 1)
	w.lanes = f
	return nil
}

// breakLocked loses them. Caller holds w.mu.
func (f *fakeLanes) breakLocked() {
	if f.open {
		f.open = false
		f.lost <- errors.New("reset")
	}
	if f.l.w.lanes == f {
		f.l.w.lanes = nil
	}
}

func (f *fakeLanes) Lost() <-chan error {
	f.l.w.mu.Lock()
	defer f.l.w.mu.Unlock()
	return f.lost
}

func (f *fakeLanes) BytesSent() uint64 { return 0 }
func (f *fakeLanes) Saved() Saved      { return Saved{} }

func (f *fakeLanes) Round(number uint32, again bool, send, gone *page.Set) {
	w := f.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mem.round, w.mem.announced = number, *send
}

func (f *fakeLanes) Close() error {
	f.l.here()
	w := f.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	f.open = false
	if w.lanes == f {
		w.lanes = nil
	}
	return nil
}

// fakeHost is the destination's engine. What it makes outlives the daemon.
type fakeHost struct{ l *life }

func (h *fakeHost) Prepare(ctx context.Context, id transport.MigrationID, o Offer) (Arrival, error) {
	h.l.here()
	w := h.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble("prepare"); err != nil {
		return nil, err
	}
	if w.arrival {
		w.violate("prepared twice")
	}
	w.arrival, w.epoch = true, 1
	return &fakeArrival{l: h.l}, nil
}

func (h *fakeHost) Adopt(ctx context.Context, id transport.MigrationID) (Arrival, error) {
	h.l.here()
	w := h.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble("adopt"); err != nil {
		return nil, err
	}
	if !w.arrival {
		return nil, fmt.Errorf("adopt: %w", ErrGone)
	}
	return &fakeArrival{l: h.l}, nil
}

type fakeArrival struct{ l *life }

func (a *fakeArrival) op(name string, f func(w *world) error) error {
	a.l.here()
	w := a.l.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.trouble(name); err != nil {
		return err
	}
	return f(w)
}

func (a *fakeArrival) LaneKey() []byte {
	a.l.w.mu.Lock()
	defer a.l.w.mu.Unlock()
	return fmt.Appendf(nil, "key %d", a.l.w.epoch)
}

func (a *fakeArrival) NewEpoch(ctx context.Context) (epoch uint32, key []byte, err error) {
	err = a.op("epoch", func(w *world) error {
		if w.lanes != nil {
			w.lanes.breakLocked()
		}
		w.epoch++
		epoch = w.epoch
		return nil
	})
	return epoch, a.LaneKey(), err
}

func (a *fakeArrival) Rebuild(ctx context.Context, st State, all bool) error {
	if err := a.l.work(ctx, 3*time.Millisecond); err != nil {
		return err
	}
	rest, err := st.Rest(ctx)
	if err != nil {
		return err
	}
	err = a.op("rebuild", func(w *world) error {
		var of int
		if _, err := fmt.Sscan(string(st.Image), &of); err != nil {
			w.violate("image %q", st.Image)
		}
		if w.mem.round != 0 {
			w.violate("rebuilt while the lanes are in round %d", w.mem.round)
		}
		w.dstOf, w.missing = of, w.keep(append(st.Memory, rest...))
		return nil
	})
	if err != nil {
		return err
	}
	if all {
		if err := a.pull(ctx); err != nil {
			return err
		}
	}
	return a.op("park", func(w *world) error { w.setDst(copyHeld); return nil })
}

// pull fetches the missing pages, one at a time.
func (a *fakeArrival) pull(ctx context.Context) error {
	for {
		if err := a.l.work(ctx, 2*time.Millisecond); err != nil {
			return err
		}
		w := a.l.w
		w.mu.Lock()
		if w.missing == 0 {
			w.mu.Unlock()
			return nil
		}
		if w.lanes != nil && w.srcLost {
			w.mu.Unlock()
			return fmt.Errorf("the source says that its pages are lost: %w", ErrGone)
		}
		if w.lanes != nil {
			if w.src != copyTraced && w.src != copyHeld && !w.overruled && w.dst == copyRunning {
				w.violate("pages of a copy that is %v", w.src)
			}
			w.missing--
		}
		w.mu.Unlock()
	}
}

func (a *fakeArrival) Release(ctx context.Context) (int, error) {
	err := a.op("release", func(w *world) error {
		if w.dst != copyHeld && w.dst != copyRunning {
			return fmt.Errorf("release: %w", ErrGone)
		}
		w.setDst(copyRunning)
		return nil
	})
	return 4711, err
}

func (a *fakeArrival) Fetch(ctx context.Context) error {
	return a.op("fetch", func(*world) error { return nil })
}

func (a *fakeArrival) Resident(ctx context.Context) error {
	if err := a.op("resident", func(*world) error { return nil }); err != nil {
		return err
	}
	return a.pull(ctx)
}

func (a *fakeArrival) Finish(ctx context.Context) error {
	return a.op("finish", func(w *world) error {
		if w.missing > 0 {
			w.violate("finished while %d pages are missing", w.missing)
		}
		w.arrival, w.finished = false, true
		return nil
	})
}

func (a *fakeArrival) Abort(ctx context.Context) error {
	return a.op("abort", func(w *world) error {
		if w.dst == copyRunning && !w.overruled {
			w.violate("a running destination was aborted")
		}
		w.setDst(copyNone)
		w.arrival, w.missing, w.mem.landed = false, 0, [modelPages]int{}
		return nil
	})
}

func (a *fakeArrival) Stats() ArrivalStats {
	a.l.w.mu.Lock()
	defer a.l.w.mu.Unlock()
	return ArrivalStats{PagesTotal: 4, PagesResident: uint64(4 - a.l.w.missing)}
}

func (a *fakeArrival) Close() error { return nil }
