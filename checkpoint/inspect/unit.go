package inspect

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// systemctlLimit is how long systemd may take to answer.
const systemctlLimit = 2 * time.Second

// unit finds the cgroup and the systemd unit of the process, and what the unit
// does when the process ends here.
func (r *Report) unit(ctx context.Context) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", r.PID))
	if err != nil {
		return
	}
	var name string
	r.Cgroup, name = parseCgroups(string(b))
	r.carry("cgroup", "%s", r.Cgroup).Note = "there it gets one of its own"
	if name == "" {
		return
	}
	u := &Unit{Name: name}
	r.Unit = u
	it := r.carry("unit", "%s", name)
	if _, err := os.Stat("/run/systemd/system"); err != nil || !strings.HasSuffix(name, ".service") {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, systemctlLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "systemctl", "show", "--property=Restart", "--property=MainPID", "--", name)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.Output()
	if err != nil {
		it.Note = fmt.Sprintf("systemctl does not tell whether it is restarted: %v", err)
		return
	}
	u.parse(string(out), r.PID)
	switch {
	case u.RestartsOnKill && u.RestartsOnExit0:
		it.Note = "starts the program again when it ends here: give --on-source-exit stop-unit"
	case u.RestartsOnKill:
		it.Note = "starts the program again when it is killed here: give --on-source-exit exit0 or stop-unit"
	case u.RestartsOnExit0:
		it.Note = "starts the program again when it exits with 0: give --on-source-exit kill or stop-unit"
	}
}

// parse reads the answer of systemctl show. Which ends restart a service is the
// table of systemd.service(5), Restart=.
func (u *Unit) parse(s string, pid int) {
	for line := range strings.Lines(s) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "Restart":
			u.Restart = value
		case "MainPID":
			n, err := strconv.Atoi(value)
			u.Main = err == nil && n == pid
		}
	}
	if !u.Main {
		return
	}
	switch u.Restart {
	case "always":
		u.RestartsOnKill, u.RestartsOnExit0 = true, true
	case "on-failure", "on-abnormal", "on-abort":
		u.RestartsOnKill = true
	case "on-success":
		u.RestartsOnExit0 = true
	}
}

// parseCgroups reads /proc/PID/cgroup: the path in the unified hierarchy, and
// the unit by systemd's own hierarchy, which on hybrid hosts is another one.
func parseCgroups(s string) (path, unit string) {
	for line := range strings.Lines(s) {
		f := strings.SplitN(strings.TrimRight(line, "\n"), ":", 3)
		if len(f) != 3 {
			continue
		}
		v2 := f[0] == "0" && f[1] == ""
		if v2 {
			path = f[2]
		}
		if !v2 && f[1] != "name=systemd" {
			continue
		}
		for part := range strings.SplitSeq(f[2], "/") {
			if strings.HasSuffix(part, ".service") || strings.HasSuffix(part, ".scope") {
				unit = part
			}
		}
	}
	return path, unit
}
