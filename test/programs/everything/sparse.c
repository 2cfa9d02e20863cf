/*
 * Sparse: a long mapping of which half the pages are there at any time. They are
 * written and given up (MADV_DONTNEED) at random, fast, so that some are whenever and
 * wherever the mapping is arriving, copied or replaced. What was given up is zero, and
 * what was written is not.
 */
#include "everything.h"

#include <sys/mman.h>

#define PAGE 4096UL
#define PAGES 6144

struct sparse {
	uint64_t *p;
	uint32_t gen[PAGES]; /* 0: it is zero */
	uint64_t seed, id;
	uint32_t last;
	int rounds;
};

/* Three words of a page say what it is: it is written as a whole, or not there. */
static void verify(struct sparse *s, size_t k, const char *when)
{
	static const size_t words[] = { 0, 200, PAGE / 8 - 1 };

	for (int i = 0; i < 3; i++) {
		uint64_t is = s->p[k * PAGE / 8 + words[i]], want = s->gen[k] ? (s->id << 48 | (uint64_t)s->gen[k] << 16 | k) : 0;

		check(is == want, "%s: page %zu at %p, word %zu is %#lx, not %#lx: %s", when, k, (void *)(s->p + k * PAGE / 8),
		      words[i], (unsigned long)is, (unsigned long)want, want ? "it is lost or stale" : "old bytes came back");
	}
}

static void write_page(struct sparse *s, size_t k)
{
	if (++s->last == 0)
		s->last = 1;
	s->gen[k] = s->last;
	for (size_t i = 0; i < PAGE / 8; i++)
		s->p[k * PAGE / 8 + i] = s->id << 48 | (uint64_t)s->gen[k] << 16 | k;
}

static void body(void *arg)
{
	struct sparse *s = arg;

	for (int i = 0; i < 40; i++) {
		uint64_t r = rnd(&s->seed);
		bool give = r >> 58 == 0;
		size_t k = r % PAGES, n = give ? 1 + (r >> 32) % 96 : 1;

		if (k + n > PAGES)
			n = PAGES - k;
		for (size_t j = k; j < k + n; j++)
			verify(s, j, "later");
		if (give) {
			must(madvise(s->p + k * PAGE / 8, n * PAGE, MADV_DONTNEED));
			for (size_t j = k; j < k + n; j++)
				s->gen[j] = 0;
			if (r & 1 << 30)
				for (size_t j = k; j < k + n; j++)
					verify(s, j, "after MADV_DONTNEED");
		} else {
			for (size_t j = k; j < k + n; j++)
				write_page(s, j);
		}
	}
	if (++s->rounds % 256 == 0)
		for (size_t k = 0; k < PAGES; k++)
			verify(s, k, "all of it");
	sleep_us(1000);
}

static struct sparse *all[4];

static void at_last(void)
{
	for (int t = 0; t < 4 && all[t]; t++)
		for (size_t k = 0; k < PAGES; k++)
			verify(all[t], k, "at the end");
}

void sparse_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads > 4 ? 4 : opt.threads;

	for (int t = 0; t < n; t++) {
		struct sparse *s = all[t] = calloc(1, sizeof(struct sparse));

		s->id = t + 1;
		s->seed = 0x3456789ULL * (t + 1);
		s->p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		check(s->p != MAP_FAILED, "mmap: %s", strerror(errno));
		for (size_t k = 0; k < PAGES; k += 2)
			write_page(s, k);
		start("sparse", body, s);
	}
	at_end(at_last);
}
