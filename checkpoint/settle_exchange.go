package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// exchange replaces pieces while the process stands still. back is what is left of
// them for lack of time; what has changed since the round began is not: the next
// round finds it.
func (t *Settler) exchange(ctx context.Context, tids []int, now []piece) (back []piece, err error) {
	began := time.Now()
	t.held = 0
	told := time.Duration(0)
	t.look.Again()
	var list []found
	var guess time.Duration
	// What the program has written since the plan was made may be much.
	budget := t.budget() * 5 / 4
	for i, p := range now {
		if guess >= budget {
			back = append(back, now[i:]...)
			break
		}
		p, ok, err := t.current(p)
		if err != nil {
			return nil, err
		}
		if !ok {
			t.rep.Retried++
			continue
		}
		f, rest, err := t.scan(p, budget-guess)
		if err != nil {
			return nil, err
		}
		if !rest.Empty() && f.ahead && f.tries < settleTries {
			// It was to be replaced at once.
			p.tries++
			back = append(back, p)
			continue
		}
		if !rest.Empty() {
			back = append(back, rest)
		}
		guess += f.guess
		list = append(list, f)
	}
	if len(list) == 0 {
		return back, nil
	}
	var zeroed page.Set
	if t.cfg.Stopped != nil {
		before := time.Now()
		zeroed, err = t.cfg.Stopped(ctx, parts(list))
		told = time.Since(before)
		t.cost.toldOf(told)
		if err != nil {
			t.kept(list)
			return nil, fmt.Errorf("prepare %d parts: %w", len(list), err)
		}
	}
	inject.Point("settle-copy")
	err = t.copyOwn(tids[0], list)
	if err == nil {
		inject.Point("settle-copied")
		err = t.blank(tids[0], list, &zeroed)
	}
	if err == nil {
		err = t.move(ctx, tids, list)
	} else {
		t.kept(list)
	}
	t.cost.worked(guess+costStop, time.Since(began)-t.held-told)
	return back, err
}

func (t *Settler) kept(fs []found) {
	if t.cfg.Kept == nil || len(fs) == 0 {
		return
	}
	t.cfg.Kept(parts(fs))
}

func parts(fs []found) []SettlePart {
	out := make([]SettlePart, len(fs))
	for i := range fs {
		out[i] = fs[i].part()
	}
	return out
}

// current reports whether p is still what the round found, and shortens it to what
// is one mapping, and one mapping of the shadow.
func (t *Settler) current(p piece) (_ piece, ok bool, err error) {
	m, ok, err := t.look.At(p.Start)
	if err != nil || !ok {
		return p, false, ignoreGone(err)
	}
	if m.Dev != p.of.Dev || m.Ino != p.of.Ino || m.Shared || m.Prot != p.of.Prot ||
		m.Offset+uint64(p.Start-m.Start) != p.offset() {
		return p, false, nil
	}
	s, ok, err := t.look.At(p.shadow)
	if err != nil || !ok || s.Shared || s.Dev != p.dev || s.Ino != p.ino {
		return p, false, ignoreGone(err)
	}
	p.End = min(p.End, m.End, p.Start+s.End-p.shadow)
	return p, true, nil
}

// ignoreGone: the process has called exec, or ended; who needs it finds out.
func ignoreGone(err error) error {
	if errors.Is(err, proc.ErrGone) {
		return nil
	}
	return err
}

// move puts shadows in the place of mappings.
func (t *Settler) move(ctx context.Context, tids []int, list []found) error {
	for len(list) > 0 {
		b := t.target.Batch()
		moves := make([]moved, len(list))
		for i := range list {
			moves[i] = dress(b, &list[i])
		}
		var certain func() error
		if t.cfg.Certain != nil {
			certain = func() error { return t.cfg.Certain(ctx, parts(list)) }
		}
		began := time.Now()
		err := b.RunAlone(tids[0], tids[1:], certain)
		if len(tids) > 1 {
			t.held += time.Since(began) - b.Took()
		}
		done := 0
		for ; done < len(list); done++ {
			f, m := &list[done], moves[done]
			if _, e := m.mremap.Ret(); e == nil {
				t.moved(f, m)
			} else if !m.returned() {
				break
			} else {
				t.forgetAside(f)
				t.skip(&f.piece, fmt.Errorf("its shadow cannot take its place: %w", e))
				t.kept(list[done : done+1])
			}
		}
		if done == len(list) {
			return err
		}
		if call := (*inject.CallError)(nil); err != nil && !errors.As(err, &call) {
			t.kept(list[done:])
			return err
		}
		f := &list[done]
		if e := t.mend(tids[0], f); e != nil {
			t.skip(&f.piece, errors.Join(err, e))
			t.kept(list[done : done+1])
		}
		list = list[done+1:]
	}
	return nil
}

// mend sees to a piece whose mremap failed. The kernel unmaps what is in its way
// first, and all that could fail afterwards, for lack of memory, can succeed now.
func (t *Settler) mend(tid int, f *found) error {
	t.look.Again()
	m, ok, err := t.look.At(f.Start)
	if err != nil {
		return err
	}
	b := t.target.Batch()
	if ok && m.Dev == f.of.Dev {
		t.forgetAside(f)
		for _, g := range f.guards {
			b.Call(unix.SYS_MADVISE, uint64(f.shadow+g.Start-f.Start), g.Bytes(), madvGuardRemove).Optional()
		}
		return errors.Join(errors.New("left as it was"), b.Run(tid))
	}
	f.aside = 0 // what has been moved there is taken away
	m2 := remap(b, f)
	if err := b.Run(tid); err != nil {
		return fmt.Errorf("the mapping is lost: %w", err)
	}
	t.moved(f, m2)
	return nil
}

