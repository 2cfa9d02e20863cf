package restore

import (
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
)

// maxTimerSkips bounds how many timers are made and deleted to reach a number,
// on kernels that cannot be asked for it.
const maxTimerSkips = 1 << 16

// createTimers makes the POSIX timers, with the numbers that they had, disarmed.
// Threads that they notify must be there. askForIDs says that the kernel takes
// the number (6.15); older ones count up from 0.
func createTimers(t *inject.Target, tid int, timers []image.PosixTimer, askForIDs bool) error {
	if len(timers) == 0 {
		return nil
	}
	timers = slices.Clone(timers)
	slices.SortFunc(timers, func(a, b image.PosixTimer) int { return a.ID - b.ID })
	s := newScript(t)
	if askForIDs {
		s.onf("timer ids")
		s.call(unix.SYS_PRCTL, sys.PrTimerCreateRestoreIDs, sys.PrTimerCreateRestoreIDsOn, 0, 0, 0)
		for i := range timers {
			createTimer(s, &timers[i])
		}
		s.call(unix.SYS_PRCTL, sys.PrTimerCreateRestoreIDs, sys.PrTimerCreateRestoreIDsOff, 0, 0, 0)
		return s.run(tid)
	}
	if last := timers[len(timers)-1].ID; last > maxTimerSkips {
		return about(fmt.Errorf("%w: this kernel cannot be asked for a timer's number (needs Linux 6.15)", ErrUnsupported), "timer %d", last)
	}
	none := put(s, &sys.Sigevent{Notify: sys.SigevNone})
	const perBatch = 2048
	next := 0
	for i := range timers {
		for ; next < timers[i].ID; next++ {
			if next%perBatch == perBatch-1 {
				if err := s.run(tid); err != nil {
					return err
				}
				s = newScript(t)
				none = put(s, &sys.Sigevent{Notify: sys.SigevNone})
			}
			id := s.Space(4).Addr()
			s.onf("timer %d, to be deleted", next)
			s.call(unix.SYS_TIMER_CREATE, unix.CLOCK_MONOTONIC, none, id)
			s.call(unix.SYS_TIMER_DELETE, 0).ArgAt32(0, id)
		}
		createTimer(s, &timers[i])
		next++
	}
	return s.run(tid)
}

// createTimer makes one timer. Arming it by its number later fails if it has
// got another.
func createTimer(s *script, t *image.PosixTimer) {
	s.on(func() string { return fmt.Sprintf("timer %d", t.ID) })
	ev := put(s, &sys.Sigevent{Value: t.Value, Signo: t.Signal, Notify: t.Notify, TID: int32(t.NotifyTID)})
	s.call(unix.SYS_TIMER_CREATE, uint64(int64(t.Clock)), ev, s.Bytes(le32(uint32(t.ID))))
}

// armTimers starts all timers. It comes last: what they have left begins to
// count here.
func armTimers(s *script, p *image.Process) {
	for i := range p.PosixTimers {
		t := &p.PosixTimers[i]
		s.on(func() string { return fmt.Sprintf("timer %d", t.ID) })
		v := sys.Itimerspec{Interval: timespec(t.IntervalNS), Value: timespec(t.ValueNS)}
		s.call(unix.SYS_TIMER_SETTIME, uint64(t.ID), 0, put(s, &v), 0)
	}
	for i, it := range p.ITimers {
		if it == (image.ITimer{}) {
			continue
		}
		s.on(func() string { return fmt.Sprintf("interval timer %d", i) })
		const us = 1_000_000
		v := sys.Itimerval{
			IntervalSec: int64(it.IntervalUS / us), IntervalUS: int64(it.IntervalUS % us),
			ValueSec: int64(it.ValueUS / us), ValueUS: int64(it.ValueUS % us),
		}
		s.call(unix.SYS_SETITIMER, uint64(i), put(s, &v), 0)
	}
}

func timespec(ns int64) sys.Timespec {
	return sys.Timespec{Sec: ns / int64(time.Second), Nsec: ns % int64(time.Second)}
}
