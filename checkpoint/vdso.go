package checkpoint

import (
	"fmt"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// A thread that is stopped inside the vdso cannot go to another kernel, which has
// another one: it can be put to the beginning of its functions but not into their
// middle. So it is let run on for a moment and stopped again, until it stands
// elsewhere. (Not by single steps: a tracer that is killed would leave the
// processor's trap flag behind, and the program would die of SIGTRAP.)
const (
	// vdsoTries bounds that. A thread that does nothing but read the clock does not
	// come out; it stays where it is, and can still go to a kernel that has the same
	// vdso.
	vdsoTries = 20
	vdsoRun   = 30 * time.Microsecond
)

// vdsoOf is where the vdso of a process is.
func vdsoOf(maps []proc.Mapping) page.Range {
	for i := range maps {
		if maps[i].Name == "[vdso]" {
			return maps[i].Range
		}
	}
	return page.Range{}
}

// runOut lets a thread that stands at rip, in the vdso, run on for a moment, and
// asks it to stop again. It reports whether it did.
func (s *Session) runOut(t *thread, rip uint64) (bool, error) {
	if s.vdso.Empty() || !s.vdso.Contains(page.Addr(rip)) || t.runs == vdsoTries {
		return false, nil
	}
	t.runs++
	err := sys.PtraceCont(t.tid, 0)
	if err == nil {
		for began := time.Now(); time.Since(began) < vdsoRun; {
			// Shorter than any sleep.
		}
		err = sys.PtraceInterrupt(t.tid)
	}
	if err != nil && err != unix.ESRCH { // killed: the wait for its stop finds that
		return true, fmt.Errorf("lead thread %d out of the vdso: %w", t.tid, err)
	}
	return true, nil
}
