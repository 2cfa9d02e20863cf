package pager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// adopt takes up an address space.
func (s *server) adopt(m adoptMsg, p packet, files []*os.File) error {
	n := 0
	for _, has := range []bool{m.UFFD, m.Mem, m.Veil} {
		if has {
			n++
		}
	}
	if err := wantFiles(p, files, n); err != nil {
		return err
	}
	segs := make([]pagestore.Segment, len(m.Regions))
	for i, r := range m.Regions {
		segs[i] = pagestore.Segment{Dst: r.Range, Src: r.Range.Start}
		if r.Shadow != 0 {
			segs[i].Dst = page.Range{Start: r.Shadow, End: r.Shadow + page.Addr(r.Range.Bytes())}
		}
		switch {
		case r.Kind == Written && !m.Mem:
			return fmt.Errorf("pager: region %v is to be written, and there is no memory file", r.Range)
		case r.Kind == Trapped && !m.UFFD:
			return fmt.Errorf("pager: region %v is trapped, and there is no userfaultfd", r.Range)
		case r.Kind == Written:
			segs[i].Flags |= pagestore.Written
		case r.Kind != Trapped:
			return fmt.Errorf("pager: region %v of kind %d", r.Range, r.Kind)
		}
		if r.Shared {
			segs[i].Flags |= pagestore.Shared
		}
	}
	if err := covered(&m); err != nil {
		return err
	}
	if err := checkViews(m.Views, m.Regions); err != nil {
		return err
	}
	if m.Veil && (!m.Mem || !filepath.IsAbs(m.Group)) {
		return errors.New("pager: memory is veiled, and there is no memory file or no cgroup")
	}
	// Numbers that a pager which takes over can keep.
	fds := []int{-1, -1, -1}
	for i, has := range []bool{m.UFFD, m.Mem, m.Veil} {
		if !has {
			continue
		}
		fd, err := dupHigh(files[0])
		if err != nil {
			return err
		}
		defer func() {
			if fds[i] >= 0 {
				unix.Close(fds[i])
			}
		}()
		fds[i], files = fd, files[1:]
	}
	for i, has := range []bool{m.UFFD, m.Veil} {
		if !has {
			continue
		}
		// A blocking descriptor would hold up all the others.
		if err := unix.SetNonblock(fds[2*i], true); err != nil {
			return fmt.Errorf("pager: userfaultfd: %w", err)
		}
	}
	// What is known of veiled memory goes by pages that the source has, here or not.
	lazy := page.Union(&m.Lazy, &m.Kept)
	src, err := s.store.AddSource(m.Space, lazy, m.Eager, m.Hot)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.eager, s.all = make(chan struct{}), make(chan struct{})
	s.mu.Unlock()
	sp, err := s.store.AddSpace(src, m.PID, fds[0], fds[1], segs)
	if err != nil {
		return err
	}
	for _, r := range m.Kept.Ranges() {
		src.Each(r, func(p page.Range, first int) { s.store.Add(pagestore.Kept, uint64(sp.Settle(first, first+p.Pages()))) })
	}
	mem, veil := fds[1], fds[2]
	fds[0], fds[1] = -1, -1
	if m.Veil {
		fds[2] = -1
		if err := s.veil(src, &m, veil, mem); err != nil {
			return err
		}
	}
	if err := s.setBacked(m.Shown, m.Regions); err != nil {
		return err
	}
	s.trap.Kick()
	s.fetch.Start(s.store.Flag(pagestore.FlagFetching))
	return nil
}

// covered checks that every page has a region, lazy ones a trapped one.
func covered(m *adoptMsg) error {
	var trapped, all page.Set
	for _, r := range m.Regions {
		all.Add(r.Range)
		if r.Kind == Trapped {
			trapped.Add(r.Range)
		}
	}
	for _, c := range []struct {
		what    string
		set, in *page.Set
	}{{"lazy", &m.Lazy, &trapped}, {"eager", &m.Eager, &all}} {
		for _, r := range c.set.Ranges() {
			if !c.in.Covers(r) {
				return fmt.Errorf("pager: space %d: %s pages %v have no region to go to", m.Space, c.what, r)
			}
		}
	}
	return nil
}

func dupHigh(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("pager: descriptor: %w", err)
	}
	fd, dupErr := -1, error(nil)
	if err := rc.Control(func(p uintptr) { fd, dupErr = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, fault.FirstFD) }); err != nil {
		return -1, fmt.Errorf("pager: descriptor: %w", err)
	}
	if dupErr != nil {
		return -1, fmt.Errorf("pager: copy descriptor: %w", dupErr)
	}
	return fd, nil
}
