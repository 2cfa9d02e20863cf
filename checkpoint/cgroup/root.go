package cgroup

import (
	"os"
	"path"
	"strings"
)

// Root is the highest group that is visible here: where the v2 tree is mounted.
func Root() (Group, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Group{}, err
	}
	for line := range strings.Lines(string(b)) {
		fields, rest, ok := strings.Cut(line, " - ")
		if f := strings.Fields(fields); ok && len(f) >= 5 && strings.HasPrefix(rest, "cgroup2 ") && visible(unescape(f[4])) {
			return Group{path.Clean(unescape(f[4]))}, nil
		}
	}
	return Group{}, ErrNoTree
}
