package restore

import (
	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/page"
)

// mostVectors is IOV_MAX, how many ranges one call takes.
const mostVectors = 1024

// giveUp has the process give up its pages of rs. It gives advice to itself by
// process_madvise(2): many ranges in one call, whose TLB flushes are one, take a third
// of the time, 0.6 us a page. Linux before 6.13 refuses that for MADV_DONTNEED; then
// each range takes a call.
func (s *Skeleton) giveUp(rs []page.Range) error {
	sc := newScript(s.target.t)
	sc.on(func() string { return "giving up of stale pages" })
	pid := sc.call(unix.SYS_GETPID)
	self := sc.call(unix.SYS_PIDFD_OPEN, 0, 0).Arg(0, pid)
	var left [][]page.Range
	var check []func() (uint64, error)
	for advice := uint64(unix.MADV_DONTNEED); len(rs) > 0; {
		if s.oneByOne {
			advice = ^uint64(0)
		}
		n := min(len(rs), mostVectors)
		var vec []byte
		for _, r := range rs[:n] {
			vec = append(vec, le64(uint64(r.Start), r.Bytes())...)
		}
		done := sc.call(unix.SYS_PROCESS_MADVISE, 0, sc.Bytes(vec), uint64(n), advice, 0).Arg(0, self).Optional()
		left, check, rs = append(left, rs[:n]), append(check, done.Ret), rs[n:]
	}
	sc.call(unix.SYS_CLOSE, 0).Arg(0, self)
	if err := sc.run(s.target.pid); err != nil {
		return err
	}
	sc = newScript(s.target.t)
	sc.on(func() string { return "giving up of stale pages" })
	for i, rs := range left {
		var want uint64
		for _, r := range rs {
			want += r.Bytes()
		}
		if got, err := check[i](); err == nil && got == want {
			s.vectors++
			continue
		}
		for _, r := range rs {
			sc.call(unix.SYS_MADVISE, uint64(r.Start), r.Bytes(), unix.MADV_DONTNEED)
		}
	}
	return sc.run(s.target.pid)
}
