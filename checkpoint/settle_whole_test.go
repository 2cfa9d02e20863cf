package checkpoint

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// early makes cfg copy ahead what the program has written. moves: mappings are not
// unregistered, and the reader of the events lets their moves go on.
func (v *veil) early(cfg SettleConfig, fd int, moves bool) SettleConfig {
	cfg.Early = func(context.Context, []SettlePart) error { return nil }
	cfg.Moves = moves
	cfg.Stopped = func(ctx context.Context, parts []SettlePart) (page.Set, error) {
		for _, p := range parts {
			all := []page.Addr{p.Start, p.Shadow}
			if moves && p.Aside != 0 {
				all = all[1:]
			}
			for _, at := range all {
				if err := sys.UffdUnregister(fd, uint64(at), p.Bytes()); err != nil && err != unix.EINVAL {
					return page.Set{}, err
				}
			}
		}
		return v.stopped(ctx, parts)
	}
	return cfg
}

// What the program has written is copied while it writes, protects, gives up, moves,
// guards and forks.
func TestSettleAhead(t *testing.T) {
	for _, moves := range []bool{false, true} {
		for _, threads := range []int{1, 8} {
			t.Run(fmt.Sprintf("moves=%v/threads=%d", moves, threads), func(t *testing.T) {
				testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
				testutil.NoLeaks(t)
				v := startVeiled(t, 8, 4096, threads, "uffd")
				fd := v.trap(t, nil)
				v.written(t, 10)
				rep := settleAll(t, v.Pid(), v.early(v.config(), fd, moves), v.shadows()...)
				t.Log(&rep)
				if rep.Early == 0 {
					t.Error("nothing was copied ahead")
				}
				v.noTrace(t)
				v.finish(t)
			})
		}
	}
}

// growing writes all pages of one mapping of a file, again and again, and checks them.
// One of its threads makes the mapping longer, which cannot be done with what is two
// mappings (EFAULT, before Linux 6.17), and shorter again.
const growing = `
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
enum { P = 4096 };
static char *v;
static long pages, threads, hot;
static volatile int end;
static uint32_t *version;
static void fail(const char *what, long p) { printf("FAIL %s at page %ld: %s\n", what, p, strerror(errno)); fflush(stdout); _exit(1); }
static void *work(void *arg) {
	long tid = (long)arg, p;
	uint64_t k = 0;
	while (!end)
		for (p = tid; p < pages && !end; p += threads) {
			uint64_t *at = (uint64_t *)(v + p * P);
			if (at[0] != version[p] || at[100] != version[p]) fail("content", p);
			if (p / threads % 64 < hot || k == 0) { version[p]++; at[0] = at[100] = version[p]; }
			if (p + threads >= pages) { k++; usleep(100); }
		}
	return 0;
}
static void *grow(void *arg) {
	while (!end) {
		if (mremap(v, pages * P, (pages + 1) * P, 0) != MAP_FAILED) {
			if (munmap(v + pages * P, P)) fail("munmap", pages);
		} else if (errno == EFAULT)
			fail("mremap", 0);
		usleep(50);
	}
	return 0;
}
static void on(int s) { if (s == SIGTERM) end = 1; }
int main(int argc, char **argv) {
	long i;
	int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	pages = atol(argv[3]); threads = atol(argv[4]); hot = atol(argv[5]);
	version = calloc(pages, 4);
	signal(SIGTERM, on); signal(SIGUSR1, on);
	if (ftruncate(fd, (pages + 1) * P)) return 2;
	char *s = mmap(0, (pages + 1024) * P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	v = mmap(0, (pages + 1024) * P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(v, (pages + 1024) * P);
	munmap(s, (pages + 1024) * P);
	v = (char *)(((long)v + (2 << 20) - 1) & ~((2l << 20) - 1));
	s = (char *)(((long)s + (2 << 20) - 1) & ~((2l << 20) - 1));
	s = mmap(s, pages * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	v = mmap(v, pages * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0);
	char *gone = mmap(0, pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	printf("region %lx %lx 0 %lx\ngone %lx\nuffd %ld\n", (long)v, (long)s, pages * P, (long)gone, syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	/* mseal(2), Linux 6.10: nobody can move the shadow any more. */
	if (argc > 6 && !strcmp(argv[6], "seal") && syscall(462, s, pages * P, 0)) return 2;
	printf("ready\n"); fflush(stdout);
	pthread_t t[threads + 1];
	if (threads == 0) for (;;) pause();
	pthread_create(&t[threads], 0, argc < 7 ? grow : work, (void *)pages);
	for (i = 0; i < threads; i++) pthread_create(&t[i], 0, work, (void *)i);
	for (i = 0; i <= threads; i++) pthread_join(t[i], 0);
	printf("ok %u\n", version[0]);
	return 0;
}`

