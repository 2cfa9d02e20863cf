package proc

import (
	"slices"

	"github.com/pageferry/pageferry/internal/sys"
)

// AddressSpaces groups processes by the address space that they have, in the order of
// pids: several have one where vfork(2), or clone(2) with CLONE_VM, made them. One that
// has ended is in a group by itself, or with others that have.
func AddressSpaces(pids []int) [][]int {
	if len(pids) == 1 {
		return [][]int{pids}
	}
	type group struct{ first, index int }
	var sorted []group // as kcmp(2) orders them
	out := make([][]int, 0, len(pids))
	for _, pid := range pids {
		var failed error
		compare := func(g group, pid int) int {
			c, err := sys.Kcmp(g.first, pid, sys.KCMP_VM, 0, 0)
			if err != nil {
				failed = err
				return -1
			}
			return c
		}
		i, found := slices.BinarySearchFunc(sorted, pid, compare)
		if failed != nil { // one of those that it was compared with has ended: there is no order
			i = slices.IndexFunc(sorted, func(g group) bool { return compare(g, pid) == 0 })
			if found = i >= 0; !found {
				i = len(sorted)
			}
		}
		if found {
			at := sorted[i].index
			out[at] = append(out[at], pid)
			continue
		}
		sorted = slices.Insert(sorted, i, group{pid, len(out)})
		out = append(out, []int{pid})
	}
	return out
}
