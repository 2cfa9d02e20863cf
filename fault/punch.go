package fault

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// punching lists what threads of pid are about to punch out of memory that they
// share, by madvise(MADV_REMOVE). Such a thread waits in the kernel until its
// event is read, so it can be seen before. The event itself does not tell
// MADV_REMOVE from MADV_DONTNEED, which keeps the content of shared memory.
func punching(pid int) (out []page.Range) {
	return advising(pid, unix.MADV_REMOVE)
}

// calls are the system calls that threads of a process are in, as far as they matter
// to a Veil.
type calls struct {
	ranges   []page.Range // that are being given up, by MADV_DONTNEED and the like
	keeping  []page.Range // for which MADV_FREE is going to fail, behind the same event
	moves    []move
	changing bool // mappings
	forking  bool
	running  bool // what some thread is at is not known: it is in no call, or at work in one
}

// move is a mremap of old bytes at from, which are size afterwards, or their munmap.
// stays: what was moved stays mapped (MREMAP_DONTUNMAP).
type move struct {
	from, old, size page.Addr
	stays, unmap    bool
}

func giving(pid int) (c calls) {
	eachSyscall(pid, func(s string) {
		c.running = c.running || strings.HasPrefix(s, "running")
		if r, ok := parseAdvice(s, []uint32{unix.MADV_DONTNEED, madvDontneedLocked}); ok {
			c.ranges = append(c.ranges, r)
		}
		if r, ok := parseAdvice(s, []uint32{unix.MADV_FREE}); ok {
			c.keeping = append(c.keeping, r)
		}
		nr := -1
		var from, was, is, flags uint64
		_, _ = fmt.Sscanf(s, "%d 0x%x 0x%x 0x%x 0x%x", &nr, &from, &was, &is, &flags)
		switch nr {
		case unix.SYS_MREMAP:
			c.moves = append(c.moves, move{from: page.Addr(from), old: page.Addr(was).Ceil(), size: page.Addr(is).Ceil(), stays: flags&unix.MREMAP_DONTUNMAP != 0})
			c.changing = true
		case unix.SYS_MUNMAP:
			c.moves = append(c.moves, move{from: page.Addr(from), old: page.Addr(was).Ceil(), unmap: true})
			c.changing = true
		case unix.SYS_BRK, unix.SYS_MMAP, unix.SYS_SHMAT, unix.SYS_SHMDT:
			c.changing = true
		case unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_CLONE, unix.SYS_CLONE3:
			c.forking = true
		}
	})
	return c
}

// From <asm-generic/mman-common.h>, 5.18.
const madvDontneedLocked = 24

// advising lists the ranges for which threads of pid are in a madvise of one of
// those kinds.
func advising(pid int, advice ...uint32) (out []page.Range) {
	eachSyscall(pid, func(s string) {
		if r, ok := parseAdvice(s, advice); ok {
			out = append(out, r)
		}
	})
	return out
}

// threads is how many threads pid has; 0 where that is not known.
func threads(pid int) int {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return 0
	}
	return len(tasks)
}

// eachSyscall calls f with what proc_pid_syscall(5) says of each thread of pid.
func eachSyscall(pid int, f func(s string)) {
	if pid <= 0 {
		return
	}
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range tasks {
		if b, err := os.ReadFile(dir + "/" + e.Name() + "/syscall"); err == nil {
			f(string(b))
		}
	}
}

// parseAdvice reads /proc/PID/task/TID/syscall (proc_pid_syscall(5)).
func parseAdvice(s string, kinds []uint32) (page.Range, bool) {
	var nr int
	var start, length, advice uint64
	if n, err := fmt.Sscanf(strings.TrimSpace(s), "%d 0x%x 0x%x 0x%x", &nr, &start, &length, &advice); n != 4 || err != nil {
		return page.Range{}, false
	}
	if nr != unix.SYS_MADVISE || !slices.Contains(kinds, uint32(advice)) || start+length < start {
		return page.Range{}, false
	}
	return page.Range{Start: page.Addr(start).Floor(), End: page.Addr(start + length).Ceil()}, true
}
