package restore

import (
	"bytes"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// TestDrop: what is given up is gone, in one call or in many, and nothing else is.
func TestDrop(t *testing.T) {
	for _, oneByOne := range []bool{false, true} {
		t.Run(fmt.Sprintf("one by one %t", oneByOne), func(t *testing.T) {
			l := early(t)
			s := l.s
			s.oneByOne = oneByOne
			whole := page.Range{Start: 0x200000000000, End: 0x200000000000 + 3*mostVectors*page.Size}
			l.lay([]image.VMA{{Range: whole, Kind: image.VMAAnon}})
			l.write(whole, bytes.Repeat([]byte{7}, int(whole.Bytes())))
			var gone page.Set
			for at := whole.Start; at < whole.End; at += 2 * page.Size {
				gone.Add(page.PageOf(at))
			}
			if err := s.Drop(gone); err != nil {
				t.Fatal(err)
			}
			pm, err := proc.OpenPagemap(s.PID())
			if err != nil {
				t.Fatal(err)
			}
			defer pm.Close()
			var left page.Set
			if err := pm.Find(whole, true, left.Add, func(page.Range) {}); err != nil {
				t.Fatal(err)
			}
			all := page.NewSet(whole)
			want := page.Difference(&all, &gone)
			if more, less := page.Difference(&left, &want), page.Difference(&want, &left); !more.Empty() || !less.Empty() {
				t.Errorf("%d pages are there that should be gone, %d are gone that should be there", more.Pages(), less.Pages())
			}
			if took := s.vectors > 0; took == oneByOne && kernelAtLeast(t, 6, 13) {
				t.Errorf("%d vectors were taken", s.vectors)
			}
			if n := openFiles(t, s.PID()); n != openBefore {
				t.Errorf("it has %d descriptors, want %d", n, openBefore)
			}
		})
	}
}

func kernelAtLeast(t *testing.T, major, minor int) bool {
	t.Helper()
	var u unix.Utsname
	var a, b int
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &a, &b); err != nil {
		t.Fatal(err)
	}
	return a > major || a == major && b >= minor
}

// openBefore is how many descriptors a seed has: its null device, three times.
const openBefore = 3

func openFiles(t *testing.T, pid int) int {
	t.Helper()
	es, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(es)
}
