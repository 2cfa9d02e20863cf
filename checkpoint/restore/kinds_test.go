package restore

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// kinds has mappings of every kind, each page with a pattern of its own, and
// says whether all of it is right when it gets SIGUSR1.
const kinds = `
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define P 4096L
static struct { char *at; long pages; int how; const char *name; } all[64];
static int n, window = -1, alone = -1;

static void die(const char *what) { printf("bad %s: %s\n", what, strerror(errno)); fflush(stdout); _exit(1); }

static void pattern(char *b, int i, long page) {
	for (int k = 0; k < P; k += 8) { uint64_t v = i * 1000003ull + page * 4099 + k; memcpy(b + k, &v, 8); }
}
/* how: 0 has no content, 1 every page, 2 every second page */
static char *note(void *at, long pages, int how, const char *name) {
	if (at == MAP_FAILED) die(name);
	all[n].at = at; all[n].pages = pages; all[n].how = how; all[n].name = name; n++;
	return at;
}
static void fill(int i) {
	for (long p = 0; p < all[i].pages; p++)
		if (all[i].how == 1 || (all[i].how == 2 && p % 2 == 0)) pattern(all[i].at + p * P, i, p);
}
static void verify(void) {
	static char want[P], zero[P];
	for (long p = 0; window >= 0 && p < 500; p++) {
		if (pread(window, want, P, p * P) != P) die("pread");
		for (int k = 0; k < P; k++) if (want[k] != 7) { printf("bad content of a memfd, page %ld outside of its mapping\n", p); fflush(stdout); _exit(1); }
	}
	for (long p = 0; alone >= 0 && p < 699; p++) {
		if (pread(alone, want, P, p * P) != P) die("pread");
		for (int k = 0; k < P; k++) if (want[k] != (p % 2 ? 0 : 5)) { printf("bad content of a memfd that is not mapped, page %ld\n", p); fflush(stdout); _exit(1); }
	}
	for (int i = 0; i < n; i++)
		for (long p = 0; p < all[i].pages; p++) {
			int has = all[i].how == 1 || (all[i].how == 2 && p % 2 == 0);
			if (!all[i].how) continue;
			pattern(want, i, p);
			if (memcmp(all[i].at + p * P, has ? want : zero, P)) { printf("bad content of %s page %ld\n", all[i].name, p); fflush(stdout); _exit(1); }
		}
}
static char *anon(long pages, int prot, int flags, int how, const char *name) {
	/* a page between neighbours keeps them from merging */
	char *at = mmap(NULL, (pages + 2) * P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (at == MAP_FAILED) die(name);
	munmap(at, (pages + 2) * P);
	return note(mmap(at + P, pages * P, prot, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | flags, -1, 0), pages, how, name);
}
static void advise(char *at, long pages, int advice, const char *name) {
	if (madvise(at, pages * P, advice)) printf("without %s: %s\n", name, strerror(errno));
}

int main(int argc, char **argv) {
	char *m, *file = argv[1];
	int fd;
	sigset_t set;
	sigemptyset(&set); sigaddset(&set, SIGUSR1); sigprocmask(SIG_BLOCK, &set, NULL);
	(void)argc;

	anon(5, PROT_READ | PROT_WRITE, 0, 2, "anonymous"); fill(n - 1);
	anon(64, PROT_NONE, MAP_NORESERVE, 0, "reserved");
	m = anon(3, PROT_READ | PROT_WRITE, 0, 1, "read-only"); fill(n - 1); mprotect(m, 3 * P, PROT_READ);
	m = anon(3, PROT_READ | PROT_WRITE, 0, 1, "executable"); fill(n - 1); mprotect(m, 3 * P, PROT_READ | PROT_EXEC);
	m = anon(4, PROT_READ | PROT_WRITE, MAP_GROWSDOWN, 1, "grows down"); fill(n - 1);
	m = anon(4, PROT_READ | PROT_WRITE, 0, 2, "dontfork"); fill(n - 1); advise(m, 4, MADV_DONTFORK, "dontfork");
	m = anon(4, PROT_READ | PROT_WRITE, 0, 2, "dontdump"); fill(n - 1); advise(m, 4, MADV_DONTDUMP, "dontdump");
	m = anon(4, PROT_READ | PROT_WRITE, 0, 2, "wipeonfork"); fill(n - 1); advise(m, 4, MADV_WIPEONFORK, "wipeonfork");
	m = anon(4, PROT_READ | PROT_WRITE, 0, 2, "mergeable"); fill(n - 1); advise(m, 4, MADV_MERGEABLE, "mergeable");
	m = anon(4, PROT_READ | PROT_WRITE, 0, 2, "sequential"); fill(n - 1); advise(m, 4, MADV_SEQUENTIAL, "sequential");
	m = anon(4, PROT_READ | PROT_WRITE, 0, 2, "random"); fill(n - 1); advise(m, 4, MADV_RANDOM, "random");
	m = anon(1024, PROT_READ | PROT_WRITE, 0, 2, "hugepage"); advise(m, 1024, MADV_HUGEPAGE, "hugepage"); fill(n - 1);
	m = anon(1024, PROT_READ | PROT_WRITE, 0, 2, "nohugepage"); advise(m, 1024, MADV_NOHUGEPAGE, "nohugepage"); fill(n - 1);
	m = anon(4, PROT_READ | PROT_WRITE, 0, 1, "named"); fill(n - 1);
	prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, m, 4 * P, "a name");
	m = anon(4, PROT_READ | PROT_WRITE, 0, 1, "locked"); mlock(m, 4 * P); fill(n - 1);
	m = anon(8, PROT_READ | PROT_WRITE, 0, 2, "guarded"); fill(n - 1);
	advise(m + 3 * P, 1, 102, "guard"); all[n - 1].pages = 3;

	fd = open(file, O_RDWR | O_CREAT, 0600);
	if (fd < 0 || ftruncate(fd, 700 * P)) die(file);
	m = note(mmap(NULL, 600 * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 100 * P), 600, 2, "large private file"); fill(n - 1);
	mprotect(m + 200 * P, 200 * P, PROT_READ);
	note(mmap(NULL, 4 * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 4 * P), 4, 2, "private file"); fill(n - 1);
	note(mmap(NULL, 4 * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 8 * P), 4, 1, "shared file"); fill(n - 1);
	close(fd);
	fd = open(file, O_RDONLY);
	note(mmap(NULL, 2 * P, PROT_READ, MAP_SHARED, fd, 12 * P), 2, 0, "read-only shared file");
	close(fd);

	note(mmap(NULL, 8 * P, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 8, 2, "shared anonymous"); fill(n - 1);
	m = note(mmap(NULL, 8 * P, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 8, 1, "shared anonymous in two"); fill(n - 1);
	mprotect(m + 4 * P, 4 * P, PROT_READ);
	note(mmap(NULL, 600 * P, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0), 600, 2, "large shared anonymous"); fill(n - 1);

	fd = memfd_create("twice", MFD_CLOEXEC);
	ftruncate(fd, 6 * P);
	m = note(mmap(NULL, 6 * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), 6, 2, "memfd"); fill(n - 1);
	if (mmap(NULL, 2 * P, PROT_READ, MAP_SHARED, fd, 2 * P) == MAP_FAILED) die("memfd again");
	for (int big = 0; big < 2; big++) {
		long pages = big ? 600 : 4;
		int seals = F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
		fd = memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
		ftruncate(fd, pages * P);
		m = mmap(NULL, pages * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		note(m, pages, 1, big ? "large sealed memfd" : "sealed memfd"); fill(n - 1);
		munmap(m, pages * P);
		if (fcntl(fd, F_ADD_SEALS, seals)) die("seals");
		m = mmap(m, pages * P, PROT_READ, MAP_SHARED, fd, 0);
		if (m == MAP_FAILED) die("map sealed"); 
		all[n - 1].at = m;
	}
	for (int open = 0; open < 2; open++) {
		fd = memfd_create("large", MFD_CLOEXEC);
		ftruncate(fd, 600 * P);
		note(mmap(NULL, 600 * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), 600, 2, open ? "large memfd" : "large memfd without a descriptor"); fill(n - 1);
		if (!open) close(fd);
	}
	if (mmap(NULL, 300 * P, PROT_READ, MAP_SHARED, fd, 100 * P) == MAP_FAILED) die("large memfd again");
	window = fd = memfd_create("window", MFD_CLOEXEC);
	ftruncate(fd, 900 * P);
	m = mmap(NULL, 900 * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	memset(m, 7, 900 * P);
	munmap(m, 900 * P);
	note(mmap(NULL, 300 * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 500 * P), 300, 1, "window on a memfd"); fill(n - 1);
	m = mmap(NULL, 2 * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 550 * P);
	memset(m, 9, P);
	alone = memfd_create("alone", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	for (long p = 0; p < 700; p += 2) { static char b[P]; memset(b, 5, P); if (pwrite(alone, b, P, p * P) != P) die("pwrite"); }
	if (fcntl(alone, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW)) die("seals");
	fd = open("/dev/zero", O_RDWR);
	note(mmap(NULL, 3 * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), 3, 2, "/dev/zero"); fill(n - 1);
	close(fd);
	m = anon(3, PROT_READ | PROT_WRITE, 0, 1, "sealed mapping"); fill(n - 1);
	if (syscall(462, m, 3 * P, 0)) printf("without mseal: %s\n", strerror(errno));
	sbrk(100 * P);

	verify();
	printf("ready\n"); fflush(stdout);
	for (;;) {
		int sig;
		sigwait(&set, &sig);
		verify();
		printf("fine\n"); fflush(stdout);
	}
}
`

