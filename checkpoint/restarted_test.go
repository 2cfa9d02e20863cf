package checkpoint

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
)

// TestShaped: the arguments of each call that can be restarted tell which it is.
func TestShaped(t *testing.T) {
	const span, deadline, fds, word, junk = 0x7f0000001000, 0x7f0000002000, 0x7f0000003000, 0x7f0000004000, 0x7f0000005000
	memory := map[uint64][]byte{
		span: timespecBytes(1000, 5), deadline: timespecBytes(1_700_000_000, 999_999_999), junk: timespecBytes(-1, 1e9),
		fds: timespecBytes(-1, -1), word: {2, 0, 0, 0},
	}
	read := func(b []byte, at uint64) bool {
		m, ok := memory[at]
		copy(b, m)
		return ok
	}
	const minus6 = 0xfffffffa
	for _, c := range []struct {
		what string
		r    sys.Regs
		want uint64
	}{
		{"sleep", sys.Regs{Rdx: span, R10: span}, unix.SYS_CLOCK_NANOSLEEP},
		{"clock_nanosleep on a clock of its own", sys.Regs{Rdi: minus6, Rdx: span}, unix.SYS_CLOCK_NANOSLEEP},
		{"until a time, which has no restart block", sys.Regs{Rdi: 1, Rsi: 1, Rdx: span}, unix.SYS_RESTART_SYSCALL},
		{"nanosleep", sys.Regs{Rdi: span}, unix.SYS_NANOSLEEP},
		{"nanosleep, what is left to be told", sys.Regs{Rdi: span, Rsi: junk}, unix.SYS_NANOSLEEP},
		{"poll of one", sys.Regs{Rdi: fds, Rsi: 1, Rdx: 30_000}, unix.SYS_POLL},
		{"poll as a sleep", sys.Regs{Rdx: 30_000}, unix.SYS_POLL},
		{"poll of 137, the number of a futex operation", sys.Regs{Rdi: fds, Rsi: 137, Rdx: 30_000}, unix.SYS_POLL},
		{"pthread_cond_timedwait", sys.Regs{Rdi: word, Rsi: 0x189, Rdx: 2, R10: deadline}, unix.SYS_FUTEX},
		{"futex between processes", sys.Regs{Rdi: word, Rdx: 2, R10: span}, unix.SYS_FUTEX},
		{"none", sys.Regs{Rdi: junk, Rsi: junk, Rdx: junk, R10: junk}, unix.SYS_RESTART_SYSCALL},
		{"nothing there", sys.Regs{Rdi: 0x1000, Rdx: 0x2000_0000_0000}, unix.SYS_RESTART_SYSCALL},
	} {
		if got := shaped(&c.r, read); got != c.want {
			t.Errorf("%s: %d, want %d", c.what, got, c.want)
		}
	}
}

func timespecBytes(sec, ns int64) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(sec))
	return binary.LittleEndian.AppendUint64(b, uint64(ns))
}
