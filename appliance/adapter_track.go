package appliance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/pageferry/pageferry/appliance/pager"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/migrate"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// tracked is what a process that is tracked has besides.
type tracked struct {
	tracker dirty.Tracker // nil where nothing is tracked
	running atomic.Bool   // and tracked: Freeze has not stopped it yet
	// written is what the walk at the freeze found: set by the time that the rest
	// of the map of memory is there.
	written page.Set
	slow    throttle
	// laid is what the Look before has laid out, by the kind of mapping: of one kind
	// the destination keeps what is still there.
	laid map[string]page.Set
}

// Throttle stops the process for that part of its time.
func (p *process) Throttle(part float64) error {
	p.slow.set(part)
	return nil
}

// Track begins by the best method that works. What kept a better one from working
// is logged.
func (p *process) Track(ctx context.Context) (string, error) {
	p.running.Store(true)
	if err := p.s.Track(p.find); err != nil {
		return "", gone(err)
	}
	t, lacking, err := dirty.New(ctx, dirty.Config{
		PID: p.pid, OpenUserfault: p.s.Userfault,
		Stop: p.stopForLook,
	})
	for _, l := range lacking {
		p.log.Info("dirty pages could be found better", "pid", p.pid, "method", l.Method, "err", l.Err)
	}
	if err != nil {
		p.s.Untracked()
		p.running.Store(false)
		return "", gone(err)
	}
	p.tracker = t
	return string(t.Method()), nil
}

// stopForLook stops the process, unless Freeze has.
func (p *process) stopForLook() (resume func() error, err error) {
	if !p.running.Load() {
		return func() error { return nil }, nil
	}
	return p.slow.stop()
}

// untrack ends that. Nothing of it is left in the process.
func (p *process) untrack() {
	p.slow.set(0)
	if p.tracker == nil {
		return
	}
	if err := p.tracker.Close(); err != nil {
		p.log.Warn("end of the tracking", "pid", p.pid, "err", err)
	}
}

// find is the walk at the freeze.
func (p *process) find(maps []proc.Mapping) (own, guards page.Set, err error) {
	found, err := p.tracker.Last(maps)
	p.written = found.Written
	return found.Content, found.Guards, err
}

// dirtied adds what it found to the map of memory.
func (p *process) dirtied(ms []migrate.Memory) []migrate.Memory {
	for i := range ms {
		if ms[i].Space == 0 {
			ms[i].Dirty = p.written
		}
	}
	return ms
}

// Look looks at anonymous memory, which is nearly all that a process has. Pages of
// shared objects and changed pages of files come at the switch.
func (p *process) Look(context.Context) (migrate.Look, error) {
	anon, found, err := p.look()
	if err != nil {
		return migrate.Look{}, gone(err)
	}
	var vmas []image.VMA
	for i := range anon {
		m := &anon[i]
		if found.Content.BytesIn(m.Range) > 0 {
			vmas = append(vmas, image.VMA{Range: m.Range, Kind: image.VMAAnon, Prot: m.Prot, Memory: -1, Flags: settledFlags(m)})
		}
	}
	// What is mapped since the list was read has no place to land yet. Nothing of it
	// is lost: it counts as not sent.
	listed := page.NewSet()
	for i := range vmas {
		listed.Add(vmas[i].Range)
	}
	l := migrate.Look{Content: page.Intersection(&found.Content, &listed), Written: page.Intersection(&found.Written, &listed), Remade: p.remade(vmas)}
	l.Layout, err = image.EncodeLayout(vmas)
	return l, err
}

// remade notes a layout and returns where it has no mapping, or one of another
// kind, and the one before it had one.
func (p *process) remade(vmas []image.VMA) page.Set {
	now := map[string]page.Set{}
	for i := range vmas {
		kind := strings.Join(vmas[i].Flags, " ")
		set := now[kind]
		set.Add(vmas[i].Range)
		now[kind] = set
	}
	var out page.Set
	for kind, had := range p.laid {
		has := now[kind]
		gone := page.Difference(&had, &has)
		out = page.Union(&out, &gone)
	}
	p.laid = now
	return out
}

