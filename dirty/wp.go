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
// Only pages that are there are protected. Protecting what is not, as the kernel
// can, would fill the page tables of all that a program reserved and never used.
// It is not needed either: a page that appears later has no protection and
// counts as written.
type wp struct {
	pid int

	mu     sync.Mutex
	uffd   *os.File // nil once closed
	pm     *proc.Pagemap
	strict bool // errors were seen: everything counts as written the next time
}

// NewWPAsync tracks pid by uffd, a userfaultfd that the process itself has made,
// with no API negotiated (UFFD_USER_MODE_ONLY will do), and takes ownership of it,
// also when it fails. The process must not have it any more. *sys.NotSupported
// before Linux 6.7.
func NewWPAsync(pid int, uffd *os.File) (Tracker, error) {
	_, _, err := sys.UffdAPI(int(uffd.Fd()), wpFeatures)
	if errors.Is(err, unix.EINVAL) {
		err = &sys.NotSupported{Feature: "userfaultfd WP_ASYNC", Since: "6.7", Err: err}
	}
	var pm *proc.Pagemap
	if err == nil {
		pm, err = proc.OpenPagemap(pid)
	}
	if err != nil {
		_ = uffd.Close()
		return nil, fmt.Errorf("dirty: track pid %d: %w", pid, err)
	}
	return &wp{pid: pid, uffd: uffd, pm: pm}, nil
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
	err := errors.Join(t.uffd.Close(), t.pm.Close())
	t.uffd = nil
	return err
}

func (t *wp) Collect(maps []proc.Mapping) (Pages, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uffd == nil {
		return Pages{}, ErrClosed
	}
	var p Pages
	err := t.collect(maps, &p)
	if err != nil {
		t.strict = true
		return Pages{}, fmt.Errorf("dirty: pid %d: %w", t.pid, err)
	}
	if t.strict {
		p.Written, t.strict = p.Content.Clone(), false
	}
	return p, nil
}

func (t *wp) collect(maps []proc.Mapping, p *Pages) error {
	var content, written, guards []page.Range
	walk := proc.Walk{
		Content: func(r page.Range) { content = append(content, r) },
		Written: func(r page.Range) { written = append(written, r) },
		Guard:   func(r page.Range) { guards = append(guards, r) },
	}
	for i := range maps {
		m := &maps[i]
		if m.Shared || special(m) {
			continue
		}
		c, w, g := len(content), len(written), len(guards)
		err := t.pm.Take(m.Range, m.Ino == 0, walk)
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EPERM) {
			return err
		}
		// Not registered, or part of it: new, moved or grown. What the walk has
		// cleared before it found out is not known, so all of it is written.
		tracked := true
		if _, err := sys.UffdRegister(int(t.uffd.Fd()), uint64(m.Start), m.Bytes(), sys.UffdioRegisterModeWP); err != nil {
			tracked = false // gone meanwhile, or of a kind that cannot be
		}
		content, written, guards = content[:c], written[:w], guards[:g]
		all := walk
		all.Written = func(page.Range) {}
		if tracked {
			err = t.pm.Take(m.Range, m.Ino == 0, all)
			tracked = !errors.Is(err, unix.EPERM)
		}
		if !tracked {
			content, guards = content[:c], guards[:g]
			err = t.pm.Find(m.Range, m.Ino == 0, all.Content, all.Guard)
		}
		if err != nil {
			return err
		}
		written = append(written, content[c:]...)
	}
	p.Content, p.Written, p.Guards = page.NewSet(content...), page.NewSet(written...), page.NewSet(guards...)
	return nil
}

func (t *wp) Peek(pages *page.Set) (page.Set, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.uffd == nil {
		return page.Set{}, ErrClosed
	}
	var out []page.Range
	for _, r := range pages.Ranges() {
		err := t.pm.Look(r, func(r page.Range) { out = append(out, r) })
		if err != nil {
			return page.Set{}, fmt.Errorf("dirty: pid %d: %w", t.pid, err)
		}
	}
	return page.NewSet(out...), nil
}
