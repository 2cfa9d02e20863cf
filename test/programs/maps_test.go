package programs_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

func itoa(n int) string { return strconv.Itoa(n) }

// anonymous returns the largest private anonymous mapping of at least size
// bytes that is readable and writable and no stack of a thread.
func anonymous(t *testing.T, pid int, size int64) (start, end int64) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		var from, to int64
		if _, err := fmt.Sscanf(f[0], "%x-%x", &from, &to); err != nil {
			t.Fatal(err)
		}
		if len(f) == 5 && f[1] == "rw-p" && to-from >= size && to-from < 2*size {
			return from, to
		}
	}
	t.Fatalf("pid %d has no anonymous mapping of %d bytes:\n%s", pid, size, b)
	return 0, 0
}
