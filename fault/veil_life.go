package fault

import (
	"errors"
	"slices"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
	"golang.org/x/sys/unix"
)

// only is the one process that fd can be of, or 0.
func (v *Veil) only(fd int, pids []int) int {
	if fd == v.src.VeilFDs()[0] {
		return v.cfg.PID
	}
	rest := slices.DeleteFunc(slices.Clone(pids), func(pid int) bool { return pid == v.cfg.PID })
	if len(rest) == 1 {
		return rest[0]
	}
	return 0
}

// adopt takes up the userfaultfd of a child.
func (v *Veil) adopt(fd int) {
	for _, old := range v.src.VeilFDs() {
		// Those of children that have ended: the kernel says so to any request.
		if errors.Is(sys.UffdWake(old, lowest, page.Size), unix.ESRCH) {
			v.drop(old)
		}
	}
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, FirstFD)
	if err == nil {
		_ = unix.SetNonblock(high, true)
		err = v.src.AddVeilFD(high)
	}
	if err != nil {
		// It is kept open: the child waits where it gives memory up, instead of
		// finding there what it had given up.
		v.log.Error("a forked child cannot be followed: it stops where it gives memory up", "err", err)
		return
	}
	_ = unix.Close(fd)
}

// Inherit takes up what a pager that was killed had read of forks. adopt fetches a
// descriptor of it. Call it before Recover.
func (v *Veil) Inherit(adopt func(fd int) (int, error)) {
	for k := range pagestore.MaxVeilEvents {
		m, _, ok := v.src.VeilEvent(k)
		if !ok || m.Event != sys.UffdEventFork {
			continue
		}
		if fd, err := adopt(m.ForkFD); err == nil {
			if err := v.src.AddVeilFD(fd); err != nil {
				v.log.Error("a forked child cannot be followed: it stops where it gives memory up", "err", err)
			}
		} // else it had been taken up already
	}
}

// Recover goes on where a pager that was killed may have been. Call it before Run,
// with the file being served: it may wait for pages.
func (v *Veil) Recover() error {
	v.busy.Lock()
	defer v.busy.Unlock()
	if err := v.cfg.Invalidate(everything); err != nil {
		return err
	}
	if v.src.Stopping() {
		return v.standing()
	}
	v.moves = nil
	v.src.ClearVeilEvents()
	return nil
}
