package checkpoint

import (
	"encoding/binary"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/inject"
)

// wait is a call with a timeout of which the kernel does not know, after a stop,
// how much of it is left: it begins anew. A thread that is stopped again and again
// before it is over would wait for ever.
type wait struct {
	mark   uint32 // of the call
	since  time.Time
	limit  time.Duration // 0: it has no timeout
	answer int64         // when that is over
}

// keepTime lets the call of a thread that has just stopped return what it does when
// its time is over, if that is so, counted from the first stop. Not among them are
// calls for which the kernel keeps the time (poll, futex, nanosleep) or writes what
// is left of it where the timeout was (select, ppoll).
func (s *Session) keepTime(tid int, how *inject.Interrupted) {
	if s.waits == nil || how.Code == 0 {
		return
	}
	w := s.waits[tid]
	if how.Mark == 0 || how.Mark != w.mark {
		w = wait{mark: w.mark%(1<<31-1) + 1, since: time.Now()}
		w.limit, w.answer = s.timeout(how)
		s.waits[tid] = w
	}
	switch {
	case w.limit == 0:
	case time.Since(w.since) >= w.limit:
		how.Answer(w.answer)
	default:
		how.SetMark(w.mark)
	}
}

// timeout is how long a call may wait, 0 where it has no limit that begins anew,
// and what it returns then.
func (s *Session) timeout(how *inject.Interrupted) (limit time.Duration, answer int64) {
	r := &how.Kernel
	switch how.Nr {
	case unix.SYS_EPOLL_WAIT, unix.SYS_EPOLL_PWAIT:
		return time.Duration(max(int32(r.R10), 0)) * time.Millisecond, 0
	case unix.SYS_EPOLL_PWAIT2:
		return s.timespec(r.R10), 0
	case unix.SYS_IO_GETEVENTS, unix.SYS_IO_PGETEVENTS:
		return s.timespec(r.R8), 0
	case unix.SYS_SEMTIMEDOP:
		return s.timespec(r.R10), -int64(unix.EAGAIN)
	case unix.SYS_RT_SIGTIMEDWAIT:
		return s.timespec(r.Rdx), -int64(unix.EAGAIN)
	case unix.SYS_READ, unix.SYS_READV, unix.SYS_RECVFROM, unix.SYS_RECVMSG, unix.SYS_RECVMMSG, unix.SYS_ACCEPT, unix.SYS_ACCEPT4:
		return s.socketTime(how, unix.SO_RCVTIMEO), -int64(unix.EAGAIN)
	case unix.SYS_WRITE, unix.SYS_WRITEV, unix.SYS_SENDTO, unix.SYS_SENDMSG, unix.SYS_SENDMMSG:
		return s.socketTime(how, unix.SO_SNDTIMEO), -int64(unix.EAGAIN)
	}
	return 0, 0
}

// timespec reads the timeout that a call was given; 0 where there is none.
func (s *Session) timespec(at uint64) time.Duration {
	var b [16]byte
	m := s.mem.Load()
	if at == 0 || m == nil || m.ReadAt(b[:], addr(at)) != nil {
		return 0
	}
	sec, ns := binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])
	return duration(sec, ns)
}

// socketTime is the timeout of the socket that a call waits for, socket(7). A call
// with one was marked as restarted by Interpret: the others the kernel restarts as
// SA_RESTART says.
func (s *Session) socketTime(how *inject.Interrupted, option int) time.Duration {
	if how.Code != inject.ERESTARTNOHAND {
		return 0
	}
	fd, err := unix.PidfdGetfd(s.pidfd, int(int32(how.Kernel.Rdi)), 0)
	if err != nil {
		return 0
	}
	defer unix.Close(fd)
	tv, err := unix.GetsockoptTimeval(fd, unix.SOL_SOCKET, option)
	if err != nil {
		return 0 // no socket
	}
	return duration(uint64(tv.Sec), uint64(tv.Usec)*1000)
}

// duration of more than 100 years is none.
func duration(sec, ns uint64) time.Duration {
	if sec > 100*365*24*3600 || ns >= 1e9 {
		return 0
	}
	return time.Duration(sec)*time.Second + time.Duration(ns)
}
