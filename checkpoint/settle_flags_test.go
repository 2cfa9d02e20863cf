package checkpoint

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// flagsProgram has mappings of a file of each kind, and of no other content than
// zeros. On SIGUSR1 it looks whether each does what it did.
const flagsProgram = `
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
enum { P = 4096, N = 8 };
static struct { char *v; const char *what; int prot; } all[32];
static int n, probe[2];
static char *make(int fd, int prot, const char *what) {
	char *v = mmap(0, N * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, n * N * P);
	mmap(0, P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); /* apart from the next */
	v[P] = n; v[3 * P] = 1;
	mprotect(v, N * P, prot);
	all[n].v = v; all[n].what = what; all[n].prot = prot; n++;
	return v;
}
static void advise(char *v, int how, const char *what) {
	if (madvise(v, N * P, how)) printf("no %s\n", what);
}
static int check(void) {
	int i, bad = 0;
	for (i = 0; i < n; i++) {
		int guard = !strcmp(all[i].what, "guard");
		int k;
		for (k = 0; k < N; k++) {
			char *at = all[i].v + k * P, c = 0;
			int want = k == 1 ? i : k == 3 ? 1 : 0, ok;
			if (guard && k == 3) want = 0;
			errno = 0;
			ok = write(probe[1], at, 1) == 1 && read(probe[0], &c, 1) == 1;
			if (ok != ((all[i].prot & PROT_READ) && !(guard && k == 3))) { printf("%s page %d: readable %d\n", all[i].what, k, ok); bad = 1; }
			if (ok && c != want) { printf("%s page %d: %d\n", all[i].what, k, c); bad = 1; }
		}
	}
	return bad;
}
static volatile int asked;
static void on(int s) { asked = 1; }
int main(int argc, char **argv) {
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600), i;
	char *v;
	if (ftruncate(fd, 32 * N * P) || pipe(probe)) return 1;
	signal(SIGUSR1, on);
	make(fd, PROT_READ | PROT_WRITE, "plain");
	make(fd, PROT_READ, "read");
	make(fd, PROT_NONE, "none");
	make(fd, PROT_READ | PROT_EXEC, "exec");
	make(fd, PROT_READ | PROT_WRITE | PROT_EXEC, "rwx");
	advise(make(fd, PROT_READ | PROT_WRITE, "dontfork"), MADV_DONTFORK, "DONTFORK");
	advise(make(fd, PROT_READ | PROT_WRITE, "dontdump"), MADV_DONTDUMP, "DONTDUMP");
	advise(make(fd, PROT_READ | PROT_WRITE, "hugepage"), MADV_HUGEPAGE, "HUGEPAGE");
	advise(make(fd, PROT_READ | PROT_WRITE, "nohugepage"), MADV_NOHUGEPAGE, "NOHUGEPAGE");
	advise(make(fd, PROT_READ | PROT_WRITE, "mergeable"), MADV_MERGEABLE, "MERGEABLE");
	v = make(fd, PROT_READ | PROT_WRITE, "locked");
	if (mlock(v, N * P)) printf("no mlock\n");
	v = make(fd, PROT_READ | PROT_WRITE, "onfault");
	if (mlock2(v, N * P, MLOCK_ONFAULT)) printf("no mlock2\n");
	v = make(fd, PROT_READ | PROT_WRITE, "guard");
	if (madvise(v + 3 * P, P, 102)) { printf("no guard\n"); n--; }
	for (i = 0; i < n; i++)
		printf("at %lx %s\n", (long)all[i].v, all[i].what);
	if (check()) return 1;
	printf("ready\n"); fflush(stdout);
	while (!asked) pause();
	printf(check() ? "changed\n" : "all right\n"); fflush(stdout);
	for (;;) pause();
}`

// What a mapping is made of, besides its content, is so afterwards.
func TestSettleKeepsProtectionAndFlags(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	dir, dev := privateTmpfs(t)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "flags", flagsProgram), filepath.Join(dir, "file")), time.Minute)
	p.WaitText("ready\n", 10*time.Second)
	before, err := proc.ReadSmaps(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	rep := settleAll(t, p.Pid(), SettleConfig{Dev: dev, Backing: func(proc.Mapping) Backing { return Backing{} }})
	t.Log(&rep)
	after, err := proc.ReadSmaps(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for line := range strings.Lines(p.Text()) {
		var at page.Addr
		var what string
		if n, _ := fmt.Sscanf(line, "at %x %s", &at, &what); n != 2 {
			continue
		}
		was, now := mappingAt(before, at), mappingAt(after, at)
		if was == nil || now == nil {
			t.Fatalf("%s: no mapping", what)
		}
		seen++
		if now.Prot != was.Prot || now.Ino != 0 {
			t.Errorf("%s: %+v became %+v", what, was, now)
		}
		for _, f := range []string{"dc", "dd", "hg", "nh", "mg", "lo", "lf"} {
			if was.Has(f) != now.Has(f) {
				t.Errorf("%s: flag %s: %v became %v", what, f, was.Flags, now.Flags)
			}
		}
	}
	if seen < 12 {
		t.Errorf("only %d kinds were looked at", seen)
	}
	p.Signal(unix.SIGUSR1)
	p.WaitText("all right\n", 10*time.Second)
}

func mappingAt(maps []proc.Mapping, at page.Addr) *proc.Mapping {
	i := slices.IndexFunc(maps, func(m proc.Mapping) bool { return m.Contains(at) })
	if i < 0 {
		return nil
	}
	return &maps[i]
}
