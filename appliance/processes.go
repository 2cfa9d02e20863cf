package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	osuser "os/user"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/proc"
)

// EnvLabels is the variable of a process's environment by which its labels are given, as
// in PAGEFERRY_LABELS=tier=cache,team=search. What counts is what the program was started
// with (proc_pid_environ(5)).
const EnvLabels = "PAGEFERRY_LABELS"

// ProcessInfo is a process of a host, as whoever chooses what is to move sees it.
type ProcessInfo struct {
	PID     int    `json:"pid"`
	Started uint64 `json:"started"` // clock ticks after boot: with PID it names one process
	Command string `json:"command"` // comm
	UID     uint32 `json:"uid"`
	User    string `json:"user,omitempty"`
	Cgroup  string `json:"cgroup,omitempty"` // of version 2, as the daemon sees it
	Unit    string `json:"unit,omitempty"`   // of systemd
	// MemoryBytes is what it has in memory.
	MemoryBytes uint64            `json:"memory_bytes"`
	Labels      map[string]string `json:"labels,omitempty"`
	// PIDFiles are those of the files asked about that have its number.
	PIDFiles []string `json:"pidfiles,omitempty"`
	// Arriving: pages of it are still at another host.
	Arriving bool `json:"arriving,omitempty"`
}

// Processes are those of this host that somebody may want to move: none of the kernel's,
// not the first, and none of pageferry's own service. What cannot be read of pidFiles names
// nobody.
func (d *Daemon) Processes(pidFiles []string) ([]ProcessInfo, error) {
	named := map[int][]string{}
	for _, path := range pidFiles {
		if pid, err := readPIDFile(path); err == nil {
			named[pid] = append(named[pid], path)
		} else {
			d.log.Info("a pidfile names nobody", "path", path, "err", err)
		}
	}
	pids, err := proc.PIDs()
	if err != nil {
		return nil, fmt.Errorf("processes of %s: %w", d.config.Name, err)
	}
	arriving := d.registry.arriving()
	users := map[uint32]string{}
	out := []ProcessInfo{}
	for _, pid := range pids {
		// Nothing of an arriving process's memory may be read here: its pages come by
		// the pager, and who reads them waits for it.
		p, err := processInfo(pid, arriving, users)
		if errors.Is(err, proc.ErrGone) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if p != nil {
			p.PIDFiles = named[pid]
			out = append(out, *p)
		}
	}
	return out, nil
}

// processInfo is nil for those that nobody moves.
func processInfo(pid int, arriving []string, users map[uint32]string) (*ProcessInfo, error) {
	if pid == 1 || pid == os.Getpid() {
		return nil, nil
	}
	st, err := proc.ReadStat(pid)
	if err != nil {
		return nil, err
	}
	if st.KernelThread() || st.State == 'Z' || st.State == 'X' {
		return nil, nil
	}
	status, err := proc.ReadStatus(pid)
	if err != nil {
		return nil, err
	}
	p := &ProcessInfo{PID: pid, Started: st.StartTime, Command: st.Comm, UID: status.UID[0], MemoryBytes: status.RSSKiB << 10}
	if p.Cgroup, _, err = proc.CgroupV2(pid); err != nil {
		return nil, err
	}
	p.Unit, p.User = serviceOf(p.Cgroup), userName(p.UID, users)
	for _, part := range strings.Split(p.Cgroup, "/") {
		p.Arriving = p.Arriving || slices.Contains(arriving, part)
	}
	if p.Arriving {
		return p, nil
	}
	if ours(pid) {
		return nil, nil
	}
	p.Labels, err = labels(pid)
	return p, err
}

// readPIDFile reads what a service has left: a number, and nothing else that would tell
// whoever asks what is in other files.
func readPIDFile(path string) (int, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return 0, errors.New("it does not hold a process id")
	}
	return pid, nil
}

// ours reports whether a process is one of pageferry's service, which stays.
func ours(pid int) bool {
	exe, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return false
	}
	self, err := os.Stat("/proc/self/exe")
	if err != nil || !os.SameFile(exe, self) {
		return false
	}
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	args := bytes.Split(cmdline, []byte{0})
	return err == nil && len(args) > 1 && slices.Contains([]string{"daemon", "pager", "keeper"}, string(args[1]))
}

// serviceOf is the service or scope of a cgroup, which may be below its own.
func serviceOf(cgroup string) string {
	for ; cgroup != "/" && cgroup != "." && cgroup != ""; cgroup = path.Dir(cgroup) {
		if n := path.Base(cgroup); strings.HasSuffix(n, ".service") || strings.HasSuffix(n, ".scope") {
			return n
		}
	}
	return ""
}

func userName(uid uint32, known map[uint32]string) string {
	name, ok := known[uid]
	if !ok {
		if u, err := osuser.LookupId(strconv.FormatUint(uint64(uid), 10)); err == nil {
			name = u.Username
		}
		known[uid] = name
	}
	return name
}

// labels reads them from the environment that the process was started with.
func labels(pid int) (map[string]string, error) {
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
		return nil, fmt.Errorf("pid %d: %w", pid, proc.ErrGone)
	case errors.Is(err, fs.ErrPermission):
		return nil, nil
	case err != nil:
		return nil, err
	}
	for v := range bytes.SplitSeq(env, []byte{0}) {
		if text, ok := bytes.CutPrefix(v, []byte(EnvLabels+"=")); ok {
			return parseLabels(string(text)), nil
		}
	}
	return nil, nil
}

// parseLabels takes what it understands: the text is the program's.
func parseLabels(text string) map[string]string {
	out := map[string]string{}
	for part := range strings.SplitSeq(text, ",") {
		if k, v, ok := strings.Cut(strings.TrimSpace(part), "="); ok && k != "" && len(out) < 64 {
			out[k] = v
		}
	}
	return out
}

// arriving are the migrations that come here and are not whole yet: cgroups of that name
// hold their processes, and what those have forked.
func (r *registry) arriving() (ids []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.live {
		if m.role == RoleDestination {
			ids = append(ids, m.id.String())
		}
	}
	return ids
}
