package survive_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// clean fails the test unless nothing is left on either host, after a moment,
// but the daemons and one copy of each of the guests: no process, cgroup, mount,
// file, descriptor, and no migration that is not over. Where the guests live is
// noted in them.
func (r *rig) clean(t testing.TB, alive ...*guest) {
	t.Helper()
	testutil.Eventually(t, patience(15*time.Second), func() error { return r.leftovers(alive...) })
}

func (r *rig) leftovers(alive ...*guest) error {
	for _, g := range alive {
		if err := g.find(); err != nil {
			return err
		}
	}
	return errors.Join(r.a.leftovers(alive), r.b.leftovers(alive))
}

// find looks where the guest lives now; there must be one copy.
func (g *guest) find() error {
	var at []string
	var home *node
	var pid int
	for _, n := range g.r.nodes() {
		for _, p := range n.processes() {
			if p.self == g.self && p.comm == g.comm {
				home, pid = n, p.inner
				at = append(at, fmt.Sprintf("pid %d of host %s in cgroup %s", p.inner, n.name(), p.cgroup))
			}
		}
	}
	if len(at) == 0 {
		for _, n := range g.r.nodes() {
			for _, p := range n.processes() {
				at = append(at, fmt.Sprintf("%+v of host %s", p, n.name()))
			}
		}
		return fmt.Errorf("%s (%s, pid %d) is gone; there are only %v", g.identity, g.comm, g.self, at)
	}
	if len(at) != 1 {
		return fmt.Errorf("%s (%s): %d copies: %v", g.identity, g.comm, len(at), at)
	}
	g.at, g.pid = home, pid
	return nil
}

// leftovers names all that is on a host and should not be.
func (n *node) leftovers(alive []*guest) error {
	var left []string
	found := func(format string, args ...any) { left = append(left, fmt.Sprintf(format, args...)) }
	reports, err := n.list()
	if err != nil {
		return fmt.Errorf("host %s: %w", n.name(), err)
	}
	for _, rep := range reports {
		if !rep.Finished() {
			found("migration %s (%s) in state %s: %s", rep.ID, rep.Role, rep.State, rep.Reason)
		}
	}
	daemon := n.daemon.Load().PID()
	homes := map[string]bool{}
	procs := n.processes()
	guest := func(p process) bool {
		return slices.ContainsFunc(alive, func(g *guest) bool { return g.at == n && g.pid == p.inner && g.comm == p.comm })
	}
	for _, p := range procs {
		if guest(p) {
			homes[p.cgroup] = true
		}
	}
	for _, p := range procs {
		living := guest(p)
		if p.comm == "pageferry-init" && homes[p.cgroup] {
			living = true // of a namespace in which the guest has its pid
		}
		if living {
			if b, err := os.ReadFile(filepath.Join(n.host.Cgroup(), p.cgroup, "cgroup.freeze")); err != nil || strings.TrimSpace(string(b)) != "0" {
				found("process %d (%s) in a frozen cgroup, %s", p.pid, p.comm, p.cgroup)
			}
		}
		if guest(p) && !slices.ContainsFunc(reports, func(r appliance.Report) bool { return !r.Finished() }) {
			for _, what := range trapped(p.pid) {
				found("process %d (%s): %s", p.pid, p.comm, what)
			}
		}
		if p.pid != daemon && !living {
			found("process %d (%s, pid %d there, state %c) in cgroup %s", p.pid, p.comm, p.inner, p.state, p.cgroup)
		}
	}
	for _, dir := range n.cgroups() {
		switch {
		case dir == "daemon", dir == "guest", dir == "run", dir == "pageferry", dir == "pageferry-pagers":
		case filepath.Dir(dir) == "pageferry" && homes[dir]:
		case filepath.Dir(dir) == "pageferry" && n.empty(dir):
			// Its process has ended by itself: it goes with the next arrival
			// or departure, which TestGroupsSwept sees to.
		default:
			found("cgroup %s", dir)
		}
	}
	if now := n.mountinfo(); now != n.mounts {
		found("other mounts:\n%s\nwhere there were\n%s", now, n.mounts)
	}
	for _, f := range n.files("/run/pageferry") {
		switch base := filepath.Base(f); {
		case strings.HasSuffix(base, ".pem"), base == "config.yaml", base == "api.sock", base == "daemon.lock", f == "/run/pageferry/arrivals":
		default:
			found("file %s", f)
		}
	}
	for _, f := range n.files("/var/lib/pageferry") {
		switch {
		case f == "/var/lib/pageferry/journal", f == "/var/lib/pageferry/journal/lock", f == "/var/lib/pageferry/journal/incarnation":
		case strings.HasPrefix(f, "/var/lib/pageferry/reports"):
		default:
			found("file %s", f)
		}
	}
	for _, d := range n.descriptors() {
		found("descriptor of the daemon: %s", d)
	}
	if len(left) == 0 {
		return nil
	}
	return fmt.Errorf("left on host %s:\n\t%s", n.name(), strings.Join(left, "\n\t"))
}

