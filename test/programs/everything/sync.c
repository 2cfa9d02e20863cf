/* What threads agree by: mutexes, conditions, robust lists, TLS, rseq. */
#include "everything.h"

#include <sched.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#if __has_include(<sys/rseq.h>)
#include <sys/rseq.h>
#define HAVE_RSEQ 1
#endif

/* Four threads under one lock; the sums must agree. */
#define CONTENDERS 4
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t shared_a, shared_b, own[CONTENDERS];
static _Atomic int inside;

static void contend(void *arg)
{
	long me = (long)arg;

	for (int i = 0; i < 20; i++) {
		pthread_mutex_lock(&lock);
		check(atomic_fetch_add(&inside, 1) == 0, "two threads hold one mutex");
		check(shared_a == shared_b, "what a mutex guards is torn");
		shared_a++;
		if (i == 7)
			sched_yield();
		shared_b++;
		atomic_fetch_sub(&inside, 1);
		pthread_mutex_unlock(&lock);
		own[me]++;
	}
	sleep_us(3000 + me * 500);
}

static void sums(void)
{
	uint64_t sum = 0;

	for (int i = 0; i < CONTENDERS; i++)
		sum += own[i];
	check(sum == shared_a, "a mutex let %ld increments be lost", (long)(sum - shared_a));
}

/* Ping-pong over a condition with a time limit that must never be reached. */
static pthread_mutex_t turn_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t turn_cond;
static uint64_t turn;

static void ping_pong(void *arg)
{
	uint64_t me = (uint64_t)(uintptr_t)arg;

	pthread_mutex_lock(&turn_lock);
	while (running() && turn % 2 != me) {
		int64_t until = now_ns(CLOCK_MONOTONIC) + 100000000;
		struct timespec ts = { until / 1000000000, until % 1000000000 };
		int e = pthread_cond_timedwait(&turn_cond, &turn_lock, &ts);

		check(e == 0 || e == ETIMEDOUT, "pthread_cond_timedwait: %s", strerror(e));
		tick();
	}
	turn++;
	pthread_cond_signal(&turn_cond);
	pthread_mutex_unlock(&turn_lock);
	sleep_us(2000);
}

/* A robust mutex that its owner holds until it ends: the next one is told. */
static pthread_mutex_t robust;
static _Atomic bool held;

static void *dies_holding(void *arg)
{
	(void)arg;
	pthread_mutex_lock(&robust);
	atomic_store(&held, true);
	while (running()) {
		check(pthread_mutex_trylock(&robust) == EBUSY, "a mutex that is held can be taken");
		sleep_us(30000);
		tick();
	}
	return NULL; /* without unlocking */
}

static void owner_died(void)
{
	int e = pthread_mutex_lock(&robust);

	check(e == EOWNERDEAD, "a robust mutex of a dead owner: %s", strerror(e));
	pthread_mutex_consistent(&robust);
	pthread_mutex_unlock(&robust);
}

/* Short-lived threads that die holding a lock, all the time. */
static void *short_lived(void *arg)
{
	pthread_mutex_lock(arg);
	return NULL;
}

static void robust_churn(void *arg)
{
	static pthread_mutex_t m;
	static bool made;
	pthread_t t;
	int e;

	if (!made) {
		pthread_mutex_init(&m, arg);
		made = true;
	}
	e = pthread_create(&t, NULL, short_lived, &m);
	check(e == 0, "pthread_create: %s", strerror(e));
	pthread_join(t, NULL); /* by the futex at its tid address */
	e = pthread_mutex_lock(&m);
	check(e == EOWNERDEAD, "a robust mutex of a thread that ended: %s", strerror(e));
	pthread_mutex_consistent(&m);
	pthread_mutex_unlock(&m);
	sleep_us(25000);
}

/* TLS, errno among it, and a destructor's key. */
static __thread struct {
	uint64_t a[8];
	void *self;
} tls;
static pthread_key_t key;

static void thread_local_data(void *arg)
{
	uint64_t me = (uint64_t)(uintptr_t)arg;

	if (!tls.self) {
		for (int i = 0; i < 8; i++)
			tls.a[i] = me * 1000 + i;
		tls.self = &tls;
		pthread_setspecific(key, &tls);
	}
	for (int i = 0; i < 8; i++)
		check(tls.a[i] == me * 1000 + i, "a TLS variable changed");
	check(tls.self == &tls && pthread_getspecific(key) == &tls, "thread-local storage moved");
	errno = 5000 + (int)me;
	usleep(0);
	for (volatile int i = 0; i < 2000; i++)
		;
	check(errno == 5000 + (int)me, "errno changed");
	sleep_us(11000);
}

#ifdef HAVE_RSEQ
/* The kernel keeps cpu_id right only for an area that is registered. */
static void rseq_cpu(void *arg)
{
	volatile struct rseq *r = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
	int tries;

	(void)arg;
	for (tries = 0; tries < 1000; tries++) {
		unsigned cpu = 0, id = r->cpu_id;

		syscall(SYS_getcpu, &cpu, NULL, NULL);
		if (id == cpu)
			break;
	}
	check(tries < 1000, "rseq's cpu_id is %d and does not follow", (int)r->cpu_id);
	sleep_us(9000);
}
#endif

void sync_start(void)
{
	pthread_mutexattr_t ma;
	static pthread_mutexattr_t robust_attr;
	pthread_condattr_t ca;

	for (long i = 0; i < CONTENDERS; i++)
		start("contend", contend, (void *)i);
	at_end(sums);

	pthread_condattr_init(&ca);
	pthread_condattr_setclock(&ca, CLOCK_MONOTONIC);
	pthread_cond_init(&turn_cond, &ca);
	start("ping", ping_pong, (void *)0);
	start("pong", ping_pong, (void *)1);

	pthread_key_create(&key, NULL);
	start("tls 1", thread_local_data, (void *)1);
	start("tls 2", thread_local_data, (void *)2);

	if (has("robust")) {
		pthread_mutexattr_init(&ma);
		pthread_mutexattr_setrobust(&ma, PTHREAD_MUTEX_ROBUST);
		robust_attr = ma;
		pthread_mutex_init(&robust, &ma);
		start_raw("robust", dies_holding, NULL);
		while (!atomic_load(&held))
			sleep_us(100);
		at_end(owner_died);
		start("robust churn", robust_churn, &robust_attr);
	}
#ifdef HAVE_RSEQ
	if (has("rseq") && __rseq_size > 0)
		start("rseq", rseq_cpu, NULL);
#endif
}
