/*
 * Waits: threads that wait in every system call that a freeze interrupts. None
 * may see EINTR, none may return early, none may lose what it waited for.
 */
#include "everything.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>

#define WAIT_MS 20
#define WAIT_NS (WAIT_MS * 1000000L)
static const struct timespec wait_ts = { 0, WAIT_NS };

/* elapsed fails if a wait with a timeout came back too early. */
static void elapsed(const char *call, int64_t began, int64_t ns)
{
	int64_t took = now_ns(CLOCK_MONOTONIC) - began;

	/* A coarse tick early is what poll and epoll may be. */
	check(took > ns - 1100000, "%s returned after %ld us, %ld us early", call, (long)(took / 1000), (long)((ns - took) / 1000));
}

static void timed_out(const char *call, int64_t began, long rc, long want, int err, bool by_cont)
{
	if (interrupted(call, rc, by_cont))
		return;
	check(rc == want && (rc != -1 || errno == err), "%s returned %ld: %s", call, rc, rc == -1 ? strerror(errno) : "");
	/* A socket's timeout is counted in ticks, of which one is already under way. */
	elapsed(call, began, strcmp(call, "recv") == 0 ? WAIT_NS / 2 : WAIT_NS);
}

static void futex_timeout(void *arg)
{
	static int word;
	int64_t t = now_ns(CLOCK_MONOTONIC);

	(void)arg;
	timed_out("futex", t, syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &wait_ts, NULL, 0), -1, ETIMEDOUT, false);
}

/* A long futex wait, absolute, on the clock that a time namespace moves. */
static void futex_absolute(void *arg)
{
	static int word;
	int64_t t = now_ns(CLOCK_MONOTONIC), until = t + 700000000;
	struct timespec ts = { until / 1000000000, until % 1000000000 };
	long rc = syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &ts, NULL, FUTEX_BITSET_MATCH_ANY);

	(void)arg;
	interrupted("futex", rc, false);
	check(rc == -1 && errno == ETIMEDOUT, "futex (absolute) returned %ld", rc);
	elapsed("futex (absolute)", t, 700000000);
}

static _Atomic int baton;

static void futex_last(void *arg)
{
	(void)arg;
	syscall(SYS_futex, &baton, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0);
}

static void futex_wake(void *arg)
{
	int old = (int)(long)arg; /* whose turn it must be */

	while (running() && (atomic_load(&baton) & 1) != old) {
		int v = atomic_load(&baton);
		long rc;

		if ((v & 1) == old)
			break;
		rc = syscall(SYS_futex, &baton, FUTEX_WAIT_PRIVATE, v, NULL, NULL, 0); /* no timeout */
		interrupted("futex", rc, false);
		check(rc == 0 || errno == EAGAIN, "futex: %s", strerror(errno));
	}
	atomic_fetch_add(&baton, 1); /* also at the end: the other one's value is stale then */
	must(syscall(SYS_futex, &baton, FUTEX_WAKE_PRIVATE, 10, NULL, NULL, 0));
	sleep_us(5000);
}

static void sleep_relative(void *arg)
{
	int64_t t = now_ns(CLOCK_MONOTONIC);

	(void)arg;
	timed_out("nanosleep", t, nanosleep(&wait_ts, NULL), 0, 0, false);
}

/* Long enough that it is often the one that is interrupted. */
static void sleep_long(void *arg)
{
	int64_t t = now_ns(CLOCK_MONOTONIC);
	struct timespec ts = { 2, 500000000 };
	int e = clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL);

	(void)arg;
	check(e == 0, "clock_nanosleep: %s", strerror(e));
	elapsed("clock_nanosleep", t, 2500000000);
}

static void sleep_absolute(void *arg)
{
	int64_t t = now_ns(CLOCK_MONOTONIC), until = t + 300000000;
	struct timespec ts = { until / 1000000000, until % 1000000000 };
	int e = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);

	(void)arg;
	check(e == 0, "clock_nanosleep (absolute): %s", strerror(e));
	elapsed("clock_nanosleep (absolute)", t, 300000000);
}

static int quiet[2]; /* a pipe that nobody writes to */

static void in_epoll(void *arg)
{
	static int ep = -1;
	struct epoll_event ev = { .events = EPOLLIN };
	int64_t t;

	(void)arg;
	if (ep < 0) {
		ep = (int)must(epoll_create1(EPOLL_CLOEXEC));
		must(epoll_ctl(ep, EPOLL_CTL_ADD, quiet[0], &ev));
	}
	t = now_ns(CLOCK_MONOTONIC);
	timed_out("epoll_wait", t, epoll_wait(ep, &ev, 1, WAIT_MS), 0, 0, true);
}

static void in_poll(void *arg)
{
	struct pollfd p = { quiet[0], POLLIN, 0 };
	int64_t t = now_ns(CLOCK_MONOTONIC);

	(void)arg;
	timed_out("poll", t, poll(&p, 1, WAIT_MS), 0, 0, false);
	t = now_ns(CLOCK_MONOTONIC);
	timed_out("ppoll", t, ppoll(&p, 1, &wait_ts, NULL), 0, 0, false);
}

