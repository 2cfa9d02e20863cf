/* Timers of every kind: they go on, on time, with their values and targets. */
#include "everything.h"

#include <stdatomic.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>

#define PERIOD_NS 10000000L
#define FAR_S 36000 /* ten hours */

enum { PROCESS, REALTIME, THREAD, ITIMER, FD, KINDS };
static const char *const names[] = { "POSIX timer", "POSIX timer on CLOCK_REALTIME", "thread-directed POSIX timer", "ITIMER_REAL", "timerfd" };
static _Atomic uint64_t fired[KINDS];
static bool used[KINDS];
static timer_t periodic, realtime, directed, distant;
static int far_fd;
static pid_t target;

static void on_timer(int sig, siginfo_t *si, void *ctx)
{
	(void)ctx;
	if (sig == SIGALRM) {
		atomic_fetch_add(&fired[ITIMER], 1);
		return;
	}
	if (si->si_code != SI_TIMER)
		bad("a timer's signal has si_code %d", si->si_code);
	switch (si->si_value.sival_int) {
	case 0x1111: atomic_fetch_add(&fired[PROCESS], 1); break;
	case 0x2222: atomic_fetch_add(&fired[REALTIME], 1); break;
	case 0x3333:
		if (sig != SIGRTMIN + SIG_TIMER_THREAD || syscall(SYS_gettid) != target)
			bad("a thread's timer fired in another thread");
		atomic_fetch_add(&fired[THREAD], 1);
		break;
	default: bad("a timer's signal has the value %#x", si->si_value.sival_int);
	}
}

static timer_t make(clockid_t clock, int how, int sig, int value, long ns, long s)
{
	struct sigevent ev = { .sigev_notify = how, .sigev_signo = sig, .sigev_value.sival_int = value };
	struct itimerspec its = { { 0, ns }, { s, ns } };
	timer_t id;

	if (how == SIGEV_THREAD_ID)
		ev._sigev_un._tid = target;
	must(timer_create(clock, &ev, &id));
	must(timer_settime(id, 0, &its, NULL));
	return id;
}

/* The thread that takes the timers' signals. Its sleep is interrupted by them,
 * rightly. */
static void *taker(void *arg)
{
	struct sigaction sa = { .sa_sigaction = on_timer, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct timespec ts = { 1, 0 };
	sigset_t s;

	(void)arg;
	target = (pid_t)syscall(SYS_gettid);
	sigfillset(&sa.sa_mask);
	sigemptyset(&s);
	for (int i = SIG_TIMER; i <= SIG_TIMER_THREAD; i++) {
		must(sigaction(SIGRTMIN + i, &sa, NULL));
		sigaddset(&s, SIGRTMIN + i);
	}
	must(sigaction(SIGALRM, &sa, NULL));
	sigaddset(&s, SIGALRM);
	pthread_sigmask(SIG_UNBLOCK, &s, NULL);

	periodic = make(CLOCK_MONOTONIC, SIGEV_SIGNAL, SIGRTMIN + SIG_TIMER, 0x1111, PERIOD_NS, 0);
	realtime = make(CLOCK_REALTIME, SIGEV_SIGNAL, SIGRTMIN + SIG_TIMER, 0x2222, PERIOD_NS, 0);
	directed = make(CLOCK_MONOTONIC, SIGEV_THREAD_ID, SIGRTMIN + SIG_TIMER_THREAD, 0x3333, PERIOD_NS, 0);
	used[PROCESS] = used[REALTIME] = used[THREAD] = true;
	if (has("itimers")) {
		struct itimerval itv = { { 0, PERIOD_NS / 1000 }, { 0, PERIOD_NS / 1000 } };
		struct itimerval virt = { { FAR_S, 0 }, { FAR_S, 0 } };

		must(setitimer(ITIMER_REAL, &itv, NULL));
		must(setitimer(ITIMER_VIRTUAL, &virt, NULL));
		must(setitimer(ITIMER_PROF, &virt, NULL));
		used[ITIMER] = true;
	}
	while (running()) {
		nanosleep(&ts, NULL);
		tick();
	}
	/* Nobody is left to take them. */
	timer_delete(periodic);
	timer_delete(realtime);
	timer_delete(directed);
	return NULL;
}

static void from_fd(void *arg)
{
	static int fd = -1;
	struct itimerspec its = { { 0, PERIOD_NS }, { 0, PERIOD_NS } };
	uint64_t n = 0;
	ssize_t rc;

	(void)arg;
	if (fd < 0) {
		fd = (int)must(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC));
		must(timerfd_settime(fd, 0, &its, NULL));
		used[FD] = true;
	}
	rc = read(fd, &n, 8);
	interrupted("read of a timerfd", rc, false);
	check(rc == 8 && n > 0, "read of a timerfd: %zd, %lu expirations", rc, (unsigned long)n);
	atomic_fetch_add(&fired[FD], 1);
}

static void distant_left(const char *what, struct itimerspec its, int64_t *last)
{
	int64_t left = its.it_value.tv_sec * 1000000000LL + its.it_value.tv_nsec;

	check(left > 0 && left <= *last, "%s has %ld s left, had %ld", what, (long)(left / 1000000000), (long)(*last / 1000000000));
	check(its.it_interval.tv_sec == 77 || its.it_interval.tv_nsec == 0, "%s lost its interval", what);
	*last = left;
}

/* Every kind goes on, and those far ahead only come nearer. */
static void overseer(void *arg)
{
	static int64_t left = FAR_S * 1000000000LL + 1000000000, left_fd = FAR_S * 1000000000LL + 1000000000;
	static uint64_t before[KINDS];
	static int rounds;
	struct itimerspec its;

	(void)arg;
	sleep_us(50000);
	must(timer_gettime(distant, &its));
	distant_left("a distant POSIX timer", its, &left);
	must(timerfd_gettime(far_fd, &its));
	distant_left("a distant timerfd", its, &left_fd);
	if (has("itimers") && used[ITIMER]) {
		struct itimerval itv;

		must(getitimer(ITIMER_VIRTUAL, &itv));
		check(itv.it_interval.tv_sec == FAR_S && itv.it_value.tv_sec > FAR_S / 2, "ITIMER_VIRTUAL is lost");
		must(getitimer(ITIMER_PROF, &itv));
		check(itv.it_interval.tv_sec == FAR_S && itv.it_value.tv_sec > FAR_S / 2, "ITIMER_PROF is lost");
		must(getitimer(ITIMER_REAL, &itv));
		check(itv.it_interval.tv_usec == PERIOD_NS / 1000, "ITIMER_REAL lost its interval");
	}
	if (++rounds % 60)
		return;
	/* 60 naps of 50 ms of its own: the others had 300 periods. */
	for (int i = 0; i < KINDS; i++) {
		uint64_t now = atomic_load(&fired[i]);

		check(!used[i] || now > before[i], "%s does not fire any more", names[i]);
		before[i] = now;
	}
}

void timers_start(void)
{
	struct sigevent ev = { .sigev_notify = SIGEV_NONE };
	struct itimerspec its = { { 77, 0 }, { FAR_S, 0 } };

	must(timer_create(CLOCK_MONOTONIC, &ev, &distant));
	must(timer_settime(distant, 0, &its, NULL));
	far_fd = (int)must(timerfd_create(CLOCK_BOOTTIME, 0));
	must(timerfd_settime(far_fd, 0, &its, NULL));
	start_raw("timers", taker, NULL);
	start("timerfd", from_fd, NULL);
	start("overseer", overseer, NULL);
}
