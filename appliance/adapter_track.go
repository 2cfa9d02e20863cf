package appliance

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	laid map[laidKind]page.Set
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
		Stop: p.stopForLook, Shared: true, Open: p.s.OpenMapped,
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

// find is the walk at the freeze. All that is not anonymous Capture finds by itself;
// what was written of it is told here, too.
func (p *process) find(maps []proc.Mapping) (own, guards page.Set, err error) {
	var anon, others []proc.Mapping
	for _, m := range trackable(maps) {
		if m.Ino == 0 && !m.Shared {
			anon = append(anon, m)
		} else {
			others = append(others, m)
		}
	}
	found, err := p.tracker.Last(anon)
	if err != nil {
		return own, guards, err
	}
	more, err := p.tracker.Last(others)
	p.written = page.Union(&found.Written, &more.Written)
	p.written = page.Union(&p.written, &more.Shared.Written)
	return found.Content, found.Guards, err
}

// trackable are the mappings among maps in which there can be pages of the
// process's own, or of shared memory.
func trackable(maps []proc.Mapping) (out []proc.Mapping) {
	for i := range maps {
		if m := &maps[i]; m.Name != "[vsyscall]" && !m.Has("dp") && !m.Has("io") && !m.Has("pf") {
			out = append(out, *m)
		}
	}
	return out
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

// Look looks at all that rounds can carry: private memory, anonymous and changed
// pages of files, and shared memory, mapped or held by descriptors.
func (p *process) Look(context.Context) (migrate.Look, error) {
	maps, found, err := p.look()
	if err != nil {
		return migrate.Look{}, gone(err)
	}
	content := page.Union(&found.Content, &found.Shared.Content)
	written := page.Union(&found.Written, &found.Shared.Written)
	maps = slices.DeleteFunc(maps, func(m proc.Mapping) bool { return content.BytesIn(m.Range) == 0 })
	layout, room, err := p.s.Layout(maps)
	if err != nil {
		return migrate.Look{}, gone(err)
	}
	// What is mapped since the list was read has no place to land yet. Nothing of it
	// is lost: it counts as not sent.
	l := migrate.Look{Content: page.Intersection(&content, &room), Written: page.Intersection(&written, &room), Remade: p.remade(layout)}
	switch {
	case p.tracker.Method() == dirty.Hash:
		l.Compared = l.Content
	default:
		l.Compared = page.Intersection(&found.Shared.Content, &room)
	}
	l.Layout, err = image.EncodeLayout(layout)
	return l, err
}

// laidKind is what the destination takes for one mapping; see restore.
type laidKind struct {
	flags, path string
	of          image.ObjectID // file or object
	base        page.Addr      // where its first byte would be
}

// remade notes a layout and returns where it has no mapping, or one of another
// kind, and the one before it had one.
func (p *process) remade(l *image.Layout) page.Set {
	now := map[laidKind]page.Set{}
	for i := range l.VMAs {
		v := &l.VMAs[i]
		kind := laidKind{flags: strings.Join(v.Flags, " ")}
		switch v.Kind {
		case image.VMAFile:
			kind.path, kind.of = v.Path, image.ObjectID{Dev: v.File.Dev, Ino: v.File.Ino}
			kind.base = v.Start - page.Addr(v.Offset)
		case image.VMAShared:
			kind = laidKind{of: l.Memories[v.Memory].ID, base: v.Start - page.Addr(v.Offset)}
		}
		set := now[kind]
		set.Add(v.Range)
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
func (p *process) look() (maps []proc.Mapping, found dirty.Pages, err error) {
	if p.tracker.Method() != dirty.WPAsync {
		return p.collect(false) // they tell it, or stop it themselves
	}
	still, err := proc.DirectIO(p.pid)
	if err != nil {
		return nil, dirty.Pages{}, err
	}
	if maps, found, err = p.collect(still); err != nil || still {
		return maps, found, err
	}
	if still, err = proc.DirectIO(p.pid); err != nil || !still {
		return maps, found, err
	}
	// Opened meanwhile: some of what is protected now may have been written since.
	maps, found, err = p.collect(true)
	found.Written = found.Content
	return maps, found, err
}

// collect asks the tracker, while the process stands still if that is needed: not
// for shared memory, which is compared, and takes long.
func (p *process) collect(still bool) (maps []proc.Mapping, found dirty.Pages, err error) {
	var resume func() error
	if still {
		if resume, err = p.stopForLook(); err != nil {
			return nil, dirty.Pages{}, err
		}
	}
	maps, err = p.s.Mappings()
	if err == nil {
		var windows []proc.Mapping
		windows, err = p.s.Windows(maps)
		maps = append(maps, windows...)
	}
	ask := trackable(maps)
	var shared []proc.Mapping
	if still {
		for _, m := range ask {
			if m.Shared {
				shared = append(shared, m)
			}
		}
		ask = slices.DeleteFunc(slices.Clone(ask), func(m proc.Mapping) bool { return m.Shared })
	}
	if err == nil {
		found, err = p.tracker.Collect(ask)
	}
	if still {
		if err = errors.Join(err, resume()); err == nil {
			var more dirty.Pages
			more, err = p.tracker.Collect(shared)
			found.Shared = more.Shared
		}
	}
	return trackable(maps), found, err
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
		layout, err := image.DecodeLayout(b.Layout)
		if err != nil {
			return migrate.Landed{}, err
		}
		if err := a.skeleton.Lay(ctx, layout); err != nil {
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
	l, err := p.Land(ctx, pager.Landing{PID: a.skeleton.PID(), UFFD: a.skeleton.Landing(), Classes: b.Classes, Backed: a.skeleton.Backed()})
	if errors.Is(err, pager.ErrGone) {
		return migrate.Landed{}, a.died(p, err)
	}
	if err != nil {
		return migrate.Landed{}, err
	}
	return migrate.Landed{Pages: l.Pages, PagesZero: l.PagesZero, BytesWire: l.BytesWire, Took: l.Took}, a.skeleton.Land(all)
}