func startGrowing(t testing.TB, pages, threads, hot int, args ...string) *veiled {
	t.Helper()
	dir, dev := privateTmpfs(t)
	return runVeiled(t, dir, dev, []string{testutil.CCText(t, "growing", growing)}, 1, pages, threads, append([]string{fmt.Sprint(hot)}, args...)...)
}

// mappings are what the process has at r.
func (v *veiled) mappings(t testing.TB, r page.Range) (out []proc.Mapping) {
	t.Helper()
	maps, err := proc.ReadMaps(v.Pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range maps {
		if m.Overlaps(r) {
			out = append(out, m)
		}
	}
	return out
}

func (v *veiled) region(i int) page.Range {
	r := v.regions[i]
	return page.Range{Start: r.v, End: r.v + page.Addr(r.bytes)}
}

// A mapping of which the program has written every page, and goes on with some, is one at
// any time: a program that moves or grows it gets no EFAULT, as with any memory.
func TestSettleWhole(t *testing.T) {
	for _, moves := range []bool{false, true} {
		t.Run(fmt.Sprintf("moves=%v", moves), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
			testutil.NoLeaks(t)
			v := startGrowing(t, 16<<10, 3, 1)
			fd := v.trap(t, nil)
			v.written(t, 100)
			cfg := v.early(v.config(), fd, moves)
			cfg.Limit = 20 * time.Millisecond // others may have the processors
			cfg.Slice = 1 << 30
			cfg.Backing = func(m proc.Mapping) Backing {
				if m.Offset >= v.regions[0].bytes {
					return Backing{} // it has grown
				}
				return v.backing(m)
			}
			var replaced uint64
			cfg.Replaced = func(parts []SettlePart) {
				maps := v.mappings(t, page.Range{End: 1 << 47})
				for _, p := range parts {
					for _, m := range maps {
						if m.Dev == v.dev && m.Offset < p.Offset+p.Bytes() && p.Offset < m.Offset+m.Bytes() {
							t.Errorf("part %v was replaced, and there is %+v", p, m)
						}
					}
					replaced += p.Bytes()
				}
			}
			rep := settleAll(t, v.Pid(), cfg, v.shadows()...)
			t.Log(&rep)
			if replaced != rep.Settled {
				t.Errorf("told of %d bytes that were replaced", replaced)
			}
			if rep.Early < v.regions[0].bytes/2 {
				t.Errorf("only %d bytes were copied ahead", rep.Early)
			}
			v.finish(t)
		})
	}
}

// A mapping whose shadow cannot take its place, after it was moved aside, is back where
// it was, also where nobody is there any more to see to it.
func TestSettledAsideComesBack(t *testing.T) {
	for _, kill := range []bool{false, true} {
		t.Run(fmt.Sprintf("kill=%v", kill), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
			testutil.NoLeaks(t)
			const pages = 4 << 10
			start := func() *veiled {
				v := startGrowing(t, pages, 2, 1, "seal")
				v.trap(t, nil)
				v.written(t, 10)
				return v
			}
			v := start()
			cmd := settlingCmdHow(v, 0, 2)
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("%v\n%s", err, cmd.Stderr)
			}
			points := strings.Fields(string(out))
			if kill {
				v.finish(t)
				v = start()
				at := slices.Index(points, "gate-running") + 1
				if err := settlingCmdHow(v, at, 2).Run(); at == 0 || err == nil {
					t.Fatalf("not killed at point %d", at)
				}
				testutil.Eventually(t, 5*time.Second, func() error {
					if ms := v.mappings(t, v.region(0)); len(ms) != 1 || ms[0].Dev != v.dev {
						return fmt.Errorf("it has %+v", ms)
					}
					return nil
				})
				if out, err := settlingCmdHow(v, 0, 2).Output(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			if !slices.Contains(points, "settle-early") {
				t.Error("it was not moved aside")
			}
			if ms := v.mappings(t, v.region(0)); len(ms) != 1 || ms[0].Dev != v.dev {
				t.Errorf("it has %+v", ms)
			}
			v.noTrace(t)
			v.finish(t)
		})
	}
}

