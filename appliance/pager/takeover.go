package pager

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/fault"
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

// takeOver fetches the userfaultfds from the old keeper, brings the store up to
// what was read from them, and ends the keeper. A kill on the way leaves the
// old keeper, and what it holds, as they were: each descriptor keeps its number,
// so that both this process's keeper and the old one can be taken over.
func (s *server) takeOver() error {
	pidfd, err := unix.PidfdOpen(s.cfg.OldKeeper, 0)
	if err != nil {
		return fmt.Errorf("pager: keeper %d: %w", s.cfg.OldKeeper, err)
	}
	defer unix.Close(pidfd)
	for _, sp := range s.store.Spaces() {
		for _, n := range []int{sp.FD(), sp.MemFD()} {
			if n < 0 {
				continue
			}
			if err := sameNumber(pidfd, n); err != nil {
				return fmt.Errorf("pager: descriptor %d of keeper %d: %w", n, s.cfg.OldKeeper, err)
			}
		}
	}
	another := func(n int) (int, error) {
		fd, err := unix.PidfdGetfd(pidfd, n, 0)
		if err != nil {
			return -1, err
		}
		defer unix.Close(fd)
		return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, fault.FirstFD)
	}
	s.trap.Recover(another)
	err = s.takeShown(func(n int) error {
		if err := sameNumber(pidfd, n); err != nil {
			return fmt.Errorf("pager: descriptor %d of keeper %d: %w", n, s.cfg.OldKeeper, err)
		}
		return nil
	}, another)
	if err != nil && len(s.shown.Views) > 0 {
		return err
	}
	if err != nil { // the process does without
		s.log.Warn("the process cannot be read as files any more", "err", err)
	}
	// With the last copies but ours go the lanes of the dead pager.
	return endProcess(pidfd, 10*time.Second)
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
