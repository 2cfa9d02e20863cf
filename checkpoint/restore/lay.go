package restore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// laid is what the process-to-be has before the image comes.
type laid struct {
	maps    map[layKind]page.Set // readable and writable, whatever they will be
	objects map[image.ObjectID]*laidObject
	here    map[fileName]bool // whether files are; see isHere
	pages   page.Set          // of the mappings that were landed
}

// Lay brings the address space of the process-to-be to a layout: what was laid
// before and is not in it goes, with its pages, what is missing comes. Those are
// private mappings, anonymous and of files, and shared ones of objects of shared
// memory, which are made with them. Pages can then be put there from outside, see Landing, at
// their final addresses; tell Land of each that was. Rebuild keeps what is still
// right.
//
// It needs a process that Prepare has made: see Config.PID, Monotonic, Boottime.
// On error nothing may be laid any more, and nothing else has changed.
func (s *Skeleton) Lay(ctx context.Context, layout *image.Layout) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != seeded {
		return fmt.Errorf("restore: lay mappings of a skeleton that is %v: %w", s.state, ErrState)
	}
	if s.target == nil {
		return fmt.Errorf("restore: %w: the process is not there before the image, to land pages in", ErrUnsupported)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.cfg.KillPoint("restore/lay/before")
	if err := s.lay(layout); err != nil {
		return fmt.Errorf("restore: lay mappings of pid %d: %w", s.pid, err)
	}
	s.cfg.KillPoint("restore/lay/after")
	return nil
}

func (s *Skeleton) lay(layout *image.Layout) error {
	want, taken, err := s.wanted(layout)
	if err != nil {
		return err
	}
	if err := s.relocate(taken); err != nil {
		return err
	}
	sc := newScript(s.target.t)
	held, err := s.makeWay(sc, taken)
	if err != nil {
		sc.Discard()
		return err
	}
	l := &s.laid
	if l.objects == nil {
		l.objects = map[image.ObjectID]*laidObject{}
	}
	outdated := l.outdated(layout.Memories)
	if err := s.unlay(sc, want, outdated); err != nil {
		sc.Discard()
		return err
	}
	fresh, err := s.layObjects(sc, layout, append(held, taken...))
	if err != nil {
		sc.Discard()
		return err
	}
	var made page.Set
	for kind, wanted := range want {
		have := l.maps[kind]
		if outdated[kind.shared] != nil {
			have = page.Set{}
		}
		missing := page.Difference(&wanted, &have)
		s.mapLaid(sc, kind, missing.Ranges())
		if !kind.isBacked() {
			made = page.Union(&made, &missing)
		}
	}
	if err := sc.run(s.target.pid); err != nil {
		// Some of it may be there. Nothing of it counts.
		l.pages = page.Set{}
		return err
	}
	l.maps = want
	if err := s.openObjects(fresh); err != nil {
		return err
	}
	return s.landing.follow(s.target, l.trappable(), made)
}

// unlay takes away what was laid and is not wanted, and the objects that are
// outdated.
func (s *Skeleton) unlay(sc *script, want map[layKind]page.Set, outdated map[image.ObjectID]*laidObject) error {
	l := &s.laid
	for kind, have := range l.maps {
		wanted := want[kind]
		if outdated[kind.shared] != nil {
			wanted = page.Set{}
		}
		stale := page.Difference(&have, &wanted)
		for _, r := range stale.Ranges() {
			sc.onf("mapping %v that is gone", r)
			sc.call(unix.SYS_MUNMAP, uint64(r.Start), r.Bytes())
			sc.part(s.target.pid)
		}
		gone := page.Intersection(&l.pages, &stale)
		l.pages = page.Difference(&l.pages, &stale)
		// Another mapping may show them.
		if o := l.objects[kind.shared]; o != nil && outdated[kind.shared] == nil {
			if err := o.punch(&kind, &gone); err != nil {
				return err
			}
		}
	}
	var all []error
	for id, o := range outdated {
		o.letGo(sc)
		all = append(all, o.close())
		delete(l.objects, id)
	}
	return errors.Join(all...)
}