// trapped says what of a userfaultfd is in a process: a descriptor, or a mapping
// that is registered, of which every first write or access is slow: um (missing
// pages) and uw (write protection), see proc_pid_smaps(5).
func trapped(pid int) (out []string) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	fds, _ := os.ReadDir(dir + "fd")
	for _, e := range fds {
		if to, _ := os.Readlink(dir + "fd/" + e.Name()); strings.Contains(to, "userfaultfd") {
			out = append(out, "descriptor "+e.Name()+" -> "+to)
		}
	}
	b, _ := os.ReadFile(dir + "smaps")
	mapping := ""
	for line := range strings.Lines(string(b)) {
		flags, ok := strings.CutPrefix(line, "VmFlags:")
		if !ok {
			if !strings.Contains(strings.Fields(line)[0], ":") {
				mapping = strings.TrimSpace(line)
			}
			continue
		}
		for _, f := range strings.Fields(flags) {
			if f == "uw" || f == "um" || f == "ui" {
				out = append(out, f+" in mapping "+mapping)
			}
		}
	}
	return out
}

// cgroups lists those below the host's.
func (n *node) cgroups() (out []string) {
	_ = filepath.WalkDir(n.host.Cgroup(), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && path != n.host.Cgroup() {
			out = append(out, strings.TrimPrefix(path, n.host.Cgroup()+"/"))
		}
		return nil
	})
	return out
}

// empty reports whether a cgroup of the host has neither process nor child.
func (n *node) empty(dir string) bool {
	b, _ := os.ReadFile(filepath.Join(n.host.Cgroup(), dir, "cgroup.events"))
	kids, _ := filepath.Glob(filepath.Join(n.host.Cgroup(), dir, "*", "cgroup.procs"))
	return strings.Contains(string(b), "populated 0") && len(kids) == 0
}

// files lists all files and folders below dir of the host.
func (n *node) files(dir string) (out []string) {
	root := n.host.Root()
	_ = filepath.WalkDir(filepath.Join(root, dir), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != filepath.Join(root, dir) {
			out = append(out, strings.TrimPrefix(path, root))
		}
		return nil
	})
	return out
}

func (n *node) mountinfo() string {
	b, err := os.ReadFile(strings.TrimSuffix(n.host.Root(), "/root") + "/mountinfo")
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// descriptors lists those of the daemon that only a migration needs.
func (n *node) descriptors() (out []string) {
	dir := fmt.Sprintf("/proc/%d/fd", n.daemon.Load().PID())
	list, _ := os.ReadDir(dir)
	for _, e := range list {
		to, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue
		}
		switch {
		case to == "/dev/null", strings.HasPrefix(to, "socket:"), strings.HasPrefix(to, "pipe:"),
			to == "anon_inode:[eventpoll]", to == "anon_inode:[eventfd]",
			to == "/run/pageferry/daemon.lock", to == "/var/lib/pageferry/journal/lock":
		default:
			out = append(out, e.Name()+" -> "+to)
		}
	}
	return out
}
