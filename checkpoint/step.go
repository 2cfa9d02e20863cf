package checkpoint

import (
	"fmt"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// maxSteps is more than any function of the vdso takes, unless the kernel changes
// its clock all the while: then its reader tries again.
const maxSteps = 4000

// vdsoOf is where the vdso of a process is.
func vdsoOf(maps []proc.Mapping) page.Range {
	for i := range maps {
		if maps[i].Name == "[vdso]" {
			return maps[i].Range
		}
	}
	return page.Range{}
}

// stepOut leads a stopped thread that stands at rip out of the vdso. Another
// kernel has another one, and a thread can be put to the beginning of its
// functions but not into their middle. One that does not come out stays where it
// is: it can still go to a kernel that has the same. On the tracer's thread.
func (s *Session) stepOut(t *thread, rip uint64) error {
	if s.vdso.Empty() || !s.vdso.Contains(page.Addr(rip)) {
		return nil
	}
	sig := unix.Signal(0)
	for range maxSteps {
		if err := sys.PtraceSingleStep(t.tid, sig); err != nil {
			return stepError(t.tid, err)
		}
		ws, err := sys.WaitStop(t.tid)
		if err != nil {
			return stepError(t.tid, err)
		}
		switch {
		case sys.Event(ws) != 0: // somebody has stopped the process
			s.stopped = s.stopped || ws.StopSignal() != unix.SIGTRAP
			return nil
		case ws.StopSignal() != unix.SIGTRAP:
			sig = ws.StopSignal() // its handler comes first
		default:
			sig = 0
		}
		var r sys.Regs
		if err := sys.PtraceGetRegs(t.tid, &r); err != nil {
			return stepError(t.tid, err)
		}
		if sig == 0 && !s.vdso.Contains(page.Addr(r.Rip)) {
			return nil
		}
	}
	return nil
}

// stepError is nil for a thread that has been killed: whoever waits for it next
// finds that.
func stepError(tid int, err error) error {
	if err == unix.ESRCH || err == unix.ECHILD {
		return nil
	}
	return fmt.Errorf("lead thread %d out of the vdso: %w", tid, err)
}
