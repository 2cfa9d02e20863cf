package bulk

import (
	"path"
	"strconv"
	"strings"

	"github.com/pageferry/pageferry/appliance"
)

// Selector says which processes are meant: those that all of its keys fit. In
// command, cgroup and unit * stands for any characters but /, and ? for one.
type Selector struct {
	// Host on which it looks. Default: all hosts.
	Host string `yaml:"host,omitempty"`
	// PID of the process; needs host.
	PID int `yaml:"pid,omitempty" min:"1" max:"4194304"`
	// PIDFile is a file on that host which holds the pid; needs host.
	PIDFile string `yaml:"pidfile,omitempty" form:"path"`
	// Command is the program: its name, its path, or the whole command. With * and ?.
	Command string `yaml:"command,omitempty"`
	// User who runs it, by name or number.
	User string `yaml:"user,omitempty" form:"user"`
	// Cgroup in which, or below which, it is: /system.slice/redis*. With * and ?.
	Cgroup string `yaml:"cgroup,omitempty" form:"path"`
	// Unit of systemd; without an ending .service is meant. With * and ?.
	Unit string `yaml:"unit,omitempty"`
	// Label that it has: KEY, or KEY=VALUE.
	Label string `yaml:"label,omitempty"`
}

// NeedsFile reports whether the daemon on Host must be asked for the pid in
// PIDFile, which lies there. Fits leaves it out.
func (s *Selector) NeedsFile() bool { return s.PIDFile != "" }

// Fits reports whether process p on host is selected, by all keys but pidfile.
func (s *Selector) Fits(host string, p appliance.ProcessInfo) bool {
	return (s.Host == "" || s.Host == host) &&
		(s.PID == 0 || s.PID == p.PID) &&
		(s.Command == "" || fitsCommand(s.Command, p.Command)) &&
		(s.User == "" || s.User == p.User || s.User == strconv.FormatUint(uint64(p.UID), 10)) &&
		(s.Cgroup == "" || fitsCgroup(s.Cgroup, p.Cgroup)) &&
		(s.Unit == "" || fits(s.Unit, p.Unit) || !strings.Contains(s.Unit, ".") && fits(s.Unit+".service", p.Unit)) &&
		(s.Label == "" || fitsLabel(s.Label, p.Labels))
}

func fits(pattern, s string) bool {
	ok, err := path.Match(pattern, s)
	return ok && err == nil && s != ""
}

// fitsCommand compares with the whole command, with the program as it was called,
// and with its name alone.
func fitsCommand(pattern, command string) bool {
	program, _, _ := strings.Cut(command, " ")
	return fits(pattern, command) || fits(pattern, program) || fits(pattern, path.Base(program)) && program != ""
}

// fitsCgroup compares with the cgroup and all above it.
func fitsCgroup(pattern, cgroup string) bool {
	if cgroup == "" {
		return false
	}
	for at := path.Clean(cgroup); ; at = path.Dir(at) {
		if fits(path.Clean(pattern), at) {
			return true
		}
		if at == "/" || at == "." {
			return false
		}
	}
}

func fitsLabel(label string, labels map[string]string) bool {
	key, want, exact := strings.Cut(label, "=")
	have, ok := labels[key]
	return ok && (!exact || have == want)
}
