/*
 * Shared memory changes all the time, in every way that it can: by several
 * mappings of one object, by its descriptor, by holes that are punched and by cuts.
 * A table of its own says what each page must hold. Off unless asked for by name.
 *
 * The table lies in memory that is copied, too. That both are stale together is
 * found by a count of the steps, which is kept in a register.
 */
#include "everything.h"

#include <fcntl.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define WORDS (PAGE / 8)
#define MOST 900 /* pages in an object: what is smaller than 257 the image carries */
#define VIEWS 3
#define OBJECTS 6

enum { ANONYMOUS /* one mapping */, NAMELESS /* a memfd, its descriptor closed */, OPEN /* with it */, FILE_ONLY /* only that */, KINDS };

struct view {
	uint64_t *p;
	size_t first, n; /* pages; 0: none */
	bool readonly;
};

struct object {
	int kind, fd;
	size_t n; /* pages; 0: none */
	struct view views[VIEWS];
	uint32_t gen[MOST]; /* 0: zeros */
};

struct shop {
	struct object objects[OBJECTS];
	uint64_t id, seed, steps;
	uint32_t gen;
};

static struct shop *shops[16];
static int n_shops;

static uint64_t word(const struct shop *s, uint32_t gen, uint64_t i)
{
	uint64_t v = gen % 4 ? ((uint64_t)gen << 20 ^ s->id << 56) + i * 0x9e3779b97f4a7c15ULL : gen + i % 2;

	return v ^ v >> 29;
}

static void verify_page(const struct shop *s, const struct object *o, size_t k, const uint64_t *p, const char *by)
{
	for (uint64_t i = 0; i < WORDS; i++) {
		uint64_t must = o->gen[k] ? word(s, o->gen[k], i) : 0;

		check(p[i] == must, "%s: page %zu of %zu of an object of kind %d, generation %u of %u: word %lu is %#lx, not %#lx", by, k, o->n, o->kind,
		      o->gen[k], s->gen, (unsigned long)i, (unsigned long)p[i], (unsigned long)must);
	}
}

/* pages of v that the object has */
static size_t shown(const struct object *o, const struct view *v)
{
	return v->first >= o->n ? 0 : v->first + v->n > o->n ? o->n - v->first : v->n;
}

static void verify(struct shop *s, struct object *o, const char *when)
{
	static __thread uint64_t buf[WORDS];

	for (int i = 0; i < VIEWS; i++) {
		struct view *v = &o->views[i];

		for (size_t k = 0; k < shown(o, v); k++)
			verify_page(s, o, v->first + k, v->p + k * WORDS, when);
	}
	for (size_t k = 0; o->n && o->fd >= 0 && k < o->n; k++) {
		check(pread(o->fd, buf, PAGE, k * PAGE) == (ssize_t)PAGE, "pread: %s", strerror(errno));
		verify_page(s, o, k, buf, "by its descriptor");
	}
}

static void put(struct shop *s, struct object *o, size_t k, uint64_t *p)
{
	static __thread uint64_t buf[WORDS];
	uint64_t *to = p ? p : buf;

	o->gen[k] = ++s->gen % 23 ? s->gen : 0;
	for (uint64_t i = 0; i < WORDS; i++)
		to[i] = o->gen[k] ? word(s, o->gen[k], i) : 0;
	if (!p)
		check(pwrite(o->fd, buf, PAGE, k * PAGE) == (ssize_t)PAGE, "pwrite: %s", strerror(errno));
}

static void show(struct object *o, struct view *v, size_t first, size_t n)
{
	v->first = first;
	v->n = n;
	v->p = mmap(NULL, n * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, o->fd, first * PAGE);
	check(v->p != MAP_FAILED, "mmap of a memfd: %s", strerror(errno));
	v->readonly = false;
}

static void make(struct shop *s, struct object *o, uint64_t r)
{
	memset(o, 0, sizeof(*o));
	o->kind = r % KINDS;
	o->n = (r >> 8) % 4 == 0 ? 1 + (r >> 16) % 250 : 260 + (r >> 16) % (MOST - 260);
	o->fd = -1;
	if (o->kind == ANONYMOUS) {
		struct view *v = &o->views[0];

		v->n = o->n;
		v->p = mmap(NULL, v->n * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | (r >> 40 & 1 ? MAP_NORESERVE : 0), -1, 0);
		check(v->p != MAP_FAILED, "mmap: %s", strerror(errno));
	} else {
		o->fd = (int)must(memfd_create("shared", MFD_CLOEXEC | (r >> 41 & 1 ? MFD_ALLOW_SEALING : 0)));
		must(ftruncate(o->fd, o->n * PAGE));
		if (o->kind != FILE_ONLY)
			show(o, &o->views[0], 0, o->n);
		if (o->kind == NAMELESS) {
			must(close(o->fd));
			o->fd = -1;
		}
	}
	for (size_t k = 0; r >> 42 & 1 && k < o->n; k++)
		put(s, o, k, o->views[0].n ? o->views[0].p + k * WORDS : NULL);
}

