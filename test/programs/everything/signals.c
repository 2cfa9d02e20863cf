/* Signals: masks, actions, alternate stacks, queued values, what is pending. */
#include "everything.h"

#include <stdatomic.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>

/* A handler on an alternate stack, entered over and over. */
#define ALT_SIZE (64 << 10)
static __thread char *alt;
static __thread volatile int entered;

static void on_usr2(int sig, siginfo_t *si, void *ctx)
{
	char here;

	(void)ctx;
	if (&here < alt || &here >= alt + ALT_SIZE)
		bad("signal %d ran on %p, not on the alternate stack", sig, (void *)&here);
	if (si->si_code != SI_TKILL)
		bad("si_code of pthread_kill is %d", si->si_code);
	entered++;
	if (entered % 16 == 0)
		sleep_us(3000); /* be found in the handler, too */
}

static void *alt_stack(void *arg)
{
	stack_t ss = { .ss_size = ALT_SIZE }, now;
	sigset_t s;

	(void)arg;
	ss.ss_sp = alt = malloc(ALT_SIZE);
	must(sigaltstack(&ss, NULL));
	sigemptyset(&s);
	sigaddset(&s, SIGUSR2);
	pthread_sigmask(SIG_UNBLOCK, &s, NULL);
	for (int n = 0; running(); n++) {
		check(entered == n, "%d signals were sent to itself, %d handled", n, entered);
		pthread_kill(pthread_self(), SIGUSR2);
		must(sigaltstack(NULL, &now));
		check(now.ss_sp == ss.ss_sp && now.ss_size == ss.ss_size && now.ss_flags == 0, "the alternate stack changed");
		sleep_us(2000);
		tick();
	}
	return NULL;
}

/* Queued signals with values: in order, none lost, by sigwaitinfo and by
 * signalfd. Never more in flight than the limit on pending signals allows. */
struct queue {
	int sig, fd;
	_Atomic int sent, got;
};
static struct queue waited = { .sig = SIG_QUEUE }, by_fd = { .sig = SIG_FD };

static void sender(void *arg)
{
	struct queue *q = arg;

	for (int i = 0; i < 8 && atomic_load(&q->sent) - atomic_load(&q->got) < 64; i++) {
		union sigval v = { .sival_int = atomic_load(&q->sent) + 1 };

		must(sigqueue(getpid(), SIGRTMIN + q->sig, v));
		atomic_fetch_add(&q->sent, 1);
	}
	sleep_us(7000);
}

static void arrived(struct queue *q, int code, int value, const char *how)
{
	check(code == SI_QUEUE, "%s: si_code %d", how, code);
	check(value == atomic_load(&q->got) + 1, "%s: value %d came after %d", how, value, atomic_load(&q->got));
	atomic_store(&q->got, value);
}

static void by_wait(void *arg)
{
	struct queue *q = arg;
	struct timespec ts = { 0, 200000000 };
	siginfo_t si;
	sigset_t s;
	int rc;

	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN + q->sig);
	rc = sigtimedwait(&s, &si, &ts);
	if (interrupted("sigtimedwait", rc, true) || (rc == -1 && errno == EAGAIN))
		return;
	must(rc);
	arrived(q, si.si_code, si.si_value.sival_int, "sigtimedwait");
	sleep_us(1000);
}

static void by_signalfd(void *arg)
{
	struct queue *q = arg;
	struct signalfd_siginfo si;
	ssize_t n = read(q->fd, &si, sizeof(si));

	if (n == -1 && errno == EAGAIN) {
		sleep_us(3000);
		return;
	}
	check(n == sizeof(si) && (int)si.ssi_signo == SIGRTMIN + q->sig, "read of a signalfd: %zd", n);
	arrived(q, si.ssi_code, si.ssi_int, "signalfd");
}

/* sigsuspend returns only after the handler has run. */
static _Atomic int suspended;
static _Atomic pthread_t suspender;

static void on_suspend(int sig)
{
	(void)sig;
	atomic_fetch_add(&suspended, 1);
}

static void *suspend(void *arg)
{
	struct sigaction sa = { .sa_handler = on_suspend };
	sigset_t s;

	(void)arg;
	sigfillset(&sa.sa_mask);
	must(sigaction(SIGRTMIN + SIG_SUSPEND, &sa, NULL));
	sigfillset(&s);
	sigdelset(&s, SIGRTMIN + SIG_SUSPEND);
	atomic_store(&suspender, pthread_self());
	while (running()) {
		int before = atomic_load(&suspended);

		check(sigsuspend(&s) == -1 && errno == EINTR, "sigsuspend: %s", strerror(errno));
		check(atomic_load(&suspended) > before, "sigsuspend returned without a signal");
		tick();
	}
	return NULL;
}

