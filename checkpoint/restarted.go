package checkpoint

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
)

// restarted finds which call a thread is in that the kernel has restarted once
// already, by restart_syscall: rax no longer says it. Four calls leave a restart
// block (kernel: restart_block.fn): nanosleep, clock_nanosleep, poll and futex.
// Without an answer it returns restart_syscall itself.
func (c *capture) restarted(r *sys.Regs) uint64 {
	m := c.s.mem.Load()
	if m == nil {
		return unix.SYS_RESTART_SYSCALL
	}
	read := func(b []byte, at uint64) bool { return m.ReadAt(b, addr(at)) == nil }
	if nr := loadedBefore(r.Rip, read); nr != unix.SYS_RESTART_SYSCALL {
		return nr
	}
	return shaped(r, read)
}

// loadedBefore looks for the instruction that loads the number just before the
// call at, as most libraries have it.
func loadedBefore(at uint64, read func([]byte, uint64) bool) uint64 {
	const before = 24
	var code [before]byte
	if !read(code[:], at-before) {
		return unix.SYS_RESTART_SYSCALL
	}
	for i := before - 5; i >= 0; i-- {
		const movEAX = 0xb8
		if code[i] != movEAX {
			continue
		}
		switch nr := uint64(binary.LittleEndian.Uint32(code[i+1:])); nr {
		case unix.SYS_POLL, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_FUTEX:
			return nr
		}
	}
	return unix.SYS_RESTART_SYSCALL
}

// shaped goes by the arguments, where one function makes all calls and the number
// came to it as an argument (glibc's __syscall_cancel_arch since 2.41, Go's
// Syscall6); both set arguments that a call does not have to 0. What fits no call,
// or two, is restart_syscall: the program sees EINTR then.
func shaped(r *sys.Regs, read func([]byte, uint64) bool) uint64 {
	timespec := func(at uint64) bool {
		var b [16]byte
		if at < page.Size || !read(b[:], at) {
			return false
		}
		sec, ns := int64(binary.LittleEndian.Uint64(b[:])), binary.LittleEndian.Uint64(b[8:])
		return sec >= 0 && ns < 1e9
	}
	memory := func(at uint64) bool {
		var b [4]byte
		return at >= page.Size && read(b[:], at)
	}
	const (
		wait, waitBitset    = 0, 9 // futex(2)
		private, realtime   = 128, 256
		maxClock, maxPolled = 15, 1 << 20
	)
	op := r.Rsi &^ (private | realtime)
	if (op == wait || op == waitBitset) && r.Rdi%4 == 0 && memory(r.Rdi) && timespec(r.R10) {
		return unix.SYS_FUTEX
	}
	var fits []uint64
	// Clocks of processes and threads are negative numbers of 32 bits.
	clock := r.Rdi <= maxClock || int32(r.Rdi) < 0 && (r.Rdi>>32 == 0 || r.Rdi>>32 == 1<<32-1)
	if clock && r.Rsi == 0 && timespec(r.Rdx) {
		fits = append(fits, unix.SYS_CLOCK_NANOSLEEP)
	}
	if timespec(r.Rdi) && (r.Rsi == 0 || memory(r.Rsi)) && r.Rdx == 0 {
		fits = append(fits, unix.SYS_NANOSLEEP)
	}
	timeout := r.Rdx > 0 && r.Rdx < 1<<31 // milliseconds
	if timeout && r.Rsi <= maxPolled && (r.Rsi == 0 || memory(r.Rdi)) {
		fits = append(fits, unix.SYS_POLL)
	}
	if len(fits) != 1 {
		return unix.SYS_RESTART_SYSCALL
	}
	return fits[0]
}