// moved is the calls that replaced a mapping, and locked it again; or moved it away
// before that, and back where that had to be.
type moved struct{ mremap, mlock, away, back *inject.Call }

// returned reports whether a mapping that was moved away has come back.
func (m *moved) returned() bool {
	if m.back == nil {
		return false
	}
	_, err := m.back.Ret()
	return err == nil
}

// forgetAside: f has not moved aside. What was reserved for it may have been unmapped,
// and then is not ours any more.
func (t *Settler) forgetAside(f *found) {
	if f.aside == 0 {
		return
	}
	t.look.Again()
	if m, ok, err := t.look.At(f.aside); err == nil && (!ok || !private(&m) || m.Prot != unix.PROT_NONE) {
		t.asides.Remove(from(f.Range, f.aside))
	}
	f.aside = 0
}

// moved notes that a piece is settled.
func (t *Settler) moved(f *found, m moved) {
	t.rep.Settled += f.Bytes()
	s := from(f.Range, f.shadow)
	t.done = append(t.done, f.part())
	t.made.Remove(s)
	if !f.fresh {
		t.taken.Add(s)
	}
	if f.aside != 0 {
		away := from(f.Range, f.aside)
		t.asides.Remove(away)
		t.old.Add(away)
	}
	if m.mlock != nil {
		if _, err := m.mlock.Ret(); err != nil {
			t.cfg.Log.Warn("memory that was locked is not any more", "pid", t.s.pid, "range", f.Range, "error", err)
		}
	}
}

// advice is what sets and what clears a flag that VmFlags shows.
var advice = []struct {
	flag       string
	set, clear uint64
}{
	{"dc", unix.MADV_DONTFORK, unix.MADV_DOFORK},
	{"dd", unix.MADV_DONTDUMP, unix.MADV_DODUMP},
	{"mg", unix.MADV_MERGEABLE, unix.MADV_UNMERGEABLE},
	{"hg", unix.MADV_HUGEPAGE, 0},
	{"nh", unix.MADV_NOHUGEPAGE, 0},
}

// madvise(2), of <asm-generic/mman-common.h>, since Linux 6.13.
const (
	madvGuardInstall = 102
	madvGuardRemove  = 103
)

// dress appends the calls that make a shadow like its mapping and move it there.
// Guards are made here and not earlier: one that stays in a shadow would come with it
// some other time, when the program has removed its own.
func dress(b *inject.Batch, f *found) moved {
	s := from(f.Range, f.shadow)
	for _, g := range f.guards {
		b.Call(unix.SYS_MADVISE, uint64(s.Start+g.Start-f.Start), g.Bytes(), madvGuardInstall)
	}
	for _, a := range advice {
		switch set := f.of.Has(a.flag); {
		case set && !has(f.flags, a.flag):
			b.Call(unix.SYS_MADVISE, uint64(s.Start), s.Bytes(), a.set).Optional()
		case !set && has(f.flags, a.flag) && a.clear != 0:
			b.Call(unix.SYS_MADVISE, uint64(s.Start), s.Bytes(), a.clear).Optional()
		}
	}
	if f.of.Prot != unix.PROT_READ|unix.PROT_WRITE {
		b.Call(unix.SYS_MPROTECT, uint64(s.Start), s.Bytes(), uint64(f.of.Prot))
	}
	return remap(b, f)
}

func has(flags []string, flag string) bool { return slices.Contains(flags, flag) }

// remap appends the mremap, and the lock that its mapping had.
func remap(b *inject.Batch, f *found) (m moved) {
	n := f.Bytes()
	flags := uint64(unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED)
	if !f.fresh {
		// The caller's shadow leaves its place empty, but mapped: were it a hole, the
		// program might map something there, and nobody could tell that from what is
		// left of the shadow. See Release.
		flags |= unix.MREMAP_DONTUNMAP
	}
	if f.aside != 0 {
		m.away = b.Call(unix.SYS_MREMAP, uint64(f.Start), n, n, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED, uint64(f.aside))
	}
	m.mremap = b.Call(unix.SYS_MREMAP, uint64(f.shadow), n, n, flags, uint64(f.Start))
	if f.aside != 0 {
		// Where the shadow did not come there is a hole, and only then can it be filled.
		// So the mapping comes back even if nobody is there any more to see to it.
		m.mremap.Optional()
		hole := b.Call(unix.SYS_MMAP, uint64(f.Start), n, unix.PROT_NONE,
			unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE|unix.MAP_FIXED_NOREPLACE, ^uint64(0), 0).Optional()
		m.back = b.Call(unix.SYS_MREMAP, uint64(f.aside), n, n, unix.MREMAP_MAYMOVE|unix.MREMAP_FIXED).Arg(4, hole).Optional()
		b.Call(unix.SYS_MADVISE, uint64(f.aside), n, unix.MADV_DONTFORK).Optional()
	}
	if f.of.Has("lo") {
		how := uint64(0)
		if f.of.Has("lf") {
			how = unix.MLOCK_ONFAULT
		}
		m.mlock = b.Call(unix.SYS_MLOCK2, uint64(f.Start), n, how).Optional()
	}
	return m
}
