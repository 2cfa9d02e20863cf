/*
 * mapchurn changes its memory and its mappings as it is told, for tests of who
 * watches it. It reads commands, one a line, and answers each by one line:
 *
 *   uffd        open a userfaultfd (UFFD_USER_MODE_ONLY), answer its number
 *   close N     close a descriptor
 *   churn N     N threads write random words to random pages from now on, 0: none;
 *               the answer comes when it is so
 *   step SEED   do something to the mappings that SEED chooses, answer what; with
 *               "-efault" where mremap found mappings of two kinds
 *   do OP SEED  do that one
 *   area        make an area, answer its address and pages; "area thp", "area
 *               shared", "area memfd", "area file" are other sorts
 *   poke A N S  write N pages from address A on, every S-th; peek reads them
 *   advise A N X    madvise N pages from A on
 *   pwrite FD PAGE  write a page by a descriptor
 *   child A N   fork, write N pages from A on in the child, wait for its end
 *   stripes A N     make every second of N pages from A on read-only
 *   share A N       make N private pages from A on shared, with the same content
 *   onto A N B      move N pages from A on to B, over what is there
 *   nofork      no step forks from now on
 *   quit
 *
 * Its own code allocates nothing and writes little, so that what changes is what
 * was asked for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define HUGE (2ul << 20)
#define MOST 256             /* areas */
#define TOTAL (48ul << 20)   /* bytes in all of them */

enum sort { FREE, ANON, THP, FILES, SHANON, MEMFD, MEMPRIV };

struct area {
	enum sort sort;
	char *p;
	size_t n;
	int fd;       /* MEMFD */
	char *second; /* another view of it */
};

static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static struct area areas[MOST];
static size_t total, heap;
static volatile int writers;
static int running, nofork;
static int efaults; /* of mremap */
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static int file;

static uint64_t next(uint64_t *s)
{
	uint64_t z = (*s += 0x9e3779b97f4a7c15ull);
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ z >> 27) * 0x94d049bb133111ebull;
	return z ^ z >> 31;
}

