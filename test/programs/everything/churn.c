/*
 * Churn: memory is given up, moved, grown, unmapped and (with --with fork)
 * forked all the time, and every byte of it is verified: no page may be lost,
 * and none may come back that was given up. This is what REMOVE, REMAP, UNMAP
 * and FORK events of a userfaultfd are about.
 */
#include "everything.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define PAGE 4096UL
#define SLOTS 48
#define MOST 256 /* pages in a slot */

/* What a page must hold. */
enum { ZERO, CONTENT, FREED /* its content or zeros, as the kernel likes */ };

struct slot {
	uint64_t *p;
	size_t n;   /* pages, 0 if there is no mapping */
	bool split; /* it may be more than one mapping, which mremap cannot move */
	struct {
		uint32_t is, gen;
	} want[2 * MOST];
};

struct arena {
	struct slot slots[SLOTS];
	uint64_t seed, id;
	uint32_t gen;
};

static uint64_t word(uint64_t id, uint32_t gen, uint64_t i)
{
	return (id << 48 | (uint64_t)gen << 16) ^ (i * 0x9e3779b97f4a7c15ULL) ^ 0x5555;
}

/* holds reports whether a page is the one of generation gen, or zeros (gen 0).
 * *at is the first word that is not. */
static bool holds(struct arena *a, const uint64_t *p, uint32_t gen, uint64_t *at)
{
	for (uint64_t i = 0; i < PAGE / 8; i++)
		if (p[i] != (gen ? word(a->id, gen, i) : 0)) {
			*at = i;
			return false;
		}
	return true;
}

static void verify(struct arena *a, struct slot *s, size_t k, const char *after)
{
	const uint64_t *p = s->p + k * PAGE / 8;
	uint32_t gen = s->want[k].gen;
	uint64_t at = 0;

	switch (s->want[k].is) {
	case ZERO:
		check(holds(a, p, 0, &at), "%s: page %p must be zeros, word %lu is %#lx: old bytes came back", after,
		      (void *)p, (unsigned long)at, (unsigned long)p[at]);
		break;
	case CONTENT:
		check(holds(a, p, gen, &at), "%s: page %p, word %lu is %#lx, not %#lx: the page is lost or stale", after,
		      (void *)p, (unsigned long)at, (unsigned long)p[at], (unsigned long)word(a->id, gen, at));
		break;
	case FREED:
		check(holds(a, p, 0, &at) || holds(a, p, gen, &at), "%s: page %p is neither zeros nor what it was", after, (void *)p);
		break;
	}
}

static void verify_all(struct arena *a, const char *after)
{
	for (int i = 0; i < SLOTS; i++)
		for (size_t k = 0; k < a->slots[i].n; k++)
			verify(a, &a->slots[i], k, after);
}

static void write_page(struct arena *a, struct slot *s, size_t k)
{
	uint64_t *p = s->p + k * PAGE / 8;

	if (++a->gen == 0)
		a->gen = 1;
	for (uint64_t i = 0; i < PAGE / 8; i++)
		p[i] = word(a->id, a->gen, i);
	s->want[k].is = CONTENT;
	s->want[k].gen = a->gen;
}

static void zeroed(struct slot *s, size_t from, size_t to)
{
	for (; from < to; from++)
		s->want[from].is = ZERO;
}

static void *fresh(size_t n)
{
	void *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

/* The child verifies its copy, which the parent changes meanwhile. */
static void forked(struct arena *a)
{
	pid_t child = (pid_t)must(fork());
	int status = 0;

	if (child == 0) {
		verify_all(a, "in a forked child");
		_exit(0);
	}
	for (int i = 0; i < SLOTS; i++)
		if (a->slots[i].n)
			write_page(a, &a->slots[i], 0);
	while (waitpid(child, &status, 0) == -1)
		check(errno == EINTR && opt.sigcont_ok, "waitpid: %s", strerror(errno));
	check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the forked child ended with %#x", status);
}

static void step(struct arena *a)
{
	struct slot *s = &a->slots[rnd(&a->seed) % SLOTS];
	uint64_t r = rnd(&a->seed);
	size_t from, to;
	void *p;

	if (s->n == 0) {
		s->n = 1 + r % MOST;
		s->p = fresh(s->n);
		s->split = false;
		zeroed(s, 0, s->n);
		return;
	}
	from = r % s->n;
	to = from + 1 + (r >> 16) % (s->n - from);
	switch ((r >> 40) % 16) {
	case 0: /* given up: zeros from now on */
		must(madvise(s->p + from * PAGE / 8, (to - from) * PAGE, MADV_DONTNEED));
		zeroed(s, from, to);
		for (size_t k = from; k < to; k++)
			verify(a, s, k, "after MADV_DONTNEED");
		break;
	case 1: /* perhaps given up */
		give_up_lazily(s->p + from * PAGE / 8, (to - from) * PAGE);
		for (size_t k = from; k < to; k++)
			if (s->want[k].is == CONTENT)
				s->want[k].is = FREED;
		break;
	case 2: /* moved, and perhaps grown */
		if (s->split)
			break;
		to = s->n + (r >> 50) % (2 * MOST - s->n > 64 ? 64 : 2 * MOST - s->n + 1);
		p = fresh(to);
		p = mremap(s->p, s->n * PAGE, to * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, p);
		/* What is settled in pieces is several mappings for that time. Since Linux 6.17 the
		 * first of them may have moved nevertheless (remap_move, mm/mremap.c), or nothing,
		 * and p be somebody else's by now: nothing is known about it. */
		if (opt.veiled && p == MAP_FAILED && errno == EFAULT) {
			s->n = 0;
			break;
		}
		check(p != MAP_FAILED, "mremap: %s", strerror(errno));
		s->p = p;
		zeroed(s, s->n, to);
		s->n = to;
		for (size_t k = 0; k < s->n; k++)
			verify(a, s, k, "after mremap");
		break;
	case 3: /* shrunk: what is beyond is gone */
		if (from == 0)
			break;
		must(munmap(s->p + from * PAGE / 8, (s->n - from) * PAGE));
		s->n = from;
		break;
	case 4: /* replaced in place */
		p = mmap(s->p + from * PAGE / 8, (to - from) * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		check(p != MAP_FAILED, "mmap: %s", strerror(errno));
		s->split = true;
		zeroed(s, from, to);
		break;
	case 5:
		if (s->n > MOST || (r >> 20) % 4 == 0) {
			must(munmap(s->p, s->n * PAGE));
			s->n = 0;
		}
		break;
	case 6:
	case 7:
	case 8:
		for (size_t k = from; k < to; k++)
			verify(a, s, k, "later");
		break;
	default:
		for (size_t k = from; k < to && k < from + 32; k++)
			write_page(a, s, k);
	}
}

static void body(void *arg)
{
	struct arena *a = arg;
	static _Thread_local int rounds;

	for (int i = 0; i < 4; i++)
		step(a);
	if (++rounds % 100 == 0) {
		if (has_asked("fork"))
			forked(a);
		verify_all(a, "all of it");
	}
	sleep_us(5000);
}

static struct arena *arenas[64];

static void at_last(void)
{
	for (int i = 0; i < 64 && arenas[i]; i++)
		verify_all(arenas[i], "at the end");
}

void churn_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads > 64 ? 64 : opt.threads;

	for (int i = 0; i < n; i++) {
		arenas[i] = calloc(1, sizeof(struct arena));
		arenas[i]->id = i + 1;
		arenas[i]->seed = 0x1234567ULL * (i + 1);
		start("churn", body, arenas[i]);
	}
	at_end(at_last);
}
