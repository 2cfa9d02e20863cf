package checkpoint

import (
	"bytes"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const stateProgram = `
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static void on(int s) { (void)s; }
static void *worker(void *p) { (void)p; prctl(PR_SET_NAME, "the worker"); for (;;) pause(); return 0; }
int main(void) {
	struct sigaction sa = { .sa_handler = on, .sa_flags = SA_RESTART | SA_ONSTACK };
	stack_t ss = { .ss_sp = malloc(65536), .ss_size = 65536 };
	struct sigevent ev = { .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 2, .sigev_value.sival_int = 77 };
	struct itimerspec its = { { 7, 0 }, { 1000, 0 } };
	struct itimerval itv = { { 5, 0 }, { 2000, 0 } };
	struct rlimit rl = { 123L << 30, 456L << 30 }; /* a limit that nobody lowers: raising one takes a capability */
	sigset_t m;
	timer_t tm;
	pthread_t th;
	char *anon, *shared, *mem;
	int fd, named;
	sigaddset(&sa.sa_mask, SIGHUP);
	sigaction(SIGUSR1, &sa, 0);
	signal(SIGUSR2, SIG_IGN);
	sigaltstack(&ss, 0);
	sigemptyset(&m); sigaddset(&m, SIGRTMIN + 5);
	sigprocmask(SIG_BLOCK, &m, 0);
	pthread_create(&th, 0, worker, 0);
	sigaddset(&m, SIGTERM);
	sigprocmask(SIG_BLOCK, &m, 0);
	sigqueue(getpid(), SIGRTMIN + 5, (union sigval){ .sival_int = 1 });
	sigqueue(getpid(), SIGRTMIN + 5, (union sigval){ .sival_int = 2 });
	pthread_kill(pthread_self(), SIGTERM);
	timer_create(CLOCK_MONOTONIC, &ev, &tm); timer_settime(tm, 0, &its, 0);
	setitimer(ITIMER_REAL, &itv, 0);
	setrlimit(RLIMIT_FSIZE, &rl);
	umask(0123);
	nice(3);
	prctl(PR_SET_TIMERSLACK, 123456);
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0);
	anon = mmap(0, 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	anon[4096] = 1;
	named = prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, anon, 16 * 4096, "named") == 0; /* a kernel may be built without */
	madvise(anon, 16 * 4096, MADV_DONTFORK);
	shared = mmap(0, 4 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	shared[3 << 20] = 1;
	fd = memfd_create("object", MFD_ALLOW_SEALING);
	ftruncate(fd, 2 << 20);
	mem = mmap(0, 2 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	mem[4096] = 1;
	printf("%lx %lx %lx %lx %d\n", (unsigned long)anon, (unsigned long)shared, (unsigned long)mem, (unsigned long)ss.ss_sp, named);
	fflush(stdout);
	for (;;) { struct timespec ts = { 1000, 0 }; nanosleep(&ts, 0); }
}`

// What a program has set up stands in its image.
func TestStateInTheImage(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "state", stateProgram)), time.Minute)
	p.WaitText("\n", 10*time.Second)
	await(t, p.Pid(), 'S')
	f := strings.Fields(p.Text())
	at := func(i int) page.Addr {
		a, err := strconv.ParseUint(f[i], 16, 64)
		must(t, err)
		return page.Addr(a)
	}
	var img *image.Image
	var mem image.Memory
	for range 3 { // the later ones find the sleep restarted by the kernel
		s, ctx := openFor(t, p.Pid())
		must(t, s.Freeze(ctx))
		i, m, err := s.Capture(ctx)
		must(t, err)
		must(t, i.Validate())
		img, mem = i, m[0]
		must(t, s.Thaw(ctx))
		await(t, p.Pid(), 'S')
	}
	pr := &img.Processes[0]
	check := func(ok bool, what string, v any) {
		t.Helper()
		if !ok {
			t.Errorf("%s: %+v", what, v)
		}
	}
	th, worker := &pr.Threads[0], &pr.Threads[len(pr.Threads)-1]
	check(len(pr.Threads) == 2 && th.TID == p.Pid() && worker.Comm == "the worker", "threads", pr.Threads)
	check(th.RestartB != nil && (th.Regs.RAX == unix.SYS_CLOCK_NANOSLEEP || th.Regs.RAX == unix.SYS_NANOSLEEP), "a sleep that is restarted again and again", th.Regs)
	check(worker.Regs.RAX == unix.SYS_PAUSE && worker.RestartB == nil, "a pause", worker.Regs)
	check(th.AltStack.SP == uint64(at(3)) && th.AltStack.Size == 65536, "alternate stack", th.AltStack)
	check(worker.AltStack.Flags&sys.SSDisable != 0, "no alternate stack", worker.AltStack)
	check(th.Robust != 0 && th.RobustSz == 24 && th.ClearTID != 0 && th.Rseq.Ptr != 0, "what the C library registers", th)
	check(th.TimerSlk == 123456 && worker.TimerSlk == 50000, "timer slack", th.TimerSlk)
	check(th.Sched.Nice == 3 && worker.Sched.Nice == 0 && th.IOPrio == 0, "nice", th.Sched)
	check(len(th.XState) >= 576 && len(th.Affinity) > 0, "extended state", len(th.XState))
	check(th.SigMask&sys.SigBit(int(unix.SIGTERM)) != 0 && worker.SigMask&sys.SigBit(int(unix.SIGTERM)) == 0, "mask", th.SigMask)
	check(len(th.Pending) == 1 && th.Pending[0][0] == byte(unix.SIGTERM), "thread's signals", th.Pending)
	check(len(pr.Pending) == 2 && pr.Pending[0][24] == 1 && pr.Pending[1][24] == 2, "process's signals", pr.Pending)
	i := slices.IndexFunc(pr.SigActions, func(a image.SigAction) bool { return a.Signal == int(unix.SIGUSR1) })
	check(i >= 0 && pr.SigActions[i].Flags&(sys.SARestart|sys.SARestorer) == sys.SARestart|sys.SARestorer &&
		pr.SigActions[i].Mask == sys.SigBit(int(unix.SIGHUP)) && pr.SigActions[i].Restorer != 0, "action", pr.SigActions)
	check(slices.ContainsFunc(pr.SigActions, func(a image.SigAction) bool { return a.Signal == int(unix.SIGUSR2) && a.Handler == sys.SigIgn }),
		"ignored signal", pr.SigActions)
	pt := pr.PosixTimers
	check(len(pt) == 1 && pt[0].Clock == unix.CLOCK_MONOTONIC && pt[0].IntervalNS == 7e9 && pt[0].ValueNS > 900e9 && uint32(pt[0].Value) == 77 &&
		pt[0].Signal == 36, "timer", pt)
	check(pr.ITimers[0].IntervalUS == 5e6 && pr.ITimers[0].ValueUS > 1900e6, "interval timer", pr.ITimers)
	check(pr.Rlimits[unix.RLIMIT_FSIZE] == image.Rlimit{Resource: unix.RLIMIT_FSIZE, Cur: 123 << 30, Max: 456 << 30}, "limits", pr.Rlimits)
	check(pr.Umask == 0o123 && pr.ChildSubreaper && pr.THPDisable && pr.Dumpable == 1 && !pr.Stopped, "process", pr.Umask)
	check(pr.MM.StartCode != 0 && pr.MM.Brk >= pr.MM.StartBrk && pr.MM.ArgStart < pr.MM.ArgEnd, "mm", pr.MM)
	check(bytes.HasPrefix(pr.VDSO, []byte("\x7fELF")) && bytes.Count(pr.VDSO[len(pr.VDSO)-512:], []byte{0}) == 512, "vdso", len(pr.VDSO))
	check(img.Monotonic > 0 && img.Host.XFeatures&3 == 3 && int(img.Host.XSize) == len(th.XState), "host", img.Host)

	vma := func(a page.Addr) *image.VMA {
		t.Helper()
		for i := range pr.VMAs {
			if v := &pr.VMAs[i]; v.Contains(a) {
				return v
			}
		}
		t.Fatalf("no mapping at %v", a)
		return nil
	}
	a := vma(at(0))
	check(a.Kind == image.VMAAnon && (a.Name == "named") == (f[4] == "1") && a.Has("dc") && a.Has("nr"), "named memory", []any{a.Kind, a.Name, a.Flags})
	check(mem.Lazy.Contains(at(0)+4096) && !mem.Lazy.Contains(at(0)+8192), "its content", mem.Lazy.Intersect(a.Range))
	s := vma(at(1))
	check(s.Kind == image.VMAShared && s.Shared && img.Memories[s.Memory].Size == 4<<20, "shared memory", s)
	check(mem.Lazy.Contains(at(1)+3<<20) && !mem.Lazy.Contains(at(1)), "its content", mem.Lazy.Intersect(s.Range))
	o := vma(at(2))
	check(o.Kind == image.VMAShared && img.Memories[o.Memory].Memfd && img.Memories[o.Memory].Name == "object", "memfd", o)
	check(mem.Eager.Contains(at(2)+4096) && !mem.Lazy.Contains(at(2)+4096), "its content", mem.Eager.Intersect(o.Range))
	check(mem.Hot.Contains(page.Addr(th.Regs.RSP)) && mem.Hot.Contains(page.Addr(worker.Regs.RSP)), "hot pages", mem.Hot.Ranges())
	exe := vma(page.Addr(pr.MM.StartCode))
	check(exe.Kind == image.VMAFile && exe.File.BuildID != "" && exe.File.Size > 0 && exe.Path == pr.Exe, "program", exe)
	for _, r := range mem.Hot.Ranges() {
		check(len(mem.Lazy.Gaps(r)) == 0, "hot but not lazy", r)
	}
	for _, r := range mem.Eager.Ranges() {
		check(len(mem.Lazy.Intersect(r)) == 0, "both eager and lazy", r)
	}
}
