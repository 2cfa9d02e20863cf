package checkpoint

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/proc"
)

// A thread that waits in the kernel where signals do not reach it (TASK_UNINTERRUPTIBLE,
// TASK_KILLABLE) stops when it is done with that, and all others stand still until then.
// On a busy machine that can be a while: fork(2) and exit(2) wait for whoever moves a
// process between cgroups (cgroup_threadgroup_rwsem), mmap(2) for whoever reads
// /proc/PID/smaps, write(2) for the disk. So a freeze is tried several times, with more
// patience each time, and the process runs in between.
const (
	freezePatience     = 100 * time.Millisecond
	freezePatienceMost = time.Second
	freezeTries        = 6
	freezeRun          = 2 // how many times as long it runs then as it may have stood still
)

// stopPatiently is stop that is tried again where a thread does not stop. before is
// called before each try.
func (s *Session) stopPatiently(ctx context.Context, before func() error) error {
	defer func() { s.patience = 0 }()
	s.patience = freezePatience
	for try := 1; ; try++ {
		if err := before(); err != nil {
			return err
		}
		s.since = time.Now()
		err := s.stop(ctx)
		if !errors.Is(err, ErrStuck) || try == freezeTries {
			return err
		}
		s.log.Info("stopping it is tried again", "pid", s.pid, "err", err)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(freezeRun * s.patience):
		}
		s.patience = min(2*s.patience, freezePatienceMost)
	}
}

// Since is when the process stopped that Freeze has frozen, or Pause stopped, or began to.
func (s *Session) Since() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.since
}

// stuck is ErrStuck for a thread, and what that is at.
func (s *Session) stuck(tid int) error {
	return fmt.Errorf("%w (thread %d%s)", ErrStuck, tid, at(s.pid, tid))
}

// at tells as much of what a thread is at as /proc does, "" if nothing.
func at(pid, tid int) string {
	var b strings.Builder
	if st, err := proc.ReadThreadStatus(pid, tid); err == nil {
		fmt.Fprintf(&b, " %q, state %c", st.Name, st.State)
	}
	dir := fmt.Sprintf("/proc/%d/task/%d/", pid, tid)
	call, err := os.ReadFile(dir + "syscall")
	if nr, err2 := strconv.Atoi(string(bytes.SplitN(call, []byte(" "), 2)[0])); err == nil && err2 == nil && nr >= 0 {
		fmt.Fprintf(&b, ", in %s(2)", sys.SyscallName(uintptr(nr)))
	}
	if where, err := os.ReadFile(dir + "wchan"); err == nil && string(where) != "0" && len(where) > 0 {
		fmt.Fprintf(&b, " at %s", where)
	}
	return b.String()
}
