package dirty

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// wpFeatures make a userfaultfd write-protect without a handler, on all kinds of
// mappings.
const wpFeatures = sys.UffdFeaturePagefaultFlagWP | sys.UffdFeatureWPHugetlbfsShmem |
	sys.UffdFeatureWPUnpopulated | sys.UffdFeatureWPAsync

// wp tracks by write protection that the kernel itself takes away.
//
// Of private memory only pages that are there are protected. Protecting what is
// not, as the kernel can, would fill the page tables of all that a program
// reserved and never used. It is not needed either: a page that appears later has
// no protection and counts as written.
type wp struct {
	pid int

	mu   sync.Mutex
	uffd *os.File // nil once closed
	pm   *proc.Pagemap
	at   *borders
	walkers
	shared *shared // nil where it is not asked for
	untold untold
	seen   bool // a look has worked since the start, or since an error
	// known are the anonymous mappings of the look before, and content what it found
	// in them; both empty where there was none.
	known, content page.Set
}

// newWP takes ownership of uffd, also when it fails.
func newWP(pid int, uffd *os.File, shared *shared) (*wp, error) {
	err := wpHandshake(int(uffd.Fd()))
	var pm *proc.Pagemap
	if err == nil {
		pm, err = proc.OpenPagemap(pid)
	}
	var at *borders
	if err == nil {
		if at, err = openBorders(pid); err != nil {
			err = errors.Join(err, pm.Close())
		}
	}
	if err != nil {
		return nil, errors.Join(err, uffd.Close())
	}
	return &wp{pid: pid, uffd: uffd, pm: pm, at: at, shared: shared, walkers: walkers{pid: pid, pms: []*proc.Pagemap{pm}}}, nil
}

func wpHandshake(fd int) error {
	_, _, err := sys.UffdAPI(fd, wpFeatures)
	if errors.Is(err, unix.EINVAL) {
		err = &sys.NotSupported{Feature: "userfaultfd WP_ASYNC", Since: "6.7", Err: err}
	}
	return err
}

func (t *wp) Method() Method { return WPAsync }

// Close ends the protection of all pages: the kernel does it with the last copy
// of the descriptor.
func (t *wp) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uffd == nil {
		return nil
	}
	err := errors.Join(t.uffd.Close(), t.walkers.close(), t.at.Close())
	t.uffd = nil
	return err
}

func (t *wp) Sent(rs []page.Range, buf []byte) { t.shared.sent(rs, buf) }

func (t *wp) Collect(maps []proc.Mapping) (Pages, error) { return t.look(maps, true) }

func (t *wp) Last(maps []proc.Mapping) (Pages, error) { return t.look(maps, false) }

func (t *wp) look(maps []proc.Mapping, protect bool) (Pages, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uffd == nil {
		return Pages{}, ErrClosed
	}
	p, err := t.collect(maps, protect)
	if err == nil {
		p.Shared, err = t.shared.collect(maps)
	}
	t.seen = err == nil
	if err != nil {
		t.known, t.content = page.Set{}, page.Set{}
		t.shared.forget()
		return Pages{}, fmt.Errorf("dirty: pid %d: %w", t.pid, err)
	}
	return p, nil
}

func (t *wp) collect(maps []proc.Mapping, protect bool) (Pages, error) {
	var f found
	all := runs(maps)
	anon := t.listed(maps)
	more := !t.seen
	if more {
		var last page.Addr
		for i := range all {
			maps := all[i].maps
			if maps[0].Start < last {
				maps = maps[1:] // the rest of one that is registered
			}
			if t.register(maps, false) {
				last = maps[len(maps)-1].End
			}
		}
	}
	before, fresh := page.Intersection(&t.content, &anon), page.Difference(&anon, &t.known)
	var gone []page.Range // of before
	lost := func(r page.Range) { gone = join(gone, r) }
	saw := make([]looked, len(all))
	if err := t.walkers.each(len(all), func(pm *proc.Pagemap, i int) error {
		r, l := &all[i], &saw[i]
		if r.anon && (!protect || r.mapped > uint64(len(r.maps))*fewBytes) && len(fresh.Intersect(r.Range)) == 0 {
			return l.changed(pm, r, protect)
		}
		l.lost(r.Range)
		return l.take(pm, r, !t.seen)
	}); err != nil {
		return Pages{}, err
	}
	for i := range all {
		r := &all[i]
		f.append(&saw[i].found)
		gone = append(gone, saw[i].gone...)
		// What is not registered is looked for afterwards: what is registered by
		// nobody but us can stop being so meanwhile, but not begin.
		n, err := t.untracked(r, &f, lost)
		if err != nil {
			return Pages{}, err
		}
		more = more || n > 0
	}
	if more {
		if err := t.settle(); err != nil {
			return Pages{}, err
		}
	}
	p := f.pages()
	if !before.Empty() {
		no := page.NewSet(gone...)
		before = page.Difference(&before, &no)
		p.Content = page.Union(&before, &p.Content)
	}
	if !within(&p.Written, &p.Content) {
		p.Content = page.Union(&p.Content, &p.Written)
	}
	if !t.seen {
		p.Written = p.Content.Clone()
	}
	t.untold.restrict(&p, maps)
	if !anon.Empty() {
		// The caller's set is its own.
		t.known, t.content = anon, page.Intersection(&p.Content, &anon)
	}
	return p, nil
}

