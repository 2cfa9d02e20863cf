package pager

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/migrate/stream"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Hold fetches files of Show and holds them in memory: from then on they are here, as
// pages are that have arrived, and nothing of them is asked of the source any more. What
// was held already is not fetched again.
func (c *Client) Hold(ctx context.Context, files []int) error {
	_, err := c.call(ctx, opHold, holdMsg{files})
	return err
}

type holdMsg struct {
	Files []int `cbor:"1,keyasint"`
}

func (s *server) hold(m holdMsg) error {
	for _, i := range m.Files {
		s.mu.Lock()
		n, there := len(s.shown.Show.Files), s.held[i] != nil
		s.mu.Unlock()
		if i < 0 || i >= n {
			return fmt.Errorf("pager: hold file %d of %d", i, n)
		}
		if there {
			continue
		}
		fd, err := s.holdOne(i, s.shown.Show.Files[i].Size)
		if err != nil {
			return fmt.Errorf("pager: hold file %d: %w", i, err)
		}
		s.mu.Lock()
		if s.shown.Held == nil {
			s.shown.Held = map[int]int{}
		}
		s.shown.Held[i] = fd
		s.haveHeld(i, fd)
		err = s.saveShown()
		s.mu.Unlock()
		if err != nil {
			return err
		}
	}
	return nil
}

// haveHeld notes that file i is here, in fd; with s.mu, or before anybody reads.
func (s *server) haveHeld(i, fd int) {
	if s.held == nil {
		s.held = map[int]*fusemem.Held{}
	}
	s.held[i] = fusemem.NewHeld(fd, s.shown.Show.Files[i].Size)
}

// holdOne is a descriptor of a copy of a file, with a number that the next pager can keep.
func (s *server) holdOne(i int, size int64) (_ int, err error) {
	low, err := unix.MemfdCreate("pageferry-file", unix.MFD_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("memfd_create", err)
	}
	defer unix.Close(low)
	fd, err := unix.FcntlInt(uintptr(low), unix.F_DUPFD_CLOEXEC, fault.FirstFD)
	if err != nil {
		return -1, os.NewSyscallError("fcntl", err)
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	err = s.eachChunk(i, 0, size, func(at int64, b []byte) error {
		n, err := unix.Pwrite(fd, b, at)
		if err == nil && n < len(b) {
			err = unix.ENOSPC
		}
		return os.NewSyscallError("pwrite", err)
	})
	return fd, err
}

// fileSource is number i of the files, from here or from the source.
func (s *server) fileSource(i int) page.Source { return fileSource{s, i} }

// fileSource is a fusemem.Lender.
type fileSource struct {
	s *server
	i int
}

// held returns the file if it is here, else nil.
func (f fileSource) held() *fusemem.Held {
	f.s.mu.Lock()
	defer f.s.mu.Unlock()
	return f.s.held[f.i]
}

func (f fileSource) Lend(first page.Num, n int) []byte {
	if h := f.held(); h != nil {
		return h.Lend(first, n)
	}
	return nil
}

func (f fileSource) ReadPages(ctx context.Context, first page.Num, buf []byte, prio page.Priority) error {
	if h := f.held(); h != nil {
		return h.ReadPages(ctx, first, buf, prio)
	}
	err := f.s.fetch.Read(ctx, page.FirstFileSpace+page.Space(f.i), first, buf, prio)
	if prio == page.Demand && errors.Is(err, stream.ErrGone) {
		f.s.filesLost.Store(true)
	}
	return err
}