// volatile are flags that do not belong to the process: soft dirtiness, a trap,
// accounting that depends on how the mapping came about, locking on fault; and
// sh, which a mapping of a sealed memfd has or has not by the descriptor that it
// was made of.
var volatile = []string{"sd", "um", "uw", "ac", "lf", "sh"}

// layout is what smaps says of the mappings, in a form to compare.
func layout(t *testing.T, pid int) []string {
	t.Helper()
	ms, err := proc.ReadSmaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	// Neighbours that differ only in their history are one in a new process.
	var merged []proc.Mapping
	for _, m := range ms {
		m.Flags = slices.DeleteFunc(m.Flags, func(f string) bool { return slices.Contains(volatile, f) })
		slices.Sort(m.Flags)
		if n := len(merged); n > 0 {
			l := &merged[n-1]
			if l.End == m.Start && l.Prot == m.Prot && l.Shared == m.Shared && l.Name == m.Name && l.Ino == m.Ino &&
				slices.Equal(l.Flags, m.Flags) && (m.Ino == 0 || l.Offset+l.Bytes() == m.Offset) {
				l.End = m.End
				continue
			}
		}
		merged = append(merged, m)
	}
	var out []string
	for _, m := range merged {
		name := m.Name
		if m.Shared && (strings.HasPrefix(name, "/dev/zero") || strings.HasPrefix(name, "/memfd:")) {
			name += " (object)"
		}
		out = append(out, fmt.Sprintf("%v prot %d shared %v offset %#x %s %v", m.Range, m.Prot, m.Shared, m.Offset, name, m.Flags))
	}
	return out
}

