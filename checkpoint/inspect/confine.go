package inspect

import (
	"fmt"
	"os"
	"strings"

	"github.com/pageferry/pageferry/proc"
)

// namespaces compares those of the process with ours.
func (r *Report) namespaces() {
	for _, ns := range []struct {
		name, reason string // no reason: a difference is carried
		note         string
	}{
		{"user", "containers with users of their own cannot move yet", ""},
		{"mnt", "it sees other file systems than we do (a container, or a service with private directories)", ""},
		{"net", "it has a network of its own (a container)", ""},
		{"ipc", "it has System V IPC of its own (a container)", ""},
		{"uts", "it has a host name of its own (a container)", ""},
		{"pid", "", "it keeps its number in a pid namespace of its own"},
		{"time", "", "its clocks go on from where they are"},
		{"cgroup", "", "it sees the cgroups of the destination as they are"},
	} {
		ours, err := os.Readlink("/proc/self/ns/" + ns.name)
		if err != nil {
			continue // the kernel has no such namespaces
		}
		theirs, err := proc.Link(r.PID, "ns/"+ns.name)
		if err != nil {
			r.refuse("namespace", ns.name, "cannot be read: %v", err)
			continue
		}
		switch {
		case ours == theirs:
			r.carry("namespace", "%s, the same as ours", ns.name)
		case ns.reason != "":
			r.refuse("namespace", ns.name, "is not ours: %s", ns.reason)
		default:
			r.carry("namespace", "%s, another than ours", ns.name).Note = ns.note
		}
	}
}

// confinement is what limits the process and would be lost.
func (r *Report) confinement(s *proc.Status) {
	switch s.Seccomp {
	case 0:
	case 1:
		r.refuse("seccomp", "strict mode", "system calls cannot be made in it")
	default:
		r.refuse("seccomp", "filter", "its filters cannot be read and carried")
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", r.PID))
	label := strings.TrimRight(string(b), "\x00\n")
	own, _ := os.ReadFile("/proc/self/attr/current")
	if err == nil && label != "" && label != "unconfined" && label != strings.TrimRight(string(own), "\x00\n") {
		r.refuse("security label", label, "the process would lose its confinement")
	}
}