static void hide(struct view *v)
{
	if (v->n)
		must(munmap(v->p, v->n * PAGE));
	v->n = 0;
}

static void end(struct object *o)
{
	for (int i = 0; i < VIEWS; i++)
		hide(&o->views[i]);
	if (o->fd >= 0)
		must(close(o->fd));
	o->n = 0;
}

/* punched notes a hole. */
static void punched(struct object *o, size_t from, size_t to)
{
	memset(o->gen + from, 0, (to - from) * sizeof(o->gen[0]));
}

static void step(struct shop *s)
{
	uint64_t r = rnd(&s->seed);
	struct object *o = &s->objects[r % OBJECTS];
	struct view *v;
	size_t from, to;

	if (!o->n) {
		make(s, o, r >> 8);
		return;
	}
	r = rnd(&s->seed);
	v = &o->views[r % VIEWS];
	from = (r >> 8) % o->n;
	to = from + 1 + (r >> 20) % (o->n - from);
	r = rnd(&s->seed);
	switch (r % 64) {
	case 0: /* punched out by the descriptor */
		if (o->fd >= 0) {
			must(fallocate(o->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, from * PAGE, (to - from) * PAGE));
			punched(o, from, to);
		}
		break;
	case 1: /* by a mapping */
		from = from > v->first ? from : v->first;
		to = to < v->first + shown(o, v) ? to : v->first + shown(o, v);
		if (v->n && !v->readonly && from < to) {
			must(madvise(v->p + (from - v->first) * WORDS, (to - from) * PAGE, MADV_REMOVE));
			punched(o, from, to);
		}
		break;
	case 2: /* out of the page tables: the object keeps it */
		if (v->n)
			must(madvise(v->p, v->n * PAGE, MADV_DONTNEED));
		break;
	case 3: /* cut, or longer */
		if (o->fd >= 0) {
			size_t n = r >> 20 & 1 ? 1 + from : 1 + (r >> 24) % MOST;

			must(ftruncate(o->fd, n * PAGE));
			if (n > o->n)
				punched(o, o->n, n);
			o->n = n;
		}
		break;
	case 4: /* mapped elsewhere */
		if (v->n && !v->readonly) {
			void *p = mremap(v->p, v->n * PAGE, v->n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
					 must(mmap(NULL, v->n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)));

			check(p != MAP_FAILED, "mremap of shared memory: %s", strerror(errno));
			v->p = p;
		}
		break;
	case 5: /* one mapping more, or another part of it */
	case 6:
		if (o->kind == OPEN) {
			hide(v);
			show(o, v, from, to - from);
		}
		break;
	case 7: /* one less */
		if (o->kind == OPEN)
			hide(v);
		break;
	case 8:
		if (v->n) {
			must(mprotect(v->p, v->n * PAGE, v->readonly ? PROT_READ | PROT_WRITE : PROT_READ));
			v->readonly = !v->readonly;
		}
		break;
	case 9:
		if ((r >> 8) % 8 == 0)
			end(o);
		break;
	case 10: /* cut and grown again at once */
		if (o->fd >= 0 && (r >> 8) % 2) {
			must(ftruncate(o->fd, from * PAGE));
			must(ftruncate(o->fd, o->n * PAGE));
			punched(o, from, o->n);
		}
		break;
	default:
		if (v->n && !v->readonly && shown(o, v)) {
			size_t k = (r >> 8) % shown(o, v);

			for (size_t n = 0; n < 6 && k + n < shown(o, v); n++)
				put(s, o, v->first + k + n, v->p + (k + n) * WORDS);
		} else if (o->fd >= 0) {
			put(s, o, from, NULL);
		}
	}
}

static void *body(void *arg)
{
	struct shop *s = arg;

	for (register uint64_t steps = 0; running(); tick()) {
		for (int i = 0; i < 8; i++) {
			step(s);
			s->steps++;
			steps++;
			check(s->steps == steps, "%lu steps were made, memory says %lu: it is stale", (unsigned long)steps, (unsigned long)s->steps);
		}
		if (steps % 800 == 0)
			for (int i = 0; i < OBJECTS; i++)
				verify(s, &s->objects[i], "all of it");
		sleep_us(1000);
	}
	return NULL;
}

static void at_last(void)
{
	for (int i = 0; i < n_shops; i++)
		for (int k = 0; k < OBJECTS; k++)
			verify(shops[i], &shops[i]->objects[k], "at the end");
}

void shared_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads > 16 ? 16 : opt.threads;

	for (int i = 0; i < n; i++) {
		struct shop *s = shops[n_shops++] = calloc(1, sizeof(*s));

		s->id = i + 1;
		s->seed = (uint64_t)now_ns(CLOCK_MONOTONIC) * (i + 1) | 1;
		printf("seed %lu\n", (unsigned long)s->seed);
		start_raw("shared", body, s);
	}
	at_end(at_last);
}
