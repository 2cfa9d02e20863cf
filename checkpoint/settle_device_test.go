package checkpoint

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// forkProgram has a mapping of a file and its shadow, and a child that inherits both.
// Each of the two writes pages of its own, and checks them all on SIGUSR1.
const forkProgram = `
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
enum { P = 4096, N = 64 };
static char *v;
static volatile int asked;
static void on(int s) { asked = 1; }
int main(int argc, char **argv) {
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600), i, child;
	char page[P], *s;
	signal(SIGUSR1, on);
	s = mmap(0, N * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (i = 0; i < N; i++) {
		memset(page, 'a' + i % 26, P);
		memcpy(s + i * P, page, P);
		if (write(fd, page, P) != P) return 1;
	}
	v = mmap(0, N * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	for (i = 0; i < N; i += 3) v[i * P] = '3'; /* before the fork, by both seen */
	printf("at %lx %lx\n", (long)v, (long)s); fflush(stdout);
	child = fork();
	for (i = 0; i < N; i += 4) v[i * P + 1] = child ? 'P' : 'C';
	if (child) { printf("pids %d %d\n", getpid(), child); fflush(stdout); }
	for (;;) {
		while (!asked) pause();
		asked = 0;
		for (i = 0; i < N; i++)
			if (v[i * P] != (i % 3 ? 'a' + i % 26 : '3') || v[i * P + 1] != (i % 4 ? 'a' + i % 26 : child ? 'P' : 'C') || v[i * P + 2] != 'a' + i % 26) {
				printf("%s: page %d: %.3s\n", child ? "parent" : "child", i, v + i * P);
				fflush(stdout);
				return 1;
			}
		printf("%s: right\n", child ? "parent" : "child"); fflush(stdout);
	}
}`

// Who forked meanwhile is found by the device, and settled by the same shadows, which
// its memory has too.
func TestSettleChildren(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	dir, dev := privateTmpfs(t)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "forks", forkProgram), filepath.Join(dir, "file")), time.Minute)
	p.WaitText("pids", 10*time.Second)
	var v, s page.Addr
	var parent, child int
	if _, err := fmt.Sscanf(p.Text(), "at %x %x\npids %d %d", &v, &s, &parent, &child); err != nil {
		t.Fatal(err)
	}
	mapped, err := MappedBy(dev, nil)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(mapped)
	want := []int{parent, child}
	slices.Sort(want)
	if !slices.Equal(mapped, want) {
		t.Errorf("mapped by %v, not by %v", mapped, want)
	}
	cfg := SettleConfig{Dev: dev, Backing: func(m proc.Mapping) Backing { return Backing{Shadow: s + page.Addr(m.Offset)} }}
	shadow := page.Range{Start: s, End: s + 64*page.Size}
	for i, pid := range want {
		settleAll(t, pid, cfg, shadow)
		if mapped, err = MappedBy(dev, want); err != nil || !slices.Equal(mapped, want[i+1:]) {
			t.Errorf("mapped by %v, not by %v: %v", mapped, want[i+1:], err)
		}
	}
	for _, pid := range want {
		if err := unix.Kill(pid, unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
	}
	p.WaitText("parent: right\n", 10*time.Second)
	p.WaitText("child: right\n", 10*time.Second)
}