static void die(const char *what)
{
	printf("error %s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(1);
}

static void need(int ok, const char *what)
{
	if (!ok)
		die(what);
}

static size_t pages(uint64_t *s, size_t most) { return (1 + next(s) % most) * PAGE; }

static struct area *pick(uint64_t *s, int sorts)
{
	for (int i = 0; i < 4 * MOST; i++) {
		struct area *a = &areas[next(s) % MOST];
		if (a->sort != FREE && sorts >> a->sort & 1)
			return a;
	}
	return NULL;
}

static void put(struct area *a, uint64_t *s)
{
	size_t at = next(s) % (a->n / PAGE) * PAGE + next(s) % (PAGE / 8) * 8;
	char *base = a->second && next(s) & 1 ? a->second : a->p;
	*(volatile uint64_t *)(base + at) = next(s);
}

static void fill(struct area *a, uint64_t *s, int step)
{
	for (size_t at = 0; at < a->n; at += PAGE * step)
		*(volatile uint64_t *)(a->p + at) = next(s);
}

static struct area *add(enum sort sort, char *p, size_t n)
{
	for (int i = 0; i < MOST; i++)
		if (areas[i].sort == FREE) {
			areas[i] = (struct area){sort, p, n, -1, NULL};
			total += n;
			return &areas[i];
		}
	munmap(p, n);
	return NULL;
}

static void drop(struct area *a)
{
	munmap(a->p, a->n);
	if (a->second)
		munmap(a->second, a->n);
	if (a->fd >= 0)
		close(a->fd);
	total -= a->n;
	a->sort = FREE;
}

static struct area *make(enum sort sort, size_t n)
{
	int prot = PROT_READ | PROT_WRITE, fd = -1;
	char *p, *second = NULL;
	switch (sort) {
	case THP:
		n = (n + HUGE - 1) & ~(HUGE - 1);
		p = mmap(NULL, n + HUGE, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		need(p != MAP_FAILED, "mmap thp");
		{
			char *q = (char *)(((uintptr_t)p + HUGE - 1) & ~(HUGE - 1));
			if (q > p)
				munmap(p, q - p);
			if (p + HUGE > q)
				munmap(q + n, p + HUGE - q);
			p = q;
		}
		madvise(p, n, MADV_HUGEPAGE);
		break;
	case FILES:
		n = n > 256 * PAGE ? 256 * PAGE : n;
		p = mmap(NULL, n, prot, MAP_PRIVATE, file, 0);
		break;
	case SHANON:
		p = mmap(NULL, n, prot, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
		break;
	case MEMFD:
	case MEMPRIV:
		fd = memfd_create("churn", MFD_CLOEXEC);
		need(fd >= 0 && ftruncate(fd, n) == 0, "memfd");
		if (sort == MEMFD) {
			p = mmap(NULL, n, prot, MAP_SHARED, fd, 0);
			second = mmap(NULL, n, prot, MAP_SHARED, fd, 0);
			need(second != MAP_FAILED, "mmap memfd");
		} else {
			for (size_t at = 0; at < n; at += 3 * PAGE)
				need(pwrite(fd, "object", 6, at) == 6, "pwrite");
			p = mmap(NULL, n, prot, MAP_PRIVATE, fd, 0);
		}
		break;
	default:
		p = mmap(NULL, n, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	need(p != MAP_FAILED, "mmap");
	struct area *a = add(sort, p, n);
	if (!a) {
		if (fd >= 0)
			close(fd);
		if (second)
			munmap(second, n);
		return NULL;
	}
	a->fd = fd;
	a->second = second;
	return a;
}

/* Each op does one thing to the mappings. The lock is held. */

#define PRIV (1 << ANON | 1 << THP | 1 << FILES | 1 << MEMPRIV)
#define OURS (1 << ANON | 1 << THP)

static void part(struct area *a, uint64_t *s, char **p, size_t *n)
{
	size_t first = next(s) % (a->n / PAGE);
	*p = a->p + first * PAGE;
	*n = (1 + next(s) % (a->n / PAGE - first)) * PAGE;
}

static void op_mmap(uint64_t *s)
{
	struct area *a = make(ANON, pages(s, 256));
	if (a && next(s) & 1)
		fill(a, s, 1 + next(s) % 3);
}

static void op_thp(uint64_t *s)
{
	struct area *a = make(THP, HUGE + next(s) % 2 * HUGE);
	if (a)
		fill(a, s, 1);
}

static void op_file(uint64_t *s)
{
	struct area *a = make(FILES, pages(s, 256));
	if (a)
		fill(a, s, 1 + next(s) % 4);
}

static void op_shared(uint64_t *s)
{
	struct area *a = make(SHANON, pages(s, 512));
	if (a)
		fill(a, s, 1 + next(s) % 4);
}

static void op_memfd(uint64_t *s)
{
	struct area *a = make(MEMFD, pages(s, 256));
	if (a)
		fill(a, s, 1 + next(s) % 4);
}

static void op_mempriv(uint64_t *s)
{
	struct area *a = make(MEMPRIV, pages(s, 256));
	if (a)
		fill(a, s, 1 + next(s) % 4);
}

static void op_munmap(uint64_t *s)
{
	struct area *a = pick(s, OURS | 1 << FILES);
	if (!a)
		return;
	if (next(s) & 1) {
		drop(a);
		return;
	}
	/* Cut off the end. */
	size_t keep = next(s) % (a->n / PAGE) * PAGE;
	if (!keep) {
		drop(a);
		return;
	}
	munmap(a->p + keep, a->n - keep);
	total -= a->n - keep;
	a->n = keep;
}

static void op_release(uint64_t *s)
{
	struct area *a = pick(s, 1 << SHANON | 1 << MEMFD | 1 << MEMPRIV);
	if (a)
		drop(a);
}

static void op_brk(uint64_t *s)
{
	if (heap && next(s) % 3 == 0) {
		size_t n = pages(s, heap / PAGE);
		need(sbrk(-(intptr_t)n) != (void *)-1, "brk down");
		heap -= n;
		return;
	}
	size_t n = pages(s, 200);
	char *p = sbrk(n);
	need(p != (void *)-1, "brk up");
	heap += n;
	for (size_t at = 0; at < n; at += PAGE * (1 + next(s) % 3))
		*(volatile uint64_t *)(((uintptr_t)p + at) & ~7ul) = next(s);
}

static void op_heap(uint64_t *s) /* writes to what brk gave */
{
	char *end = sbrk(0);
	for (int i = 0; heap && i < 8; i++)
		*(volatile uint64_t *)(((uintptr_t)end - 8 - next(s) % (heap - 8)) & ~7ul) = next(s);
}

static void op_grow(uint64_t *s) /* in place, if there is room */
{
	struct area *a = pick(s, OURS);
	if (!a)
		return;
	size_t n = a->n + pages(s, 64);
	if (mremap(a->p, a->n, n, 0) == MAP_FAILED)
		return;
	total += n - a->n;
	a->n = n;
	put(a, s);
}

static void op_move(uint64_t *s)
{
	struct area *a = pick(s, OURS | 1 << FILES);
	if (!a)
		return;
	/* To an address of its own, so that it does move. */
	size_t room = a->n + 2 * HUGE;
	char *to = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	need(to != MAP_FAILED, "mmap for mremap");
	char *at = (char *)((((uintptr_t)to + HUGE - 1) & ~(HUGE - 1)) + ((uintptr_t)a->p & (HUGE - 1)));
	if (next(s) & 1)
		at = to;
	char *p = mremap(a->p, a->n, a->n, MREMAP_MAYMOVE | MREMAP_FIXED, at);
	if (p == MAP_FAILED && errno == EFAULT) { /* half of it is watched otherwise */
		munmap(to, room);
		efaults++;
		return;
	}
	need(p == at, "mremap move");
	if (at > to)
		munmap(to, at - to);
	if (to + room > at + a->n)
		munmap(at + a->n, to + room - at - a->n);
	a->p = p;
}

static void op_over(uint64_t *s) /* one area moves over another */
{
	struct area *a = pick(s, OURS), *b = pick(s, OURS);
	if (!a || !b || a == b)
		return;
	size_t n = a->n < b->n ? a->n : b->n;
	size_t rest = a->n - n;
	char *from = a->p;
	if (b->n > n) { /* what is left of b would be another mapping */
		munmap(b->p + n, b->n - n);
		total -= b->n - n;
		b->n = n;
	}
	char *p = mremap(from, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, b->p);
	if (p == MAP_FAILED && errno == EFAULT) {
		/* mremap has unmapped the target by then. */
		munmap(b->p, b->n);
		total -= b->n;
		b->sort = FREE;
		efaults++;
		return;
	}
	need(p == b->p, "mremap over");
	total -= n;
	if (rest) {
		a->p += n;
		a->n = rest;
	} else
		a->sort = FREE;
}

static void op_mprotect(uint64_t *s)
{
	struct area *a = pick(s, PRIV);
	char *p;
	size_t n;
	if (!a)
		return;
	part(a, s, &p, &n);
	need(mprotect(p, n, next(s) & 1 ? PROT_NONE : PROT_READ) == 0, "mprotect");
	need(mprotect(p, n, PROT_READ | PROT_WRITE) == 0, "mprotect");
	put(a, s);
}

static void advise(uint64_t *s, int sorts, int what)
{
	struct area *a = pick(s, sorts);
	char *p;
	size_t n;
	if (!a)
		return;
	part(a, s, &p, &n);
	madvise(p, n, what);
	if (next(s) & 1)
		put(a, s);
	if (next(s) & 1)
		(void)*(volatile char *)p; /* reads what was given up */
}

static void op_dontneed(uint64_t *s) { advise(s, PRIV | 1 << SHANON | 1 << MEMFD, MADV_DONTNEED); }
static void op_free(uint64_t *s) { advise(s, OURS, MADV_FREE); }
static void op_remove(uint64_t *s) { advise(s, 1 << SHANON | 1 << MEMFD, MADV_REMOVE); }
static void op_collapse(uint64_t *s) { advise(s, 1 << THP, 25 /* MADV_COLLAPSE, 6.1 */); }
static void op_pageout(uint64_t *s) { advise(s, 1 << SHANON | 1 << MEMFD, 21 /* MADV_PAGEOUT */); }

static void op_hole(uint64_t *s) /* a whole huge page is given up */
{
	struct area *a = pick(s, 1 << THP);
	if (!a || a->n < HUGE || (uintptr_t)a->p % HUGE)
		return;
	char *p = a->p + next(s) % (a->n / HUGE) * HUGE;
	madvise(p, HUGE, MADV_DONTNEED);
	switch (next(s) % 4) {
	case 0:
		for (int i = 0; i < 4; i++)
			*(volatile uint64_t *)(p + next(s) % (HUGE / PAGE) * PAGE) = next(s);
		break;
	case 1:
		(void)*(volatile char *)p;
		break;
	case 2:
		madvise(p, HUGE, MADV_NOHUGEPAGE);
		*(volatile uint64_t *)(p + next(s) % (HUGE / PAGE) * PAGE) = next(s);
		break;
	}
}

static void op_read(uint64_t *s) /* memory that nobody wrote */
{
	struct area *a = make(ANON, pages(s, 128));
	if (!a)
		return;
	for (size_t at = 0; at < a->n; at += PAGE)
		(void)*(volatile char *)(a->p + at);
}

static void op_replace(uint64_t *s) /* another mapping at the same place */
{
	struct area *a = pick(s, OURS | 1 << FILES);
	if (!a)
		return;
	int sort = next(s) & 1 ? ANON : FILES;
	if (a->n > 256 * PAGE)
		sort = ANON;
	need(mmap(a->p, a->n, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | (sort == ANON ? MAP_ANONYMOUS : 0),
		  sort == ANON ? -1 : file, 0) == a->p, "mmap over");
	a->sort = sort;
	if (next(s) & 1)
		put(a, s);
}

static int deep(int n, uint64_t x)
{
	volatile char b[PAGE];
	b[x % PAGE] = (char)x;
	return n ? deep(n - 1, x + b[n % PAGE]) + b[0] : 0;
}

static void op_stack(uint64_t *s) { deep(next(s) % 300, next(s)); }

static void *briefly(void *arg)
{
	uint64_t s = (uintptr_t)arg;
	deep(next(&s) % 60, next(&s));
	usleep(next(&s) % 30000);
	return NULL;
}

static void op_thread(uint64_t *s)
{
	pthread_t t;
	if (pthread_create(&t, NULL, briefly, (void *)next(s)) == 0)
		pthread_detach(t);
}

static void op_fork(uint64_t *s)
{
	if (nofork)
		return;
	uint64_t child = next(s);
	pid_t pid = fork();
	need(pid >= 0, "fork");
	if (pid == 0) {
		for (int i = 0; i < 16; i++) {
			struct area *a = pick(&child, ~0);
			if (a)
				put(a, &child);
		}
		_exit(0);
	}
	for (int i = 0; i < 4; i++) {
		struct area *a = pick(s, ~0);
		if (a)
			put(a, s);
	}
	waitpid(pid, NULL, 0);
}

static void op_pwrite(uint64_t *s) /* writes shared memory past its mappings */
{
	struct area *a = pick(s, 1 << MEMFD | 1 << MEMPRIV);
	if (!a)
		return;
	uint64_t x = next(s);
	need(pwrite(a->fd, &x, 8, next(s) % (a->n / PAGE) * PAGE + 64) == 8, "pwrite");
}

static const struct op {
	const char *name;
	void (*f)(uint64_t *);
} ops[] = {
	{"mmap", op_mmap}, {"thp", op_thp}, {"file", op_file}, {"shared", op_shared}, {"memfd", op_memfd},
	{"mempriv", op_mempriv}, {"munmap", op_munmap}, {"munmap2", op_munmap}, {"release", op_release}, {"brk", op_brk},
	{"heap", op_heap}, {"grow", op_grow}, {"move", op_move}, {"over", op_over}, {"mprotect", op_mprotect},
	{"dontneed", op_dontneed}, {"free", op_free}, {"remove", op_remove}, {"collapse", op_collapse},
	{"pageout", op_pageout}, {"hole", op_hole}, {"read", op_read}, {"replace", op_replace}, {"stack", op_stack},
	{"thread", op_thread}, {"fork", op_fork}, {"pwrite", op_pwrite},
};
#define NOPS (sizeof ops / sizeof *ops)

static void step(const struct op *op, uint64_t s)
{
	pthread_mutex_lock(&mu);
	if (!op)
		op = &ops[next(&s) % NOPS];
	while (total > TOTAL) {
		struct area *a = pick(&s, ~0);
		if (a)
			drop(a);
	}
	op->f(&s);
	pthread_mutex_unlock(&mu);
	printf("%s%s\n", op->name, efaults ? "-efault" : "");
	efaults = 0;
}

static void *churn(void *arg)
{
	int me = (int)(intptr_t)arg;
	uint64_t s = time(NULL) + me;
	pthread_mutex_lock(&mu);
	while (me < writers) {
		for (int i = 0; i < 24; i++) {
			struct area *a = pick(&s, ~0);
			if (a)
				put(a, &s);
		}
		pthread_mutex_unlock(&mu);
		usleep(300);
		pthread_mutex_lock(&mu);
	}
	running--;
	pthread_cond_broadcast(&changed);
	pthread_mutex_unlock(&mu);
	return NULL;
}

static void churners(int n)
{
	pthread_mutex_lock(&mu);
	writers = 0;
	while (running > 0)
		pthread_cond_wait(&changed, &mu);
	writers = n;
	for (int i = 0; i < n; i++) {
		pthread_t t;
		need(pthread_create(&t, NULL, churn, (void *)(intptr_t)i) == 0, "thread");
		pthread_detach(t);
		running++;
	}
	pthread_mutex_unlock(&mu);
	printf("ok\n");
}

static void area(const char *sort, size_t n)
{
	enum sort k = !strcmp(sort, "thp") ? THP : !strcmp(sort, "shared") ? SHANON : !strcmp(sort, "memfd") ? MEMFD :
		      !strcmp(sort, "file") ? FILES : !strcmp(sort, "mempriv") ? MEMPRIV : ANON;
	struct area *a = make(k, n);
	need(a != NULL, "too many areas");
	printf("%lx %lu %lx %d\n", (unsigned long)a->p, a->n / PAGE, (unsigned long)a->second, a->fd);
}

int main(void)
{
	static char line[256], name[32];
	unsigned long x, y, z;
	int n;
	setvbuf(stdin, NULL, _IOLBF, 4096);
	setvbuf(stdout, NULL, _IOLBF, 4096);
	file = open("/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	need(file >= 0, "open a file in /tmp");
	for (int i = 0; i < 256; i++) {
		static char b[PAGE];
		memset(b, i, sizeof b);
		need(write(file, b, sizeof b) == sizeof b, "write");
	}
	while (fgets(line, sizeof line, stdin)) {
		if (!strncmp(line, "uffd", 4)) {
			n = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | 1 /* UFFD_USER_MODE_ONLY */);
			need(n >= 0, "userfaultfd");
			printf("%d\n", n);
		} else if (sscanf(line, "close %d", &n) == 1) {
			close(n);
			printf("ok\n");
		} else if (sscanf(line, "churn %d", &n) == 1) {
			churners(n);
		} else if (sscanf(line, "step %lu", &x) == 1) {
			step(NULL, x);
		} else if (sscanf(line, "do %31s %lu", name, &x) == 2) {
			const struct op *op = NULL;
			for (size_t i = 0; i < NOPS; i++)
				if (!strcmp(ops[i].name, name))
					op = &ops[i];
			need(op != NULL, name);
			step(op, x);
		} else if (sscanf(line, "area %31s %lu", name, &x) == 2) {
			area(name, x * PAGE);
		} else if (sscanf(line, "poke %lx %lu %lu", &x, &y, &z) == 3) {
			for (size_t i = 0; i < y; i += z)
				*(volatile uint64_t *)(x + i * PAGE) += 1 + i;
			printf("ok\n");
		} else if (sscanf(line, "peek %lx %lu %lu", &x, &y, &z) == 3) {
			for (size_t i = 0; i < y; i += z)
				(void)*(volatile char *)(x + i * PAGE);
			printf("ok\n");
		} else if (sscanf(line, "advise %lx %lu %d", &x, &y, &n) == 3) {
			need(madvise((void *)x, y * PAGE, n) == 0, "madvise");
			printf("ok\n");
		} else if (sscanf(line, "pwrite %d %lu", &n, &x) == 2) {
			need(pwrite(n, "written", 7, x * PAGE) == 7, "pwrite");
			printf("ok\n");
		} else if (sscanf(line, "child %lx %lu", &x, &y) == 2) {
			/* A child writes y pages and ends; then it is as if there had been none. */
			pid_t pid = fork();
			need(pid >= 0, "fork");
			if (pid == 0) {
				for (size_t i = 0; i < y; i++)
					*(volatile uint64_t *)(x + i * PAGE) += 77;
				_exit(0);
			}
			waitpid(pid, NULL, 0);
			printf("ok\n");
		} else if (sscanf(line, "share %lx %lu", &x, &y) == 2) {
			/* Shared memory takes the place of private, with the same content. */
			static char copy[64 * PAGE];
			need(y <= 64, "too many pages");
			memcpy(copy, (void *)x, y * PAGE);
			need(mmap((void *)x, y * PAGE, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_SHARED | MAP_ANONYMOUS, -1, 0) == (void *)x, "mmap");
			memcpy((void *)x, copy, y * PAGE);
			printf("ok\n");
		} else if (sscanf(line, "onto %lx %lu %lx", &x, &y, &z) == 3) {
			need(mremap((void *)x, y * PAGE, y * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)z) == (void *)z, "mremap");
			printf("ok\n");
		} else if (sscanf(line, "stripes %lx %lu", &x, &y) == 2) {
			for (size_t i = 0; i < y; i += 2)
				need(mprotect((void *)(x + i * PAGE), PAGE, PROT_READ) == 0, "mprotect");
			printf("ok\n");
		} else if (!strncmp(line, "nofork", 6)) {
			nofork = 1;
			printf("ok\n");
		} else if (!strncmp(line, "quit", 4)) {
			break;
		} else {
			printf("error unknown command %s", line);
		}
	}
	return 0;
}