// makeWay unmaps what the seed came with, at the first time, and moves the vdso and
// what holds objects out of the way of taken. held is what else there is then.
func (s *Skeleton) makeWay(sc *script, taken []page.Range) (held []page.Range, err error) {
	ms, err := proc.ReadMaps(s.target.pid)
	if err != nil {
		return nil, err
	}
	v := vdsoAmong(ms)
	keep := []page.Range{s.area}
	if len(v.parts) > 0 {
		keep = append(keep, v.span())
	}
	if s.laid.maps == nil {
		sc.clear(s.target.pid, keep...)
		// A huge page would put zeros beside what lands, where other pages are to come
		// later: nothing traps an access to those. Until the memory is trapped there are
		// none (prctl(2)); the process's own setting comes after that.
		sc.onf("no huge pages while pages land")
		sc.call(unix.SYS_PRCTL, unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
	}
	if len(v.parts) > 0 && overlapsAny(v.span(), taken) {
		to, ok := hole(v.span().Bytes(), slices.Concat(taken, keep, s.laid.occupied()))
		if !ok {
			return nil, fmt.Errorf("%w: no room to move the vdso", ErrUnsupported)
		}
		v.move(sc, to.Start)
		keep = append(keep, to)
	}
	return keep, s.evade(sc, taken, keep)
}

// Holds fails where some of pages are in no mapping that was laid.
func (s *Skeleton) Holds(pages *page.Set) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	whole := page.NewSet(s.laid.whole()...)
	if out := page.Difference(pages, &whole); !out.Empty() {
		return fmt.Errorf("restore: %w: pages %v are in no mapping of pid %d", image.ErrFormat, out.Ranges()[0], s.pid)
	}
	return nil
}

// Backed is where reading gives something though nothing has landed.
func (s *Skeleton) Backed() page.Set {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.laid.backed()
}

// Land notes that pages have been written. They must be ones that it Holds.
func (s *Skeleton) Land(pages page.Set) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != seeded {
		return fmt.Errorf("restore: pages landed in a skeleton that is %v: %w", s.state, ErrState)
	}
	s.laid.overwrite(&pages)
	s.laid.pages = page.Union(&s.laid.pages, &pages)
	return nil
}

// Drop gives up landed pages: what is no content any more, or is going to be
// fetched anew. Fewer are left for Rebuild to drop, while the process stands
// still.
func (s *Skeleton) Drop(pages page.Set) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != seeded || s.target == nil {
		return fmt.Errorf("restore: drop pages of a skeleton that is %v: %w", s.state, ErrState)
	}
	gone := page.Intersection(&pages, &s.laid.pages)
	if err := s.drop(&gone); err != nil {
		return fmt.Errorf("restore: drop pages of pid %d: %w", s.pid, err)
	}
	return nil
}

// dropBatch is how many ranges one batch gives up: it has room for more calls, but
// the tracer's other work waits.
const dropBatch = 16 << 10

func (s *Skeleton) drop(gone *page.Set) error {
	var private page.Set
	err := s.laid.byKind(gone, func(k layKind, part page.Set) error {
		if !k.isShared() {
			private = page.Union(&private, &part)
		} else if o := s.laid.objects[k.shared]; o != nil {
			return o.punch(&k, &part)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for rs := private.Ranges(); len(rs) > 0; {
		n := min(len(rs), dropBatch)
		if err := s.giveUp(rs[:n]); err != nil {
			return err
		}
		rs = rs[n:]
	}
	s.laid.pages = page.Difference(&s.laid.pages, gone)
	return nil
}

// kept are the parts of v that were laid as v needs them. Mappings of objects are
// made anew: their pages are the objects'.
func (l *laid) kept(v *image.VMA) []page.Range {
	if !lies(v) || v.Kind == image.VMAShared {
		return nil
	}
	s := l.maps[kindOf(v, image.ObjectID{})]
	return s.Intersect(v.Range)
}

// keepable are all such parts of the mappings of p. The rest of what was laid is
// given up by it, but for what are pages of objects.
func (s *Skeleton) keepable(p *image.Process) []page.Range {
	var keep, private page.Set
	for i := range p.VMAs {
		for _, r := range s.laid.kept(&p.VMAs[i]) {
			keep.Add(r)
		}
	}
	for k, set := range s.laid.maps {
		if !k.isShared() {
			private = page.Union(&private, &set)
		}
	}
	gone := page.Difference(&private, &keep)
	s.laid.pages = page.Difference(&s.laid.pages, &gone)
	return keep.Ranges()
}

// mend sees to it that each mapping of p that was laid in part is one mapping of
// the kernel: mremap(2) takes no two, and the program had one. The kernel joins
// neighbours but where both have pages and another history. What it did not join
// is made anew, without its pages.
func (s *Skeleton) mend(p *image.Process) error {
	ms, err := proc.ReadMaps(s.target.pid)
	if err != nil {
		return err
	}
	sc := newScript(s.target.t)
	f := files{s: sc}
	for i := range p.VMAs {
		v := &p.VMAs[i]
		if len(s.laid.kept(v)) == 0 || len(ms) == 0 {
			continue
		}
		for len(ms) > 1 && ms[0].End <= v.Start {
			ms = ms[1:]
		}
		if ms[0].Covers(v.Range) {
			continue
		}
		s.cfg.Log.Debug("laid in pieces, made anew", "pid", s.pid, "mapping", v.Range)
		sc.onf("mapping %v", v.Range)
		sc.call(unix.SYS_MUNMAP, uint64(v.Start), v.Bytes())
		mapOne(sc, &f, v, v.Range, s.from)
		f.part(s.target.pid)
		s.laid.pages.Remove(v.Range)
	}
	f.close()
	return sc.run(s.target.pid)
}