// look takes a look such that nothing of what it does not tell is written by a
// device. What is read past the page cache comes into pages that the kernel looked
// up before, and write protection knows nothing of that: a page protected in
// between would be taken for unchanged. Nothing is on the way while the process
// stands still, for its threads stop only when such calls have ended.
func (p *process) look() (anon []proc.Mapping, found dirty.Pages, err error) {
	if p.tracker.Method() != dirty.WPAsync {
		return p.collect(false) // they tell it, or stop it themselves
	}
	still, err := proc.DirectIO(p.pid)
	if err != nil {
		return nil, dirty.Pages{}, err
	}
	if anon, found, err = p.collect(still); err != nil || still {
		return anon, found, err
	}
	if still, err = proc.DirectIO(p.pid); err != nil || !still {
		return anon, found, err
	}
	// Opened meanwhile: some of what is protected now may have been written since.
	anon, found, err = p.collect(true)
	found.Written = found.Content
	return anon, found, err
}

// collect asks the tracker, while the process stands still if that is needed.
func (p *process) collect(still bool) (anon []proc.Mapping, found dirty.Pages, err error) {
	if still {
		var resume func() error
		if resume, err = p.stopForLook(); err != nil {
			return nil, dirty.Pages{}, err
		}
		defer func() { err = errors.Join(err, resume()) }()
	}
	maps, err := p.s.Mappings()
	if err != nil {
		return nil, dirty.Pages{}, err
	}
	for i := range maps {
		if m := &maps[i]; !m.Shared && m.Ino == 0 && m.Name != "[vsyscall]" && !m.Has("dp") && !m.Has("io") && !m.Has("pf") {
			anon = append(anon, *m)
		}
	}
	found, err = p.tracker.Collect(anon)
	return anon, found, err
}

// settledFlags are those of a mapping that are settled when it is made.
func settledFlags(m *proc.Mapping) (out []string) {
	for _, f := range []string{"nr", "gd"} {
		if m.Has(f) {
			out = append(out, f)
		}
	}
	return out
}

func (p *process) Peek(pages *page.Set) (page.Set, error) {
	s, err := p.tracker.Peek(pages)
	return s, gone(err)
}

// readRunning reads page by page what could not be read at once. What the program
// has unmapped meanwhile is zeros, which the next Look sets right: it is not there
// any more, or is written. Of a page that is there and cannot be read, for want of
// memory for example, the next Look would say nothing.
func (p *process) readRunning(space page.Space, rs []page.Range, buf []byte) error {
	for _, r := range rs {
		for at := r.Start; at < r.End; at += page.Size {
			one := buf[:page.Size]
			buf = buf[page.Size:]
			if err := p.s.ReadPages(space, []page.Range{page.PageOf(at)}, one); err != nil {
				if !errors.Is(err, proc.ErrNoPage) {
					return err
				}
				clear(one)
			}
		}
	}
	return nil
}

// Land lays out the process-to-be as the source's is, and has the pager fetch pages
// into it.
func (a *arrival) Land(ctx context.Context, b migrate.Batch) (migrate.Landed, error) {
	if b.Layout != nil {
		vmas, err := image.DecodeLayout(b.Layout)
		if err != nil {
			return migrate.Landed{}, err
		}
		if err := a.skeleton.Lay(ctx, vmas); err != nil {
			return migrate.Landed{}, err
		}
	}
	if err := a.skeleton.Drop(b.Gone); err != nil {
		return migrate.Landed{}, err
	}
	var all page.Set
	for i := range b.Classes {
		all = page.Union(&all, &b.Classes[i])
	}
	if all.Empty() {
		return migrate.Landed{}, nil
	}
	if err := a.skeleton.Holds(&all); err != nil {
		return migrate.Landed{}, err
	}
	p, another := a.lander()
	if another { // the lanes have ended with the one before
		return migrate.Landed{}, a.died(nil, pager.ErrGone)
	}
	if p == nil {
		return migrate.Landed{}, fmt.Errorf("land pages: %w", migrate.ErrGone)
	}
	l, err := p.Land(ctx, pager.Landing{PID: a.skeleton.PID(), UFFD: a.skeleton.Landing(), Classes: b.Classes})
	if errors.Is(err, pager.ErrGone) {
		return migrate.Landed{}, a.died(p, err)
	}
	if err != nil {
		return migrate.Landed{}, err
	}
	return migrate.Landed{Pages: l.Pages, PagesZero: l.PagesZero, BytesWire: l.BytesWire, Took: l.Took}, a.skeleton.Land(all)
}