func TestMappingsOfEveryKind(t *testing.T) {
	everyKind(t, func(p *testutil.Process) *server { return move(t, p, nil) })
}

// TestLandInMappingsOfEveryKind is the same with pages that have landed before,
// right ones and stale ones, in all that can have some.
func TestLandInMappingsOfEveryKind(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	everyKind(t, func(p *testutil.Process) *server {
		var kept, of uint64
		trap := moveLaid(t, p, nil, func(s *Skeleton, sn *snapshot) {
			lazy, eager, stale := landSome(&lander{t, s, timed(t)}, rng, sn)
			if lazy == 0 || eager == 0 || stale == 0 {
				t.Errorf("%d and %d right and %d stale pages were landed", lazy, eager, stale)
			}
			kept, of = eager, sn.mem[0].Eager.Pages()
		})
		// A stale page may have come by another mapping of an object: there are two such.
		if trap.eager > of-kept+2 {
			t.Errorf("%d pages had to come before it ran, of %d of which %d had landed", trap.eager, of, kept)
		}
		return trap
	})
}

func everyKind(t *testing.T, move func(*testutil.Process) *server) {
	require(t)
	testutil.NoLeaks(t)
	bin := testutil.CCText(t, "kinds", kinds)
	p := testutil.Start(t, bin, filepath.Join(t.TempDir(), "file"))
	p.WaitText("ready", limit)
	want := layout(t, p.Pid())
	var guards []page.Range
	for hop := range 2 {
		trap := move(p)
		trap.resident(t)
		var found []page.Range // before this hop, which is after the last
		for _, m := range trap.sn.mem {
			found = append(found, m.Guards.Ranges()...)
		}
		if hop == 0 {
			guards = found
		}
		if len(found) != 1 || !slices.Equal(found, guards) {
			t.Errorf("hop %d: guards %v, want %v and one", hop, found, guards)
		}
		if st, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Pid())); err != nil || !strings.Contains(string(st), "THP_enabled:\t1") {
			t.Errorf("hop %d: it has no huge pages any more (%v)", hop, err)
		}
		got := layout(t, p.Pid())
		for _, l := range want {
			if !slices.Contains(got, l) {
				t.Errorf("hop %d: missing: %s", hop, l)
			}
		}
		for _, l := range got {
			if !slices.Contains(want, l) {
				t.Errorf("hop %d: instead:  %s", hop, l)
			}
		}
		before := strings.Count(p.Text(), "fine")
		p.Signal(unix.SIGUSR1)
		testutil.Eventually(t, limit, func() error {
			if !p.Alive() || strings.Contains(p.Text(), "bad") {
				t.Fatalf("hop %d: %s", hop, p.Text())
			}
			if strings.Count(p.Text(), "fine") == before {
				return fmt.Errorf("it says nothing: %q", p.Text())
			}
			return nil
		})
	}
}