// While memory arrives, a mapping is settled slice by slice, in any order. In the end it
// is one again, also where nothing was ever written to a part of the shadow.
func TestSettledSlicesJoin(t *testing.T) {
	for _, early := range []bool{false, true} {
		t.Run(fmt.Sprintf("early=%v", early), func(t *testing.T) {
			testutil.Require(t, testutil.Root, testutil.AMD64, testutil.Userfaultfd)
			testutil.NoLeaks(t)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 1))
			const count, slice = 16, 1 << 20
			v := startUntouched(t, count*slice>>page.Shift)
			s, err := Open(v.Pid(), Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			here := page.Set{}
			cfg := v.config()
			if early {
				cfg = v.early(cfg, v.trap(t, nil), false)
			}
			cfg.Slice = slice
			cfg.Backing = func(m proc.Mapping) Backing {
				b := v.backing(m)
				b.Later = here.BytesIn(m.Range) < m.Bytes()
				return b
			}
			st, err := NewSettler(s, cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			r := v.region(0)
			mem, err := proc.OpenMemory(v.Pid())
			if err != nil {
				t.Fatal(err)
			}
			defer mem.Close()
			for n, i := range rnd.Perm(count) {
				at := r.Start&^(slice-1) + page.Addr(i*slice)
				here.Add(page.Range{Start: max(at, r.Start), End: min(at+slice, r.End)})
				if i == count-1 { // it need not be aligned
					here.Add(page.Range{Start: at, End: r.End})
				}
				if n > 0 { // what comes first is all zeros
					if err := mem.WriteAt([]byte{1}, v.regions[0].s+max(at, r.Start)-r.Start); err != nil {
						t.Fatal(err)
					}
				}
				rep, err := st.Settle(t.Context(), nil)
				if err != nil || len(rep.Skipped) > 0 {
					t.Fatal(err, rep.Skipped)
				}
				if n == 0 && (rep.Settled == 0 || rep.Later == 0) {
					t.Errorf("one of the slices: %v", &rep)
				}
			}
			if err := st.Close(); err != nil {
				t.Fatal(err)
			}
			if ms := v.mappings(t, r); len(ms) != 1 || ms[0].Ino != 0 {
				t.Errorf("%d mappings: %+v", len(ms), ms)
			}
		})
	}
}

// startUntouched starts a program with one mapping of a file of zeros, and a shadow that
// was never touched.
func startUntouched(t testing.TB, pages int) *veiled {
	t.Helper()
	dir, dev := privateTmpfs(t)
	return runVeiled(t, dir, dev, []string{testutil.CCText(t, "growing", growing)}, 1, pages, 0, "0")
}

// A mapping is replaced as a whole only when all of it is there; of a longer one the
// slices that are.
func TestSettleWaitsForAWholeMapping(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	v := startUntouched(t, 512)
	s, err := Open(v.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	missing := v.region(0).End - page.Size
	cfg := v.config()
	cfg.Backing = func(m proc.Mapping) Backing {
		b := v.backing(m)
		switch {
		case m.Start > missing || missing == 0:
		case m.Start == missing:
			b.Later, b.Bytes = true, page.Size
		default:
			b.Bytes = uint64(missing - m.Start)
		}
		return b
	}
	st, err := NewSettler(s, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	rep, err := st.Settle(t.Context(), nil)
	if err != nil || rep.Settled != 0 || rep.Later != v.regions[0].bytes || len(rep.Stops) > 0 {
		t.Errorf("one page is missing: %v, %v", &rep, err)
	}
	missing = 0
	if rep, err = st.Settle(t.Context(), nil); err != nil || rep.Settled != v.regions[0].bytes {
		t.Errorf("none is missing: %v, %v", &rep, err)
	}
}

// Release takes away shadows whether they are empty by now or not, and nothing of a
// program that has come by exec in the place of the one that was settled.
func TestReleaseAfterExec(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	dir, dev := privateTmpfs(t)
	sh := filepath.Join(dir, "run")
	if err := os.WriteFile(sh, []byte("trap '' URG; read x; exec \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	in, out := pipe(t)
	cmd := exec.Command("/bin/sh", sh, "sleep", "1000")
	cmd.Stdin = in
	p := testutil.StartCmd(t, cmd, time.Minute)
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	st, err := NewSettler(s, SettleConfig{Dev: dev, Backing: func(proc.Mapping) Backing { return Backing{} }})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if _, err := st.Settle(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if _, err := out.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 5*time.Second, func() error {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.Pid())); err != nil || !strings.HasPrefix(string(b), "sleep") {
			return fmt.Errorf("it is %q, %v", b, err)
		}
		return nil
	})
	settled(t, p.Pid())
	before, err := proc.ReadMaps(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range before {
		if m.Name == "[heap]" || m.Ino == 0 && m.Name == "" {
			if err := st.Release(t.Context(), []page.Range{m.Range}); err != nil {
				t.Error(err)
			}
		}
	}
	after, err := proc.ReadMaps(p.Pid())
	if err != nil || len(after) != len(before) {
		t.Errorf("of %d mappings %d are left, %v", len(before), len(after), err)
	}
}
