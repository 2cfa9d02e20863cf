package bench

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/pageferry/pageferry/appliance/lab"
)

// Usage is what processes have used. Unlike times it does not depend on who else
// runs on the machine.
type Usage struct {
	CPU      time.Duration
	Switches uint64 // voluntary: how often a thread waited
}

// Minus is what was used since an earlier look.
func (u Usage) Minus(before Usage) Usage {
	return Usage{u.CPU - before.CPU, u.Switches - before.Switches}
}

// processUsage adds up the threads, those that live, of the process that proc, a
// mount of procfs, calls pid.
func processUsage(proc string, pid int) (u Usage, err error) {
	dir := filepath.Join(proc, strconv.Itoa(pid), "task")
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return u, err
	}
	for _, t := range tasks {
		status, err := os.ReadFile(filepath.Join(dir, t.Name(), "status"))
		if err != nil {
			continue // it has ended
		}
		for line := range bytes.Lines(status) {
			if rest, ok := bytes.CutPrefix(line, []byte("voluntary_ctxt_switches:")); ok {
				n, _ := strconv.ParseUint(string(bytes.TrimSpace(rest)), 10, 64)
				u.Switches += n
			}
		}
		// proc(5): the first field of schedstat is the time on a processor in
		// nanoseconds.
		b, err := os.ReadFile(filepath.Join(dir, t.Name(), "schedstat"))
		if err != nil {
			continue
		}
		if f := bytes.Fields(b); len(f) > 0 {
			n, _ := strconv.ParseInt(string(f[0]), 10, 64)
			u.CPU += time.Duration(n)
		}
	}
	return u, nil
}

// groupCPU is the processor time that the processes of a cgroup and below have
// used, those that have ended included.
func groupCPU(dir string) (time.Duration, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("usage_usec ")); ok {
			n, err := strconv.ParseInt(string(bytes.TrimSpace(rest)), 10, 64)
			return time.Duration(n) * time.Microsecond, err
		}
	}
	return 0, fmt.Errorf("%s: no usage_usec in cpu.stat", dir)
}

// sourceCPU is what the daemon of h has used.
func sourceCPU(h *lab.Host) (time.Duration, error) {
	return groupCPU(filepath.Join(h.Cgroup(), daemonCgroup))
}

// destCPU is what everything in h has used but process pid (0: none): the daemon
// and the pagers, wherever it puts them.
func destCPU(h *lab.Host, pid int) (time.Duration, error) {
	all, err := groupCPU(h.Cgroup())
	if err != nil || pid == 0 {
		return all, err
	}
	u, err := processUsage(filepath.Join(h.Root(), "proc"), pid)
	return all - u.CPU, err
}
