#include "everything.h"

#include <sys/mman.h>

#include <fcntl.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <sys/random.h>

struct options opt = {
	.threads = 4,
	.mem_mib = 16,
	.beat_us = 5000,
	.pace = 2,
	.dir = ".",
};

static const char *only, *without, *with;
static _Atomic bool stopping;

/* in reports whether name is an element of a list with commas. */
static bool in(const char *list, const char *name)
{
	size_t n = strlen(name);

	for (const char *p = list; p && *p; p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
		if (strncmp(p, name, n) == 0 && (p[n] == ',' || p[n] == 0))
			return true;
	return false;
}

bool has(const char *name)
{
	return !in(without, name);
}

bool has_asked(const char *name)
{
	return in(with, name);
}

bool running(void)
{
	return !atomic_load_explicit(&stopping, memory_order_relaxed);
}

static void report(const char *text)
{
	printf("%s\n", text);
	fflush(stdout);
	if (opt.report) {
		int fd = open(opt.report, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);

		if (fd >= 0) {
			dprintf(fd, "%s\n", text);
			close(fd);
		}
	}
	beat_text(text);
}

void bad(const char *fmt, ...)
{
	static atomic_flag once = ATOMIC_FLAG_INIT;
	char text[400] = "bad ";
	char name[16] = "?";
	va_list ap;
	int n;

	if (atomic_flag_test_and_set(&once))
		for (;;)
			pause(); /* the first one ends us */
	pthread_getname_np(pthread_self(), name, sizeof(name));
	n = snprintf(text, sizeof(text), "bad [%s] ", name);
	va_start(ap, fmt);
	vsnprintf(text + n, sizeof(text) - n, fmt, ap);
	va_end(ap);
	report(text);
	_exit(1);
}

int64_t now_ns(clockid_t c)
{
	struct timespec ts;

	clock_gettime(c, &ts);
	return ts.tv_sec * 1000000000LL + ts.tv_nsec;
}

void sleep_us(long us)
{
	struct timespec ts = { us * opt.pace / 1000000, us * opt.pace % 1000000 * 1000 };

	interrupted("nanosleep", nanosleep(&ts, NULL), false);
}

uint64_t rnd(uint64_t *s)
{
	*s ^= *s << 13;
	*s ^= *s >> 7;
	*s ^= *s << 17;
	return *s;
}

bool interrupted(const char *call, long rc, bool by_cont)
{
	if (rc != -1 || errno != EINTR)
		return false;
	if (!by_cont || !opt.sigcont_ok)
		bad("%s returned EINTR", call);
	return true;
}

/* Threads, and the watchdog over them. */
struct thread {
	char name[16];
	void (*body)(void *);
	void (*last)(void *);
	void *(*raw)(void *);
	void *arg;
	pthread_t id;
	_Atomic uint64_t ticks;
	uint64_t seen, silent;
};

#define MAX_THREADS 2100
static struct thread threads[MAX_THREADS];
static int n_threads;
static __thread struct thread *self;

void tick(void)
{
	atomic_fetch_add_explicit(&self->ticks, 1, memory_order_relaxed);
}

static void *thread_main(void *p)
{
	self = p;
	pthread_setname_np(pthread_self(), self->name);
	if (self->raw)
		return self->raw(self->arg);
	while (running()) {
		self->body(self->arg);
		tick();
	}
	if (self->last)
		self->last(self->arg);
	return NULL;
}

static void make(const char *name, void (*body)(void *), void (*last)(void *), void *(*raw)(void *), void *arg)
{
	struct thread *t = &threads[n_threads];
	pthread_attr_t a;
	int e;

	check(n_threads < MAX_THREADS, "too many threads");
	n_threads++;
	snprintf(t->name, sizeof(t->name), "%s", name);
	t->body = body;
	t->last = last;
	t->raw = raw;
	t->arg = arg;
	pthread_attr_init(&a);
	pthread_attr_setstacksize(&a, n_threads > 100 ? 256 << 10 : 8 << 20);
	e = pthread_create(&t->id, &a, thread_main, t);
	check(e == 0, "pthread_create: %s", strerror(e));
	pthread_attr_destroy(&a);
}

void start(const char *name, void (*body)(void *), void *arg)
{
	make(name, body, NULL, NULL, arg);
}

void start_last(const char *name, void (*body)(void *), void (*last)(void *), void *arg)
{
	make(name, body, last, NULL, arg);
}

void start_raw(const char *name, void *(*body)(void *), void *arg)
{
	make(name, NULL, NULL, body, arg);
}

static void (*ends[64])(void);
static int n_ends;

void at_end(void (*f)(void))
{
	check(n_ends < 64, "too many checks for the end");
	ends[n_ends++] = f;
}

/* watch fails if a thread has not come round for 120 looks, one per second. */
static void watch(void)
{
	for (int i = 0; i < n_threads; i++) {
		struct thread *t = &threads[i];
		uint64_t now = atomic_load(&t->ticks);

		t->silent = now == t->seen ? t->silent + 1 : 0;
		t->seen = now;
		check(t->silent < 120, "thread %s makes no progress", t->name);
	}
}

void give_up_lazily(void *at, size_t n)
{
	int rc = madvise(at, n, MADV_FREE);

	if (rc == -1 && !(opt.veiled && errno == EINVAL))
		bad("MADV_FREE: %s", strerror(errno));
}

static void usage(void)
{
	fprintf(stderr,
		"usage: everything [--threads N] [--mem MIB] [--heartbeat unix:PATH|udp:IP:PORT]\n"
		"  [--identity ID] [--beat-us N] [--pace N] [--report FILE] [--dir DIR] [--sigcont-ok] [--veiled]\n"
		"  [--only MODULE,...] [--without MODULE|CHECK,...] [--with CHECK,...]\n"
		"modules: regs waits timers signals sync memory files clocks churn, and by name only halves shapes shared sparse spawn trim\n"
		"checks: avx512 avx sysv suspend itimers robust rseq growth inotify locks listen deleted guards\n"
		"off by default: fork\n");
	exit(2);
}

static void parse(int argc, char **argv)
{
	static char id[20];
	static const struct option long_options[] = {
		{ "threads", 1, 0, 't' }, { "mem", 1, 0, 'm' }, { "heartbeat", 1, 0, 'h' },
		{ "identity", 1, 0, 'i' }, { "beat-us", 1, 0, 'b' }, { "report", 1, 0, 'r' },
		{ "dir", 1, 0, 'd' }, { "sigcont-ok", 0, 0, 'c' }, { "only", 1, 0, 'o' },
		{ "without", 1, 0, 'w' }, { "pace", 1, 0, 'p' },
		{ "with", 1, 0, 'W' }, { "veiled", 0, 0, 'v' }, { 0 },
	};
	uint64_t r;
	int c;

	while ((c = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
		switch (c) {
		case 't': opt.threads = atoi(optarg); break;
		case 'm': opt.mem_mib = atol(optarg); break;
		case 'h': opt.beat_to = optarg; break;
		case 'i': opt.identity = optarg; break;
		case 'b': opt.beat_us = atol(optarg); break;
		case 'r': opt.report = optarg; break;
		case 'd': opt.dir = optarg; break;
		case 'c': opt.sigcont_ok = true; break;
		case 'v': opt.veiled = true; break;
		case 'o': only = optarg; break;
		case 'W': with = optarg; break;
		case 'p': opt.pace = atol(optarg); break;
		case 'w': without = optarg; break;
		default: usage();
		}
	}
	if (optind != argc)
		usage();
	if (!opt.identity) {
		must(getrandom(&r, sizeof(r), 0));
		snprintf(id, sizeof(id), "%016lx", (unsigned long)r);
		opt.identity = id;
	}
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*start)(void);
		bool asked; /* only if asked for by name */
	} modules[] = {
		{ "files", files_start, false }, /* first: it holds low descriptors */
		{ "regs", regs_start, false },
		{ "waits", waits_start, false },
		{ "timers", timers_start, false },
		{ "signals", signals_start, false },
		{ "sync", sync_start, false },
		{ "memory", memory_start, false },
		{ "clocks", clocks_start, false },
		{ "churn", churn_start, false },
		{ "halves", halves_start, true },
		{ "shapes", shapes_start, true },
		{ "shared", shared_start, true },
		{ "sparse", sparse_start, true },
		{ "spawn", spawn_start, true },
		{ "trim", trim_start, true },
	};
	struct timespec second = { 1, 0 };
	sigset_t all, term;

	parse(argc, argv);
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	signal(SIGPIPE, SIG_IGN);

	beat_start();
	for (size_t i = 0; i < sizeof(modules) / sizeof(modules[0]); i++)
		if ((only ? in(only, modules[i].name) : !modules[i].asked) && has(modules[i].name))
			modules[i].start();
	printf("ready %d threads\n", n_threads + 1);
	fflush(stdout);

	sigemptyset(&term);
	sigaddset(&term, SIGTERM);
	for (;;) {
		siginfo_t si;
		int s = sigtimedwait(&term, &si, &second);

		if (s == SIGTERM)
			break;
		if (!interrupted("sigtimedwait", s, true))
			check(errno == EAGAIN, "sigtimedwait: %s", strerror(errno));
		watch();
	}

	atomic_store(&stopping, true);
	for (int i = 0; i < n_threads; i++)
		pthread_join(threads[i].id, NULL);
	while (n_ends > 0)
		ends[--n_ends]();
	report("ok");
	return 0;
}
