/*
 * A program whose memory is what arrives by way of a file: private mappings of a
 * file, behind each of them a shadow of anonymous memory with the same content. It
 * writes, protects, gives up, moves and guards pages of the mappings all the time,
 * forks, and checks all that it knows, while somebody puts the shadows in the place
 * of the mappings.
 *
 *   veiled FILE regions pages threads [no-fork] [no-give] [quiet] [uffd]
 *
 * (no-give: content is never given up, quiet: most of the time it sleeps, uffd: it opens a userfaultfd).
 *
 * It prints "region V S OFFSET BYTES" for each and "gone ADDRESS" of the bytes, one
 * for each page of each region, that are not 0 where the program gave the content
 * up. SIGUSR1: from now on such a page must be zero, and not what the file has.
 * SIGTERM: check everything and end.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define P 4096
#define GUARD_INSTALL 102
#define GUARD_REMOVE 103

static long regions, pages, threads;
static int do_fork = 1, give = 1, quiet, uffd, guards = 1;
static volatile sig_atomic_t strict, end;
static unsigned char *gone; /* [regions][pages] */
static _Atomic unsigned long beats;
static int probe[2];

struct region {
	char *v;
	uint32_t *version; /* 0: as it came */
	unsigned char *lost; /* unmapped for good */
};
static struct region *reg;

static void fail(const char *what, long i, long p, long got)
{
	printf("FAIL %s: region %ld page %ld at %p: %lx, version %u, gone %d\n", what, i, p, (void *)(reg[i].v + p * P), got,
	       reg[i].version[p], gone[i * pages + p]);
	fflush(stdout);
	_exit(1);
}

static uint64_t mix(uint64_t x)
{
	x ^= x >> 30;
	x *= 0xbf58476d1ce4e5b9ull;
	x ^= x >> 27;
	x *= 0x94d049bb133111ebull;
	return x ^ x >> 31;
}

/* What a page holds as it came: one in seven is zero. */
static uint64_t content(long i, long p, uint32_t version)
{
	if (version == 0 && p % 7 == 3)
		return 0;
	return mix(((uint64_t)i << 40) + ((uint64_t)p << 20) + version + 1);
}

static void put(char *at, uint64_t w)
{
	uint64_t *q = (uint64_t *)at;
	for (int k = 0; k < P / 8; k++)
		q[k] = w ? w + k : 0;
}

static int holds(const char *at, uint64_t w)
{
	const uint64_t *q = (const uint64_t *)at;
	for (int k = 0; k < P / 8; k++)
		if (q[k] != (w ? w + k : 0))
			return 0;
	return 1;
}

static int known(long i, long p) { return !reg[i].lost[p]; }

static void check(long i, long p, const char *at)
{
	struct region *r = &reg[i];
	if (r->version[p] == 0 && gone[i * pages + p]) {
		/* It may become zero while it is looked at, not the other way round. */
		if (holds(at, 0) || (!strict && holds(at, content(i, p, 0))) || holds(at, 0))
			return;
	} else if (holds(at, content(i, p, r->version[p])))
		return;
	fail("content", i, p, *(const uint64_t *)at);
}

static void must(int ok, const char *what, long i, long p)
{
	if (!ok)
		fail(what, i, p, errno);
}

static char *at(long i, long p) { return reg[i].v + p * P; }

static void forget(long i, long p)
{
	gone[i * pages + p] = 1;
	reg[i].version[p] = 0;
}