static void in_select(void *arg)
{
	struct timeval tv = { 0, WAIT_NS / 1000 };
	int64_t t = now_ns(CLOCK_MONOTONIC);
	fd_set s;

	(void)arg;
	FD_ZERO(&s);
	FD_SET(quiet[0], &s);
	timed_out("select", t, select(quiet[0] + 1, &s, NULL, NULL, &tv), 0, 0, false);
	t = now_ns(CLOCK_MONOTONIC);
	FD_SET(quiet[0], &s);
	timed_out("pselect", t, pselect(quiet[0] + 1, &s, NULL, NULL, &wait_ts, NULL), 0, 0, false);
}

static void in_sigtimedwait(void *arg)
{
	int64_t t = now_ns(CLOCK_MONOTONIC);
	sigset_t s;

	(void)arg;
	sigemptyset(&s);
	sigaddset(&s, SIGRTMIN + SIG_NEVER);
	timed_out("sigtimedwait", t, sigtimedwait(&s, NULL, &wait_ts), -1, EAGAIN, true);
}

static int sem;

static void in_semtimedop(void *arg)
{
	int64_t t = now_ns(CLOCK_MONOTONIC);
	struct sembuf op = { 0, -1, 0 };

	(void)arg;
	timed_out("semtimedop", t, semtimedop(sem, &op, 1, &wait_ts), -1, EAGAIN, true);
}

static void remove_sem(void)
{
	must(semctl(sem, 0, IPC_RMID));
}

static int quiet_socket[2];

static void in_recv(void *arg)
{
	int64_t t = now_ns(CLOCK_MONOTONIC);
	char c;

	(void)arg;
	timed_out("recv", t, recv(quiet_socket[0], &c, 1, 0), -1, EAGAIN, true);
}

/* A writer and a reader that blocks: numbers arrive in order, none twice. */
struct stream {
	int fds[2];
	uint64_t sent, got;
	const char *what;
};

static void put(void *arg)
{
	struct stream *s = arg;
	ssize_t n;

	s->sent++;
	n = write(s->fds[1], &s->sent, 8);
	interrupted(s->what, n, false);
	check(n == 8, "write to a %s: %zd", s->what, n);
}

static void writer(void *arg)
{
	put(arg);
	sleep_us(10000);
}

static void reader(void *arg)
{
	struct stream *s = arg;
	uint64_t v;
	ssize_t n = read(s->fds[0], &v, 8);

	interrupted(s->what, n, false);
	check(n == 8, "read from a %s: %zd: %s", s->what, n, strerror(errno));
	check(v == s->got + 1, "%s: %lu came after %lu", s->what, (unsigned long)v, (unsigned long)s->got);
	s->got = v;
}

static int counter_fd;

static void event_put(void *arg)
{
	uint64_t one = 1;

	(void)arg;
	check(write(counter_fd, &one, 8) == 8, "write to an eventfd: %s", strerror(errno));
}

static void event_writer(void *arg)
{
	event_put(arg);
	sleep_us(10000);
}

static void event_reader(void *arg)
{
	uint64_t v = 0;
	ssize_t n = read(counter_fd, &v, 8);

	(void)arg;
	interrupted("read of an eventfd", n, false);
	check(n == 8 && v == 1, "read of a semaphore eventfd: %zd, value %lu", n, (unsigned long)v);
}

static void stream_pair(struct stream *s, const char *w, const char *r)
{
	start_last(w, writer, put, s);
	start(r, reader, s);
}

void waits_start(void)
{
	static struct stream p = { .what = "pipe" }, u = { .what = "socketpair" };
	struct timeval tv = { 0, WAIT_NS / 1000 };

	must(pipe2(quiet, O_CLOEXEC));
	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, quiet_socket));
	must(setsockopt(quiet_socket[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv)));
	must(pipe2(p.fds, O_CLOEXEC));
	must(socketpair(AF_UNIX, SOCK_STREAM, 0, u.fds));
	counter_fd = (int)must(eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC));

	start("futex", futex_timeout, NULL);
	start("futex abs", futex_absolute, NULL);
	start_last("futex even", futex_wake, futex_last, (void *)0);
	start_last("futex odd", futex_wake, futex_last, (void *)1);
	start("nanosleep", sleep_relative, NULL);
	start("sleep long", sleep_long, NULL);
	start("sleep abs", sleep_absolute, NULL);
	start("epoll_wait", in_epoll, NULL);
	start("poll", in_poll, NULL);
	start("select", in_select, NULL);
	start("sigtimedwait", in_sigtimedwait, NULL);
	start("recv", in_recv, NULL);
	stream_pair(&p, "pipe write", "pipe read");
	stream_pair(&u, "unix write", "unix read");
	start_last("event write", event_writer, event_put, NULL);
	start("event read", event_reader, NULL);
	if (has("sysv")) {
		sem = (int)must(semget(IPC_PRIVATE, 1, 0600));
		at_end(remove_sem);
		start("semtimedop", in_semtimedop, NULL);
	}
}
