/*
 * Halves: halves of mappings are moved away, unmapped, or left empty (MREMAP_DONTUNMAP),
 * and, with "growth" (--with), what is left grows over the place again. What is new is
 * zero, and what has moved is what it was. Of growth in place nobody is told, so --trap
 * fuse does not pass that: it shows what has moved away once more.
 */
#include "everything.h"

#include <sys/mman.h>

#define PAGE 4096UL
#define BLOCKS 256
#define HALF 8 /* pages */

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

/* What the upper half of a block is. */
enum { NONE /* of all of it */, WHOLE, GONE, MOVED, EMPTY };

struct block {
	uint64_t *p, *moved, gen;
	int is;
};

struct blocks {
	struct block b[BLOCKS];
	uint64_t seed, gen;
};

static void fill(uint64_t *p, uint64_t gen)
{
	for (size_t i = 0; i < HALF * PAGE / 8; i++)
		p[i] = gen << 16 | i;
}

static void holds(const uint64_t *p, uint64_t gen, const char *when)
{
	for (size_t i = 0; i < HALF * PAGE / 8; i += i % 512 ? 511 : 1)
		check(p[i] == (gen ? gen << 16 | i : 0), "%s: word %zu at %p is %#lx, not %#lx: %s", when, i, (void *)(p + i),
		      (unsigned long)p[i], (unsigned long)(gen ? gen << 16 | i : 0), gen ? "it is lost or stale" : "old bytes came back");
}

/* remap returns NULL where the mapping is settled in part, and nobody knows what is where. */
static void *remap(void *p, size_t from, size_t to, int flags, void *at)
{
	void *q = mremap(p, from * PAGE, to * PAGE, flags, at);

	if (q == MAP_FAILED && opt.veiled && errno == EFAULT)
		return NULL;
	check(q != MAP_FAILED || errno == ENOMEM, "mremap: %s", strerror(errno));
	return q;
}

static void *fresh(size_t n)
{
	void *p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	check(p != MAP_FAILED, "mmap: %s", strerror(errno));
	return p;
}

static void step(struct blocks *a)
{
	uint64_t r = rnd(&a->seed);
	struct block *b = &a->b[r % BLOCKS];
	uint64_t *upper = b->p + HALF * PAGE / 8;
	void *q;

	switch (b->is) {
	case NONE:
		b->p = fresh(2 * HALF);
		b->gen = ++a->gen;
		fill(b->p, b->gen);
		fill(b->p + HALF * PAGE / 8, b->gen);
		b->is = WHOLE;
		return;
	case WHOLE:
		if (r >> 60 == 0) {
			holds(b->p, b->gen, "the lower half");
			holds(upper, b->gen, "the upper half");
			return;
		}
		switch (r >> 32 & 3) {
		case 0:
			must(munmap(upper, HALF * PAGE));
			b->is = GONE;
			return;
		case 1:
			q = fresh(HALF);
			q = remap(upper, HALF, HALF, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | MREMAP_FIXED, q);
			break;
		default:
			q = fresh(HALF);
			q = remap(upper, HALF, HALF, MREMAP_MAYMOVE | MREMAP_FIXED, q);
		}
		if (!q) {
			b->is = NONE;
			return;
		}
		b->moved = q;
		b->is = (r >> 32 & 3) == 1 ? EMPTY : MOVED;
		if (r >> 61)
			return;
		/* fall through */
	default:
		if (b->is != GONE && r >> 40 & 1)
			holds(b->moved, b->gen, "what has moved");
		if (b->is == EMPTY) {
			holds(upper, 0, "what was left");
		} else if (!has_asked("growth")) {
			must(munmap(b->p, HALF * PAGE));
			goto moved;
		} else if (!(q = remap(b->p, HALF, 2 * HALF, 0, NULL))) {
			b->is = NONE;
			return;
		} else if (q == MAP_FAILED) { /* something is there */
			holds(b->p, b->gen, "the lower half");
			must(munmap(b->p, HALF * PAGE));
			goto moved;
		} else {
			holds(upper, 0, "what it has grown by");
		}
		holds(b->p, b->gen, "the lower half");
		must(munmap(b->p, 2 * HALF * PAGE));
	moved:
		if (b->is != GONE) {
			holds(b->moved, b->gen, "what has moved");
			must(munmap(b->moved, HALF * PAGE));
		}
		b->is = NONE;
	}
}

static void body(void *arg)
{
	for (int i = 0; i < 4; i++)
		step(arg);
	sleep_us(3000);
}

void halves_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads;

	for (int t = 0; t < n; t++) {
		struct blocks *a = calloc(1, sizeof(struct blocks));

		a->seed = 0x56789abULL * (t + 1);
		a->gen = (uint64_t)t << 40;
		start("halves", body, a);
	}
}
