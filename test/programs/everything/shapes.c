/*
 * Shapes: memory changes its shape all the time, in every way that the kernel
 * has, and a table of its own says what each page must hold. It is for tests of
 * memory that is copied while the program runs: a page that is stale, lost or
 * comes back is found. Off unless asked for by name.
 *
 * The table lies in memory that is copied, too. That both are stale together is
 * found by a count of the steps, which is kept in a register.
 */
#include "everything.h"

#include <fcntl.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define SLOTS 40
#define MOST 192 /* pages in an area */
#define FILE_PAGES 64

#ifndef MADV_GUARD_INSTALL /* Linux 6.13 */
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

enum { ZERO, CONTENT, FREED /* content or zeros */, FROM_FILE, GUARD };

struct want {
	uint8_t is, prot;
	uint16_t index; /* in the file */
	uint32_t gen, tweak;
};

struct area {
	uint64_t *p;
	size_t n; /* pages; 0: none */
	bool file, split /* perhaps more than one mapping */, down, brk;
	struct want want[MOST];
};

struct arena {
	struct area areas[SLOTS];
	uint64_t id, seed, steps;
	uint32_t gen;
};

static struct arena *arenas[16];
static int n_arenas;
static int file_fd = -1;
static bool guards;
static _Atomic int moves, refused;
static const size_t down_most = 128;

/* One page in four has only two words in it, so that it compresses well. */
static uint64_t word(const struct want *w, uint64_t id, uint64_t i)
{
	uint64_t v = w->gen % 4 ? ((uint64_t)w->gen << 20 ^ id << 56) + i * 0x9e3779b97f4a7c15ULL : w->gen + i % 2;

	v ^= v >> 29;
	if (w->tweak && i == w->tweak % WORDS)
		v ^= (uint64_t)w->tweak << 32;
	return v;
}

static bool holds(struct arena *a, const uint64_t *p, const struct want *w, int is, uint64_t *at, uint64_t *must)
{
	for (uint64_t i = 0; i < WORDS; i++) {
		*must = is == ZERO ? 0 : is == FROM_FILE ? w->index * 1000 + i : word(w, a->id, i);
		if (p[i] != *must) {
			*at = i;
			return false;
		}
	}
	return true;
}

static uint64_t *at(struct area *s, size_t k) { return s->p + k * WORDS; }

static void verify(struct arena *a, struct area *s, size_t k, const char *after)
{
	const struct want *w = &s->want[k];
	const uint64_t *p = at(s, k);
	uint64_t i = 0, must = 0;

	if (w->is == GUARD) {
		check(access((const char *)p, F_OK) == -1 && errno == EFAULT, "%s: page %p is no guard any more", after, (void *)p);
		return;
	}
	if (w->prot == PROT_NONE)
		return;
	if (w->is == FREED && holds(a, p, w, ZERO, &i, &must))
		return;
	check(holds(a, p, w, w->is == FREED ? CONTENT : w->is, &i, &must),
	      "%s: page %zu of %zu at %p (%s%s%s, is %d, generation %u of %u, tweak %u): word %lu is %#lx, not %#lx", after, k, s->n, (void *)p,
	      s->file ? "file" : "anonymous", s->down ? ", stack" : "", s->brk ? ", heap" : "", w->is, w->gen, a->gen, w->tweak,
	      (unsigned long)i, (unsigned long)p[i], (unsigned long)must);
}

static void verify_range(struct arena *a, struct area *s, size_t from, size_t to, const char *after)
{
	for (; from < to; from++)
		verify(a, s, from, after);
}

static void verify_all(struct arena *a, const char *after)
{
	for (int i = 0; i < SLOTS; i++)
		verify_range(a, &a->areas[i], 0, a->areas[i].n, after);
}

