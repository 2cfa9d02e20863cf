package cgroup

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"path"
	"strings"

	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

var (
	// ErrNoTree says that no cgroup v2 tree is mounted.
	ErrNoTree = errors.New("no cgroup v2 tree is mounted (mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1)")
	// ErrOutside says that a group lies outside what the caller's cgroup
	// namespace or mount shows.
	ErrOutside = errors.New("the group is outside the cgroup tree that is visible here")
	// ErrThreaded says that a group is part of a threaded subtree.
	ErrThreaded = errors.New("the group is threaded")
)

// Group is one group, by its directory.
type Group struct{ dir string }

// Dir is the directory of the group.
func (g Group) Dir() string { return g.dir }

// At names the group of a directory that an earlier run noted.
func At(dir string) Group { return Group{path.Clean(dir)} }

// Of returns the group that a process is in.
func Of(pid int) (Group, error) {
	p, ok, err := proc.CgroupV2(pid)
	if err != nil {
		return Group{}, err
	}
	if !ok {
		return Group{}, ErrNoTree
	}
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Group{}, err
	}
	dir, err := locate(string(info), p, visible)
	if err != nil {
		return Group{}, fmt.Errorf("cgroup %s of pid %d: %w", p, pid, err)
	}
	return Group{dir}, nil
}

// locate finds the directory of group p, a path as /proc/PID/cgroup has it, in a
// mountinfo, of those that visible does not deny.
func locate(mountinfo, p string, visible func(dir string) bool) (string, error) {
	err := ErrNoTree
	for m := range trees(mountinfo) {
		err = ErrOutside
		if strings.HasPrefix(p, "/..") || m.outside() {
			continue
		}
		sub, ok := strings.CutPrefix(p, strings.TrimSuffix(m.root, "/"))
		if ok && (sub == "" || sub[0] == '/') && visible(m.at) {
			return path.Join(m.at, sub), nil
		}
	}
	return "", err
}

// tree is a mount of the v2 tree: the group that it shows, as the cgroup namespace calls
// that, and where.
type tree struct{ root, at string }

// outside reports whether what is shown lies outside the cgroup namespace.
func (m tree) outside() bool { return strings.HasPrefix(m.root, "/..") }

// trees yields the mounts of the v2 tree (proc_pid_mountinfo(5)).
func trees(mountinfo string) iter.Seq[tree] {
	return func(yield func(tree) bool) {
		for line := range strings.Lines(mountinfo) {
			fields, rest, ok := strings.Cut(line, " - ")
			f := strings.Fields(fields)
			if ok && len(f) >= 5 && strings.HasPrefix(rest, "cgroup2 ") && !yield(tree{unescape(f[3]), unescape(f[4])}) {
				return
			}
		}
	}
}

// visible reports whether a mount of the v2 tree is what one finds at its mount
// point: another one may cover it.
func visible(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}
