package checkpoint

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/proc"
)

// MappedBy lists those of the processes pids, all that /proc shows where pids is nil,
// that have mappings of files of a device, as makedev gives it. Of each only the list
// of its mappings is read, which touches none of them. Of processes that share one
// address space all are listed. With nil, those that may not be looked at are passed
// over.
func MappedBy(dev uint64, pids []int) ([]int, error) {
	all := pids == nil
	if all {
		d, err := os.Open("/proc")
		if err != nil {
			return nil, err
		}
		defer d.Close()
		names, err := d.Readdirnames(-1)
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			if pid, err := strconv.Atoi(n); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	// As in the file: fields divided by single spaces.
	want := fmt.Appendf(nil, " %02x:%02x ", unix.Major(dev), unix.Minor(dev))
	var out []int
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		if err = proc.Gone(pid, err); errors.Is(err, proc.ErrGone) || all && errors.Is(err, os.ErrPermission) {
			continue
		} else if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(b) {
			// start-end perm offset dev ...: a path cannot come before.
			if i := bytes.Index(line, want); i > 0 && bytes.Count(line[:i], []byte(" ")) == 2 {
				out = append(out, pid)
				break
			}
		}
	}
	return out, nil
}