static void put(struct arena *a, struct area *s, size_t k)
{
	struct want *w = &s->want[k];
	uint64_t *p = at(s, k);

	if (w->is == GUARD || w->prot != (PROT_READ | PROT_WRITE))
		return;
	if (w->is == CONTENT && a->gen % 3 == 0) { /* a small change */
		uint64_t old = w->tweak % WORDS;

		w->tweak = 0;
		p[old] = word(w, a->id, old);
		w->tweak = ++a->gen;
		p[w->tweak % WORDS] = word(w, a->id, w->tweak % WORDS);
		return;
	}
	if (++a->gen % 29 == 0) { /* zeros that were written */
		memset(p, 0, PAGE);
		*w = (struct want){ .is = ZERO, .prot = w->prot, .index = w->index };
		return;
	}
	*w = (struct want){ .is = CONTENT, .prot = w->prot, .index = w->index, .gen = a->gen % 7 ? a->gen : a->gen - 1 /* twice the same */ };
	for (uint64_t i = 0; i < WORDS; i++)
		p[i] = word(w, a->id, i);
}

static void zeroed(struct area *s, size_t from, size_t to)
{
	for (; from < to; from++)
		s->want[from] = (struct want){ .is = ZERO, .prot = PROT_READ | PROT_WRITE };
}

