package fds

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
)

func makeEventFD(s *image.EventFD) (int, error) {
	flags := unix.EFD_CLOEXEC
	if s.Semaphore {
		flags |= unix.EFD_SEMAPHORE
	}
	fd, err := unix.Eventfd(0, flags)
	if err != nil || s.Count == 0 {
		return fd, err
	}
	if _, err := unix.Write(fd, le.AppendUint64(nil, s.Count)); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("count %d of eventfd: %w", s.Count, err)
	}
	return fd, nil
}

func makeTimerFD(s *image.TimerFD) (int, error) {
	fd, err := unix.TimerfdCreate(s.Clock, unix.TFD_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("timerfd of clock %d: %w", s.Clock, err)
	}
	value, flags := s.ValueNS, 0
	if s.ValueNS != 0 && s.SetFlags&unix.TFD_TIMER_ABSTIME != 0 {
		// What is left is counted from now; the form stays, because a change of
		// the clock moves or cancels such a timer.
		var now unix.Timespec
		if err := unix.ClockGettime(int32(s.Clock), &now); err == nil {
			value += now.Nano()
			flags = s.SetFlags
		}
	}
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(value), Interval: unix.NsecToTimespec(s.IntervalNS)}
	if err := unix.TimerfdSettime(fd, flags, &spec, nil); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set timerfd: %w", err)
	}
	if s.Ticks > 0 {
		if err := sys.SetTimerFDTicks(fd, s.Ticks); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

func makeInotify(f *image.OpenFile) (int, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	// The kernel lists the newest first, and serves them in that order.
	for _, w := range slices.Backward(f.Inotify) {
		err := sys.SetNextWatch(fd, w.WD)
		if err == nil {
			var wd int
			wd, err = unix.InotifyAddWatch(fd, w.Path, w.Mask|unix.IN_DONT_FOLLOW)
			if err == nil && wd != w.WD {
				err = fmt.Errorf("got number %d", wd)
			}
		}
		if err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("watch %d of %s: %w", w.WD, w.Path, err)
		}
	}
	return fd, nil
}
