package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pageferry/pageferry/appliance/lab"
)

// kib finds "name:  N kB" in the text of a file of /proc and returns bytes.
func kib(text []byte, name string) (uint64, bool) {
	for line := range bytes.Lines(text) {
		rest, ok := bytes.CutPrefix(line, []byte(name+":"))
		if !ok {
			continue
		}
		f := bytes.Fields(rest)
		if len(f) == 0 {
			return 0, false
		}
		n, err := strconv.ParseUint(string(f[0]), 10, 64)
		return n << 10, err == nil
	}
	return 0, false
}

// PSS is the proportional set size of a process of h: its memory, shared pages
// divided among those who share them.
func PSS(h *lab.Host, pid int) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(h.Root(), "proc", strconv.Itoa(pid), "smaps_rollup"))
	if err != nil {
		return 0, err
	}
	n, ok := kib(b, "Pss")
	if !ok {
		return 0, fmt.Errorf("process %d of host %s: no Pss in smaps_rollup", pid, h.Name())
	}
	return n, nil
}

// HostPSS is the PSS of all processes of h but its init, by what they are: the
// words of their command line, without path and arguments of its own.
func HostPSS(h *lab.Host) (sum uint64, by map[string]uint64, err error) {
	dirs, err := os.ReadDir(filepath.Join(h.Root(), "proc"))
	if err != nil {
		return 0, nil, err
	}
	by = map[string]uint64{}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == 1 {
			continue
		}
		// A process may end, and one that arrives has no memory at first.
		n, err := PSS(h, pid)
		if err != nil {
			continue
		}
		comm, _ := os.ReadFile(filepath.Join(h.Root(), "proc", d.Name(), "comm"))
		by[strings.TrimSpace(string(comm))] += n
		sum += n
	}
	return sum, by, nil
}

// Peak is the most that all processes of a host took together.
type Peak struct {
	Sum uint64
	By  map[string]uint64 // at that moment
	// Samples is how often it was looked.
	Samples int
}

// WatchPSS looks at h every interval until the returned function is called,
// which returns the peak. Walking the page tables takes about 10 ms per GiB, so
// times measured meanwhile mean nothing.
func WatchPSS(h *lab.Host, interval time.Duration) (stop func() (Peak, error)) {
	ctx, cancel := context.WithCancel(context.Background())
	var peak Peak
	var failed error
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			sum, by, err := HostPSS(h)
			if err != nil {
				failed = err
				return
			}
			peak.Samples++
			if sum > peak.Sum {
				peak.Sum, peak.By = sum, by
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	return func() (Peak, error) {
		cancel()
		wg.Wait()
		return peak, failed
	}
}

// DaemonPID is what host h calls its daemon.
func (s *Stage) DaemonPID(ctx context.Context, h *lab.Host) (int, error) {
	i, err := s.api[h.Name()].Info(ctx)
	return i.PID, err
}

// ResetHWM begins the peak of a process's resident memory anew.
func ResetHWM(h *lab.Host, pid int) error {
	// proc(5): 5 resets the "high water mark".
	return os.WriteFile(filepath.Join(h.Root(), "proc", strconv.Itoa(pid), "clear_refs"), []byte("5"), 0)
}

// HWM is the peak of a process's resident memory since ResetHWM.
func HWM(h *lab.Host, pid int) (uint64, error) {
	b, err := os.ReadFile(filepath.Join(h.Root(), "proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	n, ok := kib(b, "VmHWM")
	if !ok {
		return 0, fmt.Errorf("process %d of host %s: no VmHWM in its status", pid, h.Name())
	}
	return n, nil
}
