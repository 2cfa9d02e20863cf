package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/fault"
	"github.com/pageferry/pageferry/fusemem"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// takeStore fetches the store of a dead pager from its keeper and maps it.
func (s *server) takeStore() error {
	pidfd, err := unix.PidfdOpen(s.cfg.OldKeeper, 0)
	if err != nil {
		return fmt.Errorf("pager: keeper %d: %w", s.cfg.OldKeeper, err)
	}
	defer unix.Close(pidfd)
	n, err := findStore(s.cfg.OldKeeper)
	if err != nil {
		return err
	}
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		return fmt.Errorf("pager: page store of keeper %d: %w", s.cfg.OldKeeper, err)
	}
	f := os.NewFile(uintptr(fd), storeName)
	if s.store, err = pagestore.Open(f); err != nil {
		f.Close()
		return fmt.Errorf("pager: page store of keeper %d: %w", s.cfg.OldKeeper, err)
	}
	return nil
}

// findStore is the number of the page store among the keeper's descriptors.
func findStore(keeper int) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", keeper)
	list, err := os.ReadDir(dir)
	if err != nil {
		return -1, fmt.Errorf("pager: descriptors of keeper %d: %w", keeper, err)
	}
	for _, e := range list {
		to, err := os.Readlink(dir + "/" + e.Name())
		if err == nil && strings.HasPrefix(to, "/memfd:"+storeName+" ") {
			return strconv.Atoi(e.Name())
		}
	}
	return -1, fmt.Errorf("pager: keeper %d has no page store", keeper)
}

// takeOver fetches what the old keeper holds. succeed then brings the store up to what
// was read from the userfaultfds, and ends the old keeper. A kill before leaves that, and
// what it holds, as they were; one afterwards leaves our own, which the state file names
// by then. Each descriptor keeps its number, so that both can be taken over.
//
// The former pager may not be gone yet. One of its threads waits where the process's
// memory is locked, maybe by somebody who waits for a file of this migration that
// nobody serves, or for such a file itself, as it was writing to the process. That
// cannot be interrupted. So the files are served first, which needs lanes and thus a
// pager that answers, and the rest waits until the former one is gone.
func (s *server) takeOver() error {
	pidfd, err := unix.PidfdOpen(s.cfg.OldKeeper, 0)
	if err != nil {
		return fmt.Errorf("pager: keeper %d: %w", s.cfg.OldKeeper, err)
	}
	defer unix.Close(pidfd)
	fetch := func(n int) error {
		if err := sameNumber(pidfd, n); err != nil {
			return fmt.Errorf("pager: descriptor %d of keeper %d: %w", n, s.cfg.OldKeeper, err)
		}
		return nil
	}
	for _, sp := range s.store.Spaces() {
		for _, n := range []int{sp.FD(), sp.MemFD()} {
			if n < 0 {
				continue
			}
			if err := fetch(n); err != nil {
				return err
			}
		}
	}
	err = s.takeShown(fetch)
	if err != nil && (len(s.shown.Views) > 0 || s.shown.Needed) && !errors.Is(err, fusemem.ErrNotMounted) {
		return err
	}
	if err != nil { // the process does without, or gets SIGBUS where somebody took it away
		s.log.Warn("the process cannot be read as files any more", "err", err)
	}
	return nil
}

// succession is succeed, which may have to wait where files are shown. From here on the
// state file names this pager.
func (s *server) succession() error {
	if s.fs == nil {
		return s.succeed()
	}
	go func() {
		if err := s.succeed(); err != nil {
			s.log.Error("the memory that the former pager served stays as it is: nobody serves it", "err", err)
		}
	}()
	return nil
}

// succeed does what the former pagers have left undone, when they are gone, and ends
// their keepers.
func (s *server) succeed() error {
	for _, f := range s.cfg.Before {
		if err := s.outlive(f); err != nil {
			return err
		}
	}
	s.trap.Recover(s.inherited)
	if v := s.veiled.Load(); v != nil {
		v.veil.Inherit(s.inherited)
	}
	// With the last copies but ours go the lanes of the dead pager.
	for _, f := range s.cfg.Before {
		if err := endByPID(f.Keeper, f.KeeperStart); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.me.Before = nil
	err := writeState(s.cfg.Dir, s.me)
	s.mu.Unlock()
	close(s.whole)
	if err != nil {
		s.log.Warn("the state file names pagers that are gone", "err", err)
	}
	if v := s.veiled.Load(); v != nil {
		go func() { // a read may have to wait for lanes
			if err := v.veil.Recover(); err != nil {
				s.log.Error("memory that the program gave up", "err", err)
			}
			s.runVeil(v)
		}()
	}
	return nil
}

// outlive returns when pager f is gone.
func (s *server) outlive(f former) error {
	fd, err := openProcess(f.PID, f.Start)
	if errors.Is(err, ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for begin := time.Now(); !waitProcess(fd, time.Second); {
		if s.ctx.Err() != nil {
			return context.Cause(s.ctx)
		}
		if d := time.Since(begin); d > endLimit {
			if s.fs == nil {
				return fmt.Errorf("pager %d does not end after SIGKILL", f.PID)
			}
			s.log.Warn("the pager that was killed has not ended yet; its pages wait", "pid", f.PID, "since", d)
		}
	}
	return nil
}

// inherited fetches userfaultfd n of the former pagers, and gives it a number of its own.
func (s *server) inherited(n int) (fd int, err error) {
	for _, f := range s.cfg.Before {
		var pidfd int
		if pidfd, err = openProcess(f.Keeper, f.KeeperStart); err != nil {
			continue
		}
		fd, err = another(pidfd, n)
		unix.Close(pidfd)
		if err == nil {
			return fd, nil
		}
	}
	return -1, err
}

func another(pidfd, n int) (int, error) {
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	if to, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || to != "anon_inode:[userfaultfd]" {
		return -1, fmt.Errorf("pager: descriptor %d is %q, not a userfaultfd", n, to)
	}
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, fault.FirstFD)
}

// sameNumber fetches descriptor n and gives it the same number here.
func sameNumber(pidfd, n int) error {
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.FcntlInt(uintptr(n), unix.F_GETFD, 0); err == nil {
		return errors.New("its number is taken")
	}
	return unix.Dup3(fd, n, unix.O_CLOEXEC)
}