static void wake(void *arg)
{
	(void)arg;
	pthread_kill(suspender, SIGRTMIN + SIG_SUSPEND);
}

static void waker(void *arg)
{
	wake(arg);
	sleep_us(15000);
}

/* Signals that stay pending from the beginning to the end. */
static void taken(int sig, int value, const char *what)
{
	struct timespec none = { 0, 0 };
	siginfo_t si;
	sigset_t s;

	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN + sig);
	check(sigtimedwait(&s, &si, &none) == SIGRTMIN + sig, "a signal pending for %s is lost", what);
	check(si.si_code == SI_QUEUE && si.si_value.sival_int == value, "a signal pending for %s has code %d and value %d, not %d",
	      what, si.si_code, si.si_value.sival_int, value);
	check(sigtimedwait(&s, &si, &none) == -1, "a signal pending for %s came twice", what);
}

static void *pending_thread(void *arg)
{
	union sigval v = { .sival_int = 7878 };
	sigset_t mask, want;

	(void)arg;
	pthread_sigqueue(pthread_self(), SIGRTMIN + SIG_PENDING_THREAD, v);
	sigfillset(&want);
	while (running()) {
		sigset_t pending;

		pthread_sigmask(SIG_SETMASK, NULL, &mask);
		for (int s = 1; s <= SIGRTMAX; s++)
			if (s != SIGKILL && s != SIGSTOP && s != 32 && s != 33) /* 32, 33: libc's own */
				check(sigismember(&mask, s), "signal %d is not blocked any more", s);
		sigpending(&pending);
		check(sigismember(&pending, SIGRTMIN + SIG_PENDING), "the process's pending signal is gone");
		check(sigismember(&pending, SIGRTMIN + SIG_PENDING_THREAD), "the thread's pending signal is gone");
		check(!sigismember(&pending, SIGRTMIN + SIG_NEVER), "a signal that nobody sent is pending");
		sleep_us(20000);
		tick();
	}
	taken(SIG_PENDING_THREAD, 7878, "the thread");
	return NULL;
}

static void pending_end(void)
{
	taken(SIG_PENDING, 7777, "the process");
}

/* Actions as they were set. */
static void never(int sig)
{
	bad("signal %d arrived", sig);
}

static void actions(void *arg)
{
	static bool set;
	struct sigaction sa = { .sa_handler = never, .sa_flags = SA_NODEFER | SA_RESTART | SA_ONSTACK }, now;

	(void)arg;
	sigemptyset(&sa.sa_mask);
	sigaddset(&sa.sa_mask, SIGHUP);
	sigaddset(&sa.sa_mask, SIGRTMAX);
	if (!set) {
		must(sigaction(SIGVTALRM, &sa, NULL));
		must(sigaction(SIGPROF, &sa, NULL));
		set = true;
	}
	must(sigaction(SIGPROF, NULL, &now)); /* 0x04000000 is SA_RESTORER, libc's */
	check(now.sa_handler == never && (now.sa_flags & ~0x04000000) == sa.sa_flags, "the action of SIGPROF changed, flags %#x", now.sa_flags);
	check(sigismember(&now.sa_mask, SIGHUP) && sigismember(&now.sa_mask, SIGRTMAX) && !sigismember(&now.sa_mask, SIGINT), "the mask of SIGPROF's action changed");
	must(sigaction(SIGPIPE, NULL, &now));
	check(now.sa_handler == SIG_IGN, "SIGPIPE is not ignored any more");
	must(sigaction(SIGTTIN, NULL, &now));
	check(now.sa_handler == SIG_DFL, "SIGTTIN has not its default action any more");
	sleep_us(50000);
}

static void drained(void)
{
	check(atomic_load(&waited.sent) > 0 && atomic_load(&by_fd.sent) > 0, "no signal was queued");
}

void signals_start(void)
{
	struct sigaction sa = { .sa_sigaction = on_usr2, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	union sigval v = { .sival_int = 7777 };
	sigset_t s;

	must(sigaction(SIGUSR2, &sa, NULL));
	start_raw("altstack", alt_stack, NULL);

	start("queue", sender, &waited);
	start("sigwait", by_wait, &waited);
	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN + SIG_FD);
	by_fd.fd = (int)must(signalfd(-1, &s, SFD_NONBLOCK | SFD_CLOEXEC));
	start("queue fd", sender, &by_fd);
	start("signalfd", by_signalfd, &by_fd);
	at_end(drained);

	must(sigqueue(getpid(), SIGRTMIN + SIG_PENDING, v));
	at_end(pending_end);
	start_raw("pending", pending_thread, NULL);
	start("actions", actions, NULL);
	if (has("suspend")) {
		start_raw("sigsuspend", suspend, NULL);
		while (!atomic_load(&suspender))
			sleep_us(100);
		start_last("waker", waker, wake, NULL);
	}
}