static void *fresh(size_t n, int flags)
{
	void *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);

	check(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

static struct area *empty(struct arena *a)
{
	for (int i = 0; i < SLOTS; i++)
		if (!a->areas[i].n && !a->areas[i].brk && !a->areas[i].down)
			return &a->areas[i];
	return NULL;
}

/* cut makes of the pages from k on an area of their own, where there is room. */
static struct area *cut(struct arena *a, struct area *s, size_t k)
{
	struct area *t = empty(a);

	if (!t || k == 0 || k >= s->n)
		return NULL;
	t->p = at(s, k);
	t->n = s->n - k;
	t->file = s->file;
	t->split = s->split;
	memcpy(t->want, s->want + k, t->n * sizeof(s->want[0]));
	s->n = k;
	return t;
}

static void make(struct arena *a, struct area *s, uint64_t r)
{
	s->split = false;
	s->file = r % 5 == 0;
	if (s->file) {
		size_t first = (r >> 8) % FILE_PAGES;

		s->n = 1 + (r >> 16) % (FILE_PAGES - first);
		s->p = mmap(NULL, s->n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file_fd, first * PAGE);
		check(s->p != MAP_FAILED, "mmap of a file: %s", strerror(errno));
		for (size_t k = 0; k < s->n; k++)
			s->want[k] = (struct want){ .is = FROM_FILE, .prot = PROT_READ | PROT_WRITE, .index = first + k };
		return;
	}
	s->n = 1 + (r >> 16) % MOST;
	s->p = fresh(s->n, r & 1 << 12 ? MAP_NORESERVE : 0);
	zeroed(s, 0, s->n);
	verify_range(a, s, 0, s->n, "new memory");
	if (r & 1 << 13)
		for (size_t k = 0; k < s->n; k++)
			put(a, s, k);
}

/* move moves an area, and perhaps makes it larger. */
static void move(struct arena *a, struct area *s, uint64_t r)
{
	size_t more = s->file ? 0 : r % 3 ? 0 : (r >> 8) % (MOST - s->n + 1);
	bool stay = (r >> 4) % 3 == 0;
	void *p = stay ? NULL : fresh(s->n + more, 0);
	void *to = stay ? mremap(s->p, s->n * PAGE, (s->n + more) * PAGE, 0)
			: mremap(s->p, s->n * PAGE, (s->n + more) * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, p);

	if (to == MAP_FAILED) {
		int e = errno;

		if (e == ENOMEM && stay)
			return; /* no room to grow in place */
		check(e == EFAULT, "mremap: %s", strerror(e));
		atomic_fetch_add(&refused, 1);
		/* It may have been moved in part (Linux 6.17), and p be somebody else's by
		 * now: nothing is known about it. */
		s->n = 0;
		return;
	}
	atomic_fetch_add(&moves, 1);
	s->p = to;
	zeroed(s, s->n, s->n + more);
	for (size_t k = s->n; k < s->n + more; k++)
		s->want[k].prot = s->want[s->n - 1].prot;
	s->n += more;
	verify_range(a, s, 0, s->n, stay ? "after growth in place" : "after a move");
}

/* protect changes what may be done to pages. */
static void protect(struct arena *a, struct area *s, size_t from, size_t to, uint64_t r)
{
	int prot = r % 4 == 0 ? PROT_NONE : r % 4 == 1 ? PROT_READ : PROT_READ | PROT_WRITE;

	if (from != 0 || to != s->n)
		s->split = true;
	must(mprotect(at(s, from), (to - from) * PAGE, prot));
	for (size_t k = from; k < to; k++)
		s->want[k].prot = prot;
	verify_range(a, s, from, to, "after mprotect");
}

static void guard(struct arena *a, struct area *s, size_t from, size_t to)
{
	bool is = s->want[from].is == GUARD;

	if (!guards || s->file)
		return;
	must(madvise(at(s, from), (to - from) * PAGE, is ? MADV_GUARD_REMOVE : MADV_GUARD_INSTALL));
	for (size_t k = from; k < to; k++)
		if (!is || s->want[k].is == GUARD)
			s->want[k] = (struct want){ .is = is ? ZERO : GUARD, .prot = s->want[k].prot };
	verify_range(a, s, from, to, "after a guard");
}

/* discard gives up pages for good, or perhaps. */
static void discard(struct arena *a, struct area *s, size_t from, size_t to, bool perhaps)
{
	if (perhaps && s->file)
		return;
	if (perhaps)
		give_up_lazily(at(s, from), (to - from) * PAGE);
	else
		must(madvise(at(s, from), (to - from) * PAGE, MADV_DONTNEED));
	for (size_t k = from; k < to; k++) {
		struct want *w = &s->want[k];

		if (w->is == GUARD)
			continue;
		if (!perhaps && s->file)
			*w = (struct want){ .is = FROM_FILE, .prot = w->prot, .index = w->index };
		else if (!perhaps)
			*w = (struct want){ .is = ZERO, .prot = w->prot };
		else if (w->is == CONTENT)
			w->is = FREED;
	}
	verify_range(a, s, from, to, "after madvise");
}

/* grow makes a heap or a stack larger or smaller. */
static void grow(struct area *s, uint64_t r)
{
	size_t n = 1 + (r >> 8) % 24;

	if (s->brk) {
		if (sbrk(0) != (void *)at(s, s->n))
			return; /* malloc has grown it */
		if (r % 2 && s->n > n)
			s->n -= n, must(sbrk(-(long)(n * PAGE)));
		else if (s->n + n <= MOST && sbrk(n * PAGE) != (void *)-1) {
			zeroed(s, s->n, s->n + n);
			s->n += n;
		}
		return;
	}
	/* The table of a stack begins with its highest page. */
	if (r % 2 && s->n > n) {
		must(munmap(s->p + WORDS - s->n * WORDS, n * PAGE));
		s->n -= n;
	} else if (s->n + n <= down_most) {
		s->p[-(long)((s->n + n - 1) * WORDS)] = 1; /* the lowest: the kernel grows it */
		s->p[-(long)((s->n + n - 1) * WORDS)] = 0;
		zeroed(s, s->n, s->n + n);
		s->n += n;
	}
}

/* stack writes to or verifies a page of an area that grows downwards. */
static void stack(struct arena *a, struct area *s, size_t k, bool write)
{
	struct area one = { .p = s->p - k * WORDS, .n = 1, .down = true };

	one.want[0] = s->want[k];
	if (write)
		put(a, &one, 0);
	verify(a, &one, 0, "stack");
	s->want[k] = one.want[0];
}

static void step(struct arena *a)
{
	struct area *s = &a->areas[rnd(&a->seed) % SLOTS], *t;
	uint64_t r = rnd(&a->seed);
	size_t from, to;

	if (s->n == 0) {
		if (!s->brk && !s->down)
			make(a, s, r);
		else
			grow(s, r & ~1UL);
		return;
	}
	from = r % s->n;
	to = from + 1 + (r >> 16) % (s->n - from);
	if (s->down || s->brk) {
		if ((r >> 40) % 4 == 0)
			grow(s, r >> 44);
		for (size_t k = from; k < to && k < from + 16 && k < s->n; k++)
			if (s->down)
				stack(a, s, k, r >> 60 & 1);
			else if (r >> 60 & 1)
				put(a, s, k);
			else
				verify(a, s, k, "heap");
		return;
	}
	switch ((r >> 40) % 20) {
	case 0: discard(a, s, from, to, false); break;
	case 1: discard(a, s, from, to, true); break;
	case 2:
	case 3:
		if (!s->split) /* mremap takes one mapping */
			move(a, s, r >> 20);
		break;
	case 4: /* shrunk */
		if (from) {
			if (r >> 60 & 1 && !s->split)
				check(mremap(s->p, s->n * PAGE, from * PAGE, 0) == s->p, "mremap to a smaller size: %s", strerror(errno));
			else
				must(munmap(at(s, from), (s->n - from) * PAGE));
			s->n = from;
		}
		break;
	case 5: /* a hole in the middle */
		if ((t = cut(a, s, from)) && to - from < t->n) {
			size_t gone = to - from;

			must(munmap(t->p, gone * PAGE));
			t->p = at(t, gone);
			t->n -= gone;
			memmove(t->want, t->want + gone, t->n * sizeof(t->want[0]));
		}
		break;
	case 6: /* replaced in place, perhaps by another kind */
		if (s->file)
			break;
		check(mmap(at(s, from), (to - from) * PAGE, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | (r >> 60 & 1 ? MAP_NORESERVE : 0), -1, 0) == at(s, from), "mmap: %s", strerror(errno));
		s->split = s->split || from || to < s->n;
		zeroed(s, from, to);
		for (size_t k = from; k < to; k += 2)
			put(a, s, k);
		break;
	case 7:
	case 8: protect(a, s, from, to, r >> 20); break;
	case 9: guard(a, s, from, to); break;
	case 10:
		must(munmap(s->p, s->n * PAGE));
		s->n = 0;
		break;
	case 11:
	case 12: verify_range(a, s, from, to, "later"); break;
	default:
		for (size_t k = from; k < to && k < from + 24; k++)
			put(a, s, k);
	}
}

/* faulted says in which mapping an access failed that must not. */
static void faulted(int sig, siginfo_t *si, void *context)
{
	uintptr_t where = (uintptr_t)si->si_addr, first, end;
	FILE *maps = fopen("/proc/self/maps", "re");
	char line[300], before[300] = "";

	(void)sig;
	(void)context;
	while (maps && fgets(line, sizeof(line), maps) && sscanf(line, "%lx-%lx", &first, &end) == 2) {
		line[strcspn(line, "\n")] = 0;
		if (end > where)
			bad("fault at %p, in or below %s, above %s", si->si_addr, line, before);
		strcpy(before, line);
	}
	bad("fault at %p", si->si_addr);
}

static void *shape(void *arg)
{
	struct arena *a = arg;
	sigset_t segv;

	sigemptyset(&segv);
	sigaddset(&segv, SIGSEGV);
	sigaddset(&segv, SIGBUS);
	pthread_sigmask(SIG_UNBLOCK, &segv, NULL);
	for (register uint64_t steps = 0; running(); tick()) {
		for (int i = 0; i < 8; i++) {
			step(a);
			a->steps++;
			steps++;
			check(a->steps == steps, "%lu steps were made, memory says %lu: it is stale", (unsigned long)steps, (unsigned long)a->steps);
		}
		if (steps % 800 == 0) {
			for (int i = 0; i < SLOTS; i++)
				if (!a->areas[i].down)
					verify_range(a, &a->areas[i], 0, a->areas[i].n, "all of it");
			check(refused < 3 + moves / 200, "mremap of what is one mapping failed %d times with EFAULT, and did %d times not", refused, moves);
		}
		sleep_us(1000);
	}
	return NULL;
}

/* Threads come and go, and use their stacks deeply while they are there. */
static __attribute__((noinline)) uint64_t recurse(int depth, uint64_t seed)
{
	volatile uint64_t frame[128];

	for (int i = 0; i < 128; i++)
		frame[i] = seed + i * depth;
	if (depth % 64 == 0)
		sleep_us(500);
	uint64_t below = depth > 0 ? recurse(depth - 1, seed + 1) : 0;
	for (int i = 0; i < 128; i++)
		check(frame[i] == seed + i * depth, "a stack frame changed at depth %d", depth);
	return below + 1;
}

static void *deep(void *arg)
{
	return (void *)recurse((int)(uintptr_t)arg, (uintptr_t)arg);
}

static void come_and_go(void *arg)
{
	static uint64_t seed = 77;
	pthread_t t[4];
	pthread_attr_t attr;

	(void)arg;
	pthread_attr_init(&attr);
	for (int i = 0; i < 4; i++) {
		pthread_attr_setstacksize(&attr, (256 + rnd(&seed) % 8 * 64) << 10);
		check(pthread_create(&t[i], &attr, deep, (void *)(rnd(&seed) % 150)) == 0, "pthread_create");
	}
	pthread_attr_destroy(&attr);
	for (int i = 0; i < 4; i++) {
		void *depth;

		check(pthread_join(t[i], &depth) == 0 && (uintptr_t)depth <= 150, "a thread came back with %p", depth);
	}
}

static void at_last(void)
{
	for (int i = 0; i < n_arenas; i++) {
		struct arena *a = arenas[i];

		for (int j = 0; j < SLOTS; j++) {
			struct area *s = &a->areas[j];

			for (size_t k = 0; s->down && k < s->n; k++)
				stack(a, s, k, false);
			for (size_t k = 0; !s->down && k < s->n; k++)
				if (s->want[k].prot == PROT_NONE) { /* nobody has looked there since */
					must(mprotect(at(s, k), PAGE, PROT_READ));
					s->want[k].prot = PROT_READ;
				}
			if (s->down)
				s->n = 0;
		}
		verify_all(a, "at the end");
	}
}

static void file_start(void)
{
	static uint64_t page[WORDS];
	char path[300];

	snprintf(path, sizeof(path), "%s/shapes.%s", opt.dir, opt.identity);
	file_fd = (int)must(open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
	for (int i = 0; i < FILE_PAGES; i++) {
		for (uint64_t k = 0; k < WORDS; k++)
			page[k] = i * 1000 + k;
		check(write(file_fd, page, PAGE) == (ssize_t)PAGE, "write: %s", strerror(errno));
	}
}

void shapes_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads > 16 ? 16 : opt.threads;
	struct sigaction fault = { .sa_sigaction = faulted, .sa_flags = SA_SIGINFO };
	void *probe = fresh(1, 0);

	guards = has("guards") && madvise(probe, PAGE, MADV_GUARD_INSTALL) == 0;
	must(munmap(probe, PAGE));
	must(sigaction(SIGSEGV, &fault, NULL));
	must(sigaction(SIGBUS, &fault, NULL));
	file_start();
	for (int i = 0; i < n; i++) {
		struct arena *a = arenas[n_arenas++] = fresh((sizeof(struct arena) + PAGE - 1) / PAGE, 0);
		struct area *down = &a->areas[1];

		a->id = i + 1;
		a->seed = (uint64_t)now_ns(CLOCK_MONOTONIC) * (i + 1) | 1;
		printf("seed %lu\n", (unsigned long)a->seed);
		/* Far from where the kernel puts what is mapped anywhere. */
		down->down = true;
		down->p = mmap((void *)(0x200000000000UL + i * (1UL << 30)), PAGE, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN | MAP_FIXED_NOREPLACE, -1, 0);
		check(down->p != MAP_FAILED, "mmap: %s", strerror(errno));
		down->n = 1;
		zeroed(down, 0, 1);
	}
	must(sbrk(PAGE - (uintptr_t)sbrk(0) % PAGE));
	arenas[0]->areas[0].brk = true;
	arenas[0]->areas[0].p = sbrk(0);
	for (int i = 0; i < n; i++)
		start_raw("shape", shape, arenas[i]);
	start("threads", come_and_go, NULL);
	at_end(at_last);
}
