package fault

import (
	"fmt"
	"os"
	"strings"

	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// punching lists what threads of pid are about to punch out of memory that they
// share, by madvise(MADV_REMOVE). Such a thread waits in the kernel until its
// event is read, so it can be seen before. The event itself does not tell
// MADV_REMOVE from MADV_DONTNEED, which keeps the content of shared memory.
func punching(pid int) (out []page.Range) {
	if pid <= 0 {
		return nil
	}
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range tasks {
		b, err := os.ReadFile(dir + "/" + e.Name() + "/syscall")
		if err != nil {
			continue
		}
		if r, ok := parsePunch(string(b)); ok {
			out = append(out, r)
		}
	}
	return out
}

// parsePunch reads /proc/PID/task/TID/syscall (proc_pid_syscall(5)).
func parsePunch(s string) (page.Range, bool) {
	var nr int
	var start, length, advice uint64
	if n, err := fmt.Sscanf(strings.TrimSpace(s), "%d 0x%x 0x%x 0x%x", &nr, &start, &length, &advice); n != 4 || err != nil {
		return page.Range{}, false
	}
	if nr != unix.SYS_MADVISE || uint32(advice) != unix.MADV_REMOVE || start+length < start {
		return page.Range{}, false
	}
	return page.Range{Start: page.Addr(start).Floor(), End: page.Addr(start + length).Ceil()}, true
}
