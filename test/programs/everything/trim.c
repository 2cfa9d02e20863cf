/*
 * Trim: the allocator under stress. Threads take memory of all sizes from it, let it
 * grow and shrink, give it back, and have it returned to the kernel at once
 * (malloc_trim: MADV_DONTNEED, brk, munmap); what they hold is verified.
 */
#include "everything.h"

#include <malloc.h>

#define HELD 96

struct heap {
	struct {
		uint32_t *p;
		size_t n; /* words */
		uint32_t tag;
	} held[HELD];
	uint64_t seed, rounds;
};

static void fill(struct heap *h, int i, size_t from)
{
	for (size_t k = from; k < h->held[i].n; k++)
		h->held[i].p[k] = h->held[i].tag ^ (uint32_t)k;
}

static void verify(struct heap *h, int i, const char *when)
{
	for (size_t k = 0; k < h->held[i].n; k++)
		check(h->held[i].p[k] == (h->held[i].tag ^ (uint32_t)k), "%s: word %zu of %zu at %p is %#x, not %#x", when, k,
		      h->held[i].n, (void *)h->held[i].p, h->held[i].p[k], h->held[i].tag ^ (uint32_t)k);
}

static size_t size(uint64_t r)
{
	switch (r % 16) {
	case 0: return 1 + (r >> 8) % (300 << 10); /* mapped by itself, moved by mremap */
	case 1: case 2: return 1 + (r >> 8) % (20 << 10);
	default: return 1 + (r >> 8) % 1000;
	}
}

static void body(void *arg)
{
	struct heap *h = arg;

	for (int step = 0; step < 24; step++) {
		uint64_t r = rnd(&h->seed);
		int i = r % HELD;
		size_t was = h->held[i].n, n = size(r >> 8);

		verify(h, i, "held");
		if (h->held[i].p && r >> 60 < 6) { /* grown or shrunk */
			uint32_t *p = realloc(h->held[i].p, n * 4);

			check(p != NULL, "realloc: %s", strerror(errno));
			h->held[i].p = p;
			h->held[i].n = n < was ? n : was;
			verify(h, i, "after realloc");
			h->held[i].n = n;
			fill(h, i, was < n ? was : n);
			continue;
		}
		free(h->held[i].p);
		h->held[i].p = NULL;
		h->held[i].n = 0;
		if (r >> 60 > 12)
			continue;
		h->held[i].tag = (uint32_t)(r >> 20);
		if (r & 1 << 30) {
			h->held[i].p = calloc(n, 4);
			check(h->held[i].p != NULL, "calloc: %s", strerror(errno));
			for (size_t k = 0; k < n; k++)
				check(h->held[i].p[k] == 0, "calloc: word %zu of %zu at %p is %#x", k, n, (void *)h->held[i].p, h->held[i].p[k]);
		} else {
			h->held[i].p = malloc(n * 4);
			check(h->held[i].p != NULL, "malloc: %s", strerror(errno));
		}
		h->held[i].n = n;
		fill(h, i, 0);
	}
	if (++h->rounds % 8 == 0) {
		for (int i = 0; i < HELD; i++)
			if (rnd(&h->seed) % 4) {
				free(h->held[i].p);
				h->held[i].p = NULL;
				h->held[i].n = 0;
			}
		malloc_trim(0);
		for (int i = 0; i < HELD; i++)
			verify(h, i, "after malloc_trim");
	}
	sleep_us(4000);
}

static struct heap heaps[16];

static void at_last(void)
{
	for (int t = 0; t < 16; t++)
		for (int i = 0; i < HELD; i++)
			verify(&heaps[t], i, "at the end");
}

void trim_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads > 16 ? 16 : opt.threads;

	for (int t = 0; t < n; t++) {
		heaps[t].seed = 0x7654321ULL * (t + 1);
		start("trim", body, &heaps[t]);
	}
	at_end(at_last);
}
