package restore

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// layKind is what of an anonymous mapping is settled when it is made.
type layKind struct{ noReserve, growsDown bool }

func kindOf(v *image.VMA) layKind { return layKind{v.Has("nr"), v.Has("gd")} }

// lies reports whether v is a mapping that pages can be landed in before the
// process stands.
func lies(v *image.VMA) bool {
	return v.Kind == image.VMAAnon && !v.Shared && !v.Has("dp") && !v.Has("ht")
}

// laid is what the process-to-be has before the image comes.
type laid struct {
	maps  map[layKind]page.Set // readable and writable, whatever they will be
	pages page.Set             // of them that were landed
}

// whole are all mappings.
func (l *laid) whole() (out []page.Range) {
	for _, s := range l.maps {
		out = append(out, s.Ranges()...)
	}
	return out
}

// Lay brings the address space of the process-to-be to the anonymous mappings
// among vmas: what was laid before and is not among them goes, with its pages,
// what is missing comes. Pages can then be put there from outside, see Landing, at
// their final addresses; tell Land of each that was. Rebuild keeps what is still
// right.
//
// It needs a process that Prepare has made: see Config.PID, Monotonic, Boottime.
// On error nothing may be laid any more, and nothing else has changed.
func (s *Skeleton) Lay(ctx context.Context, vmas []image.VMA) error {
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
	if err := s.lay(vmas); err != nil {
		return fmt.Errorf("restore: lay mappings of pid %d: %w", s.pid, err)
	}
	s.cfg.KillPoint("restore/lay/after")
	return nil
}

func (s *Skeleton) lay(vmas []image.VMA) error {
	want := map[layKind]page.Set{}
	var taken []page.Range
	for i := range vmas {
		v := &vmas[i]
		if !lies(v) {
			continue
		}
		if v.Empty() || !v.Aligned() || v.End > userEnd {
			return fmt.Errorf("%w: mapping %v", image.ErrFormat, v.Range)
		}
		set := want[kindOf(v)]
		set.Add(v.Range)
		want[kindOf(v)] = set
		taken = append(taken, v.Range)
	}
	if err := s.relocate(taken); err != nil {
		return err
	}
	sc := newScript(s.target.t)
	if err := s.makeWay(sc, taken); err != nil {
		sc.Discard()
		return err
	}
	l := s.laid
	for kind, have := range l.maps {
		wanted := want[kind]
		stale := page.Difference(&have, &wanted)
		for _, r := range stale.Ranges() {
			sc.onf("mapping %v that is gone", r)
			sc.call(unix.SYS_MUNMAP, uint64(r.Start), r.Bytes())
			sc.part(s.target.pid)
		}
		l.pages = page.Difference(&l.pages, &stale)
	}
	var made page.Set
	for kind, wanted := range want {
		have := l.maps[kind]
		fresh := page.Difference(&wanted, &have)
		made = page.Union(&made, &fresh)
		for _, r := range fresh.Ranges() {
			sc.onf("mapping %v", r)
			fl := uint64(unix.MAP_PRIVATE | unix.MAP_ANONYMOUS | unix.MAP_FIXED_NOREPLACE)
			if kind.noReserve {
				fl |= unix.MAP_NORESERVE
			}
			if kind.growsDown {
				fl |= unix.MAP_GROWSDOWN
			}
			sc.call(unix.SYS_MMAP, uint64(r.Start), r.Bytes(), unix.PROT_READ|unix.PROT_WRITE, fl, minus(1), 0)
			sc.part(s.target.pid)
		}
	}
	if err := sc.run(s.target.pid); err != nil {
		// Some of it may be there. Nothing of it counts.
		s.laid.pages = page.Set{}
		return err
	}
	l.maps = want
	s.laid = l
	return s.landing.follow(s.target, page.NewSet(l.whole()...), made)
}

// makeWay unmaps what the seed came with, at the first time, and moves the vdso
// out of the way of taken.
func (s *Skeleton) makeWay(sc *script, taken []page.Range) error {
	ms, err := proc.ReadMaps(s.target.pid)
	if err != nil {
		return err
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
	if len(v.parts) == 0 || !overlapsAny(v.span(), taken) {
		return nil
	}
	to, ok := hole(v.span().Bytes(), append(append(taken, keep...), s.laid.whole()...))
	if !ok {
		return fmt.Errorf("%w: no room to move the vdso", ErrUnsupported)
	}
	v.move(sc, to.Start)
	return nil
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

// Land notes that pages have been written. They must be ones that it Holds.
func (s *Skeleton) Land(pages page.Set) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state != seeded {
		return fmt.Errorf("restore: pages landed in a skeleton that is %v: %w", s.state, ErrState)
	}
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
	for rs := gone.Ranges(); len(rs) > 0; {
		n := min(len(rs), dropBatch)
		sc := newScript(s.target.t)
		sc.on(func() string { return "giving up of stale pages" })
		for _, r := range rs[:n] {
			sc.call(unix.SYS_MADVISE, uint64(r.Start), r.Bytes(), unix.MADV_DONTNEED)
		}
		if err := sc.run(s.target.pid); err != nil {
			return err
		}
		rs = rs[n:]
	}
	s.laid.pages = page.Difference(&s.laid.pages, gone)
	return nil
}

// kept are the parts of v that were laid as v needs them.
func (l *laid) kept(v *image.VMA) []page.Range {
	if !lies(v) {
		return nil
	}
	s := l.maps[kindOf(v)]
	return s.Intersect(v.Range)
}

// keepable are all such parts of the mappings of p. The rest of what was laid is
// given up by it.
func (s *Skeleton) keepable(p *image.Process) []page.Range {
	var keep page.Set
	for i := range p.VMAs {
		for _, r := range s.laid.kept(&p.VMAs[i]) {
			keep.Add(r)
		}
	}
	s.laid.pages = page.Intersection(&s.laid.pages, &keep)
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
		sc.call(unix.SYS_MMAP, uint64(v.Start), v.Bytes(), uint64(v.Prot), mmapFlags(v)|unix.MAP_ANONYMOUS, minus(1), 0)
		sc.part(s.target.pid)
		s.laid.pages.Remove(v.Range)
	}
	return sc.run(s.target.pid)
}