/* Moves n pages of region i away and back again. */
static void wander(long i, long p, long n)
{
	static __thread char *to;
	long k;
	int lost = 0;
	if (!to)
		to = mmap(0, 8 * P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(to != MAP_FAILED, "mmap", i, p);
	for (k = 0; k < n; k++) { /* one by one: together they may be several mappings */
		if (!known(i, p + k))
			continue;
		must(mremap(at(i, p + k), P, P, MREMAP_MAYMOVE | MREMAP_FIXED, to + k * P) != MAP_FAILED, "mremap", i, p + k);
		check(i, p + k, to + k * P);
		if (beats % 3 == 0) {
			reg[i].version[p + k]++;
			put(to + k * P, content(i, p + k, reg[i].version[p + k]));
		}
	}
	for (k = 0; k < n; k++) {
		if (!known(i, p + k))
			continue;
		must(mremap(to + k * P, P, P, MREMAP_MAYMOVE | MREMAP_FIXED, at(i, p + k)) != MAP_FAILED, "mremap back", i, p + k);
		check(i, p + k, at(i, p + k));
		/* Nobody else's mapping comes into the hole, or only one that stays whole. */
		if (mmap(to + k * P, P, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
			lost = 1;
	}
	if (lost)
		to = 0;
}

static void step(long i, uint64_t rnd, long tid)
{
	long p = rnd % pages, n = 1 + (rnd >> 20) % 8, k;
	int op = (rnd >> 32) % 1000;
	if (p + n > pages)
		n = pages - p;
	if (op < 400) {
		for (k = p; k < p + n; k++)
			if (known(i, k)) {
				reg[i].version[k]++;
				put(at(i, k), content(i, k, reg[i].version[k]));
			}
	} else if (op < 800 || quiet) {
		for (k = p; k < p + n; k++)
			if (known(i, k))
				check(i, k, at(i, k));
	} else if (op < 860) {
		if (!give || !known(i, p))
			return;
		forget(i, p);
		must(madvise(at(i, p), P, MADV_DONTNEED) == 0, "dontneed", i, p);
		check(i, p, at(i, p));
	} else if (op < 920) {
		for (k = p; k < p + n; k++)
			if (!known(i, k))
				return;
		must(mprotect(at(i, p), n * P, op & 1 ? PROT_READ : PROT_NONE) == 0, "mprotect", i, p);
		for (k = p; k < p + n; k++) {
			errno = 0;
			if (op & 1)
				check(i, k, at(i, k));
			else
				must(read(probe[0], at(i, k), 1) < 0 && errno == EFAULT, "PROT_NONE", i, k);
		}
		must(mprotect(at(i, p), n * P, PROT_READ | PROT_WRITE) == 0, "mprotect", i, p);
	} else if (op < 960) {
		wander(i, p, n);
	} else if (op < 990) {
		if (!give || !guards || !known(i, p))
			return;
		forget(i, p);
		if (madvise(at(i, p), P, GUARD_INSTALL) != 0) {
			guards = 0;
			return;
		}
		for (k = 0; k < 200; k++) {
			errno = 0;
			must(read(probe[0], at(i, p), 1) < 0 && errno == EFAULT, "guard", i, p);
		}
		must(madvise(at(i, p), P, GUARD_REMOVE) == 0, "guard remove", i, p);
		check(i, p, at(i, p));
	} else if (op < 992) {
		if (p % 50 != 0 || !known(i, p))
			return;
		reg[i].lost[p] = 1;
		must(munmap(at(i, p), P) == 0, "munmap", i, p);
	} else if (do_fork && op < 994 && tid == 0) {
		pid_t c = fork();
		int st;
		if (c == 0) {
			for (k = 0; k < pages; k++)
				if (known(i, k))
					check(i, k, at(i, k));
			for (k = 0; k < pages; k++)
				if (known(i, k) && k % 3 == 0) {
					reg[i].version[k]++;
					put(at(i, k), content(i, k, reg[i].version[k]));
				}
			for (k = 0; k < pages; k++)
				if (known(i, k))
					check(i, k, at(i, k));
			_exit(0);
		}
		must(c > 0 && waitpid(c, &st, 0) == c && st == 0, "child", i, p);
	}
}

static void *run(void *arg)
{
	long tid = (long)arg, i;
	uint64_t rnd = tid + 1;
	unsigned char b;
	while (!end) {
		for (i = tid; i < regions; i += threads) {
			rnd = mix(rnd + 0x9e3779b97f4a7c15ull);
			step(i, rnd, tid);
		}
		beats++;
		if (quiet)
			usleep(1000);
	}
	(void)b;
	return 0;
}

static void on(int sig)
{
	if (sig == SIGUSR1)
		strict = 1;
	else
		end = 1;
}

int main(int argc, char **argv)
{
	long i, p;
	int fd;
	if (argc < 5)
		return 2;
	regions = atol(argv[2]);
	pages = atol(argv[3]);
	threads = atol(argv[4]);
	for (i = 5; i < argc; i++) {
		do_fork &= strcmp(argv[i], "no-fork") != 0;
		give &= strcmp(argv[i], "no-give") != 0;
		uffd |= strcmp(argv[i], "uffd") == 0;
		quiet |= strcmp(argv[i], "quiet") == 0;
	}
	/* Nothing ever comes through: who reads into bad memory gets EFAULT, once there is a byte. */
	if (pipe(probe) || write(probe[1], "x", 1) != 1)
		return 2;
	signal(SIGUSR1, on);
	signal(SIGTERM, on);
	fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (fd < 0 || ftruncate(fd, regions * pages * P))
		return 2;
	reg = calloc(regions, sizeof *reg);
	gone = mmap(0, regions * pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *file = mmap(0, regions * pages * P, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	for (i = 0; i < regions; i++) {
		/* Each at a place of its own, and apart from the next. */
		char *s = mmap(0, (pages + 1) * P, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		munmap(s + pages * P, P);
		for (p = 0; p < pages; p++)
			if (content(i, p, 0)) {
				put(s + p * P, content(i, p, 0));
				put(file + (i * pages + p) * P, content(i, p, 0));
			}
		reg[i].v = mmap(0, (pages + 1) * P, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, i * pages * P);
		munmap(reg[i].v + pages * P, P);
		reg[i].version = calloc(pages, 4);
		reg[i].lost = calloc(pages, 1);
		if (reg[i].v == MAP_FAILED || s == MAP_FAILED)
			return 2;
		printf("region %lx %lx %lx %lx\n", (long)reg[i].v, (long)s, i * pages * P, pages * P);
	}
	munmap(file, regions * pages * P);
	close(fd);
	printf("gone %lx\n", (long)gone);
	if (uffd)
		printf("uffd %ld\n", syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	printf("ready\n");
	fflush(stdout);
	pthread_t t[threads];
	for (i = 1; i < threads; i++)
		pthread_create(&t[i], 0, run, (void *)i);
	run(0);
	for (i = 1; i < threads; i++)
		pthread_join(t[i], 0);
	for (i = 0; i < regions; i++)
		for (p = 0; p < pages; p++)
			if (known(i, p))
				check(i, p, at(i, p));
	printf("ok %lu\n", (unsigned long)beats);
	return 0;
}
