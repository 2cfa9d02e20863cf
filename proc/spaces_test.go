package proc

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

func TestAddressSpaces(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	exe := testutil.CCText(t, "share", `
#include <stdio.h>
#include <unistd.h>
int main() {
	printf("%d\n", getpid());
	fflush(stdout);
	if (vfork() == 0) {
		dprintf(1, "%d\nready\n", getpid());
		pause();
		_exit(0);
	}
}`)
	p := testutil.Start(t, exe)
	p.WaitText("ready", 10*time.Second)
	var parent, child int
	if _, err := fmt.Sscan(strings.TrimSpace(p.Text()), &parent, &child); err != nil {
		t.Fatal(err)
	}
	self := os.Getpid()
	for _, c := range []struct {
		pids []int
		want string
	}{
		{[]int{self}, fmt.Sprint([][]int{{self}})},
		{[]int{child, self, parent}, fmt.Sprint([][]int{{child, parent}, {self}})},
		{[]int{self, parent, os.Getppid(), child}, fmt.Sprint([][]int{{self}, {parent, child}, {os.Getppid()}})},
		{[]int{1 << 22, parent, child, 1<<22 - 1}, fmt.Sprint([][]int{{1 << 22}, {parent, child}, {1<<22 - 1}})},
	} {
		if got := AddressSpaces(slices.Clone(c.pids)); fmt.Sprint(got) != c.want {
			t.Errorf("%v: %v, wanted %s", c.pids, got, c.want)
		}
	}
}
