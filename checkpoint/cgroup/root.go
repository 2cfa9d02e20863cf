package cgroup

import (
	"os"
	"path"
)

// Root is the highest group that is visible here: where the v2 tree is mounted. A mount
// that was made in another cgroup namespace and shows what is outside this one
// (cgroup_namespaces(7)) is not taken: [Of] would not find again what is made there.
func Root() (Group, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return Group{}, err
	}
	return highest(string(info), visible)
}

func highest(mountinfo string, visible func(dir string) bool) (Group, error) {
	err := ErrNoTree
	for m := range trees(mountinfo) {
		if err = ErrOutside; !m.outside() && visible(m.at) {
			return Group{path.Clean(m.at)}, nil
		}
	}
	return Group{}, err
}