// listed are the anonymous mappings among maps.
func (t *wp) listed(maps []proc.Mapping) (out page.Set) {
	for i := range maps {
		if m := &maps[i]; private(m) && m.Ino == 0 {
			out.Add(m.Range)
		}
	}
	return out
}

// settle registers what is left unregistered after the list of mappings that was
// registered had grown old. mremap fails with EFAULT on what is registered in part
// and would be one mapping otherwise, so that is not to stay until the next look.
// Nothing is protected here: the next look finds it written.
func (t *wp) settle() error {
	const times = 3
	for range times {
		maps, err := proc.ReadMaps(t.pid)
		if err != nil {
			return err
		}
		n := 0
		for _, r := range runs(maps) {
			var all []page.Range
			err := t.pm.Untracked(r.Range, r.anon, func(r page.Range) { all = append(all, r) }, nil, nil)
			if err != nil {
				return err
			}
			for i := range r.maps {
				if all = behind(all, r.maps[i].Start); len(all) > 0 && all[0].Start < r.maps[i].End && t.register(r.maps[i:i+1], true) {
					n++
				}
			}
		}
		if n == 0 {
			break
		}
	}
	return nil
}

// untracked finds what is new, moved or grown. All of it is written. It is
// registered, so that the next look knows more, and protected. Some mappings
// cannot be registered, such as droppable memory and what the program itself has
// registered: they are written every time.
//
// What was known of it is lost.
func (t *wp) untracked(r *run, f *found, lost func(page.Range)) (registered int, err error) {
	var all, fresh []page.Range
	if err := t.pm.Untracked(r.Range, r.anon, func(r page.Range) { all = append(all, r) },
		func(r page.Range) { fresh = append(fresh, r) }, f.addGuard); err != nil {
		return 0, err
	}
	for _, r := range all {
		lost(r)
	}
	for i := 0; i < len(r.maps) && len(all) > 0; i++ {
		m := &r.maps[i]
		// What lies outside all mappings has come after they were listed.
		all, fresh = behind(all, m.Start), behind(fresh, m.Start)
		for k := 0; k < len(fresh) && fresh[k].Start < m.End; k++ {
			in := fresh[k].Intersect(m.Range)
			f.addContent(in)
			f.addWritten(in)
		}
		// Also where there is nothing yet: a mapping that is half registered cannot
		// be moved as a whole.
		if len(all) == 0 || all[0].Start >= m.End || !t.register(r.maps[i:i+1], true) {
			continue
		}
		registered++
		lost(m.Range)
		w := proc.Walk{Content: func(r page.Range) { f.addContent(r); f.addWritten(r) }, Guard: f.addGuard}
		// All of it, also what lies in runs behind, which were walked before.
		for at := m.Start; at < m.End; at += mostMapped {
			if err := t.pm.Take(page.Range{Start: at, End: min(m.End, at+mostMapped)}, r.anon, w); err != nil {
				return 0, err
			}
		}
	}
	return registered, nil
}

// behind leaves out the ranges that end before at.
func behind(rs []page.Range, at page.Addr) []page.Range {
	for len(rs) > 0 && rs[0].End <= at {
		rs = rs[1:]
	}
	return rs
}

// register registers neighbouring mappings, all at once where that can be. again
// says that pages in them may have been protected before.
func (t *wp) register(maps []proc.Mapping, again bool) (ok bool) {
	if len(maps) == 0 {
		return false
	}
	r := page.Range{Start: maps[0].Start, End: maps[len(maps)-1].End}
	fd := int(t.uffd.Fd())
	ok = t.at.hold(r)
	if ok {
		_, err := sys.UffdRegister(fd, uint64(r.Start), r.Bytes(), sys.UffdioRegisterModeWP)
		ok = err == nil
	}
	if !ok {
		if len(maps) == 1 {
			return false // gone meanwhile, or of a kind that cannot be
		}
		half := len(maps) / 2
		a, b := t.register(maps[:half], again), t.register(maps[half:], again)
		return a || b
	}
	if !again {
		return true
	}
	// Before Linux 6.13 pages that mremap moved keep their mark, without its
	// effect: then they would never count as written. To take marks away where there
	// are none costs ten times as much as to look.
	if old, err := t.pm.Marked(r); old || err != nil {
		_ = sys.UffdWriteprotect(fd, uint64(r.Start), r.Bytes(), 0)
	}
	return true
}

func (t *wp) Peek(pages *page.Set) (page.Set, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uffd == nil {
		return page.Set{}, ErrClosed
	}
	var out []page.Range
	if err := t.pm.Look(pages, func(r page.Range) { out = append(out, r) }); err != nil {
		return page.Set{}, fmt.Errorf("dirty: pid %d: %w", t.pid, err)
	}
	return page.NewSet(out...), nil
}
