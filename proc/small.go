package proc

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
)

// PIDs are all processes of the pid namespace that /proc shows, in order.
func PIDs() ([]int, error) {
	dir, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range dir {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids, nil
}

// Threads lists the tids of a process.
func Threads(pid int) ([]int, error) {
	d, err := os.Open(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil, Gone(pid, err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, Gone(pid, err)
	}
	out := make([]int, 0, len(names))
	for _, n := range names {
		if tid, err := strconv.Atoi(n); err == nil {
			out = append(out, tid)
		}
	}
	if len(out) == 0 {
		return nil, Gone(pid, os.ErrNotExist)
	}
	return out, nil
}

// CgroupV2 returns the path of a process in the cgroup v2 tree, as seen from the
// root of the reader's cgroup namespace; ok is false without such a tree.
func CgroupV2(pid int) (path string, ok bool, err error) {
	b, err := read(pid, "cgroup")
	if err != nil {
		return "", false, err
	}
	path, ok = ParseCgroup(b)
	return path, ok, nil
}

// ParseCgroup finds the v2 line of a cgroup file. " (deleted)" is cut off.
func ParseCgroup(b []byte) (path string, ok bool) {
	for line := range strings.Lines(string(b)) {
		if p, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSuffix(strings.TrimRight(p, "\n"), " (deleted)"), true
		}
	}
	return "", false
}

// Auxv reads the auxiliary vector that the process was started with, raw.
func Auxv(pid int) ([]byte, error) { return read(pid, "auxv") }

// AuxvEntry finds one AT_* entry of an auxiliary vector.
func AuxvEntry(auxv []byte, key uint64) (uint64, bool) {
	for len(auxv) >= 16 {
		k := binary.LittleEndian.Uint64(auxv)
		if k == 0 {
			break
		}
		if k == key {
			return binary.LittleEndian.Uint64(auxv[8:]), true
		}
		auxv = auxv[16:]
	}
	return 0, false
}

// Comm reads the name of one thread.
func Comm(pid, tid int) (string, error) {
	b, err := read(pid, "task/"+strconv.Itoa(tid)+"/comm")
	return strings.TrimSuffix(string(b), "\n"), err
}

// Link reads a symbolic link under /proc/PID.
func Link(pid int, name string) (string, error) {
	s, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, name))
	return s, Gone(pid, err)
}

// Int reads a file under /proc/PID that holds one number.
func Int(pid int, name string) (int64, error) {
	b, err := read(pid, name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 0, 64)
	if err != nil {
		return 0, fmt.Errorf("/proc/%d/%s: %w", pid, name, err)
	}
	return n, nil
}
