/* Memory: every kind of mapping keeps its content, its protection, its sharing. */
#include "everything.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define PAGE 4096UL
#define pages(n) ((n) * PAGE)

static void *map(size_t len, int prot, int flags, int fd)
{
	void *p = mmap(NULL, len, prot, flags, fd, 0);

	check(p != MAP_FAILED, "mmap of %zu bytes: %s", len, strerror(errno));
	return p;
}

/* The pattern of page n in its generation g: every word follows from both, and
 * one in four pages is zeros. */
static uint64_t word(uint64_t n, uint64_t g, uint64_t i)
{
	if ((n + g) % 4 == 0)
		return 0;
	return (n * 0x9e3779b97f4a7c15ULL) ^ (g << 32) ^ i;
}

static void put_page(uint64_t *p, uint64_t n, uint64_t g)
{
	for (uint64_t i = 0; i < PAGE / 8; i++)
		p[i] = word(n, g, i);
}

static void check_page(const uint64_t *p, uint64_t n, uint64_t g, const char *what)
{
	for (uint64_t i = 0; i < PAGE / 8; i++)
		check(p[i] == word(n, g, i), "%s: page %lu at %p, word %lu is %#lx, not %#lx (generation %lu)", what,
		      (unsigned long)n, (void *)p, (unsigned long)i, (unsigned long)p[i], (unsigned long)word(n, g, i),
		      (unsigned long)g);
}

/* The bulk: rewritten and verified at random places. */
static uint64_t *bulk;
static uint32_t *generation;
static uint64_t bulk_pages;

static void churn(void *arg)
{
	static uint64_t seed = 0x123456789abcdefULL;

	(void)arg;
	for (int i = 0; i < 8; i++) {
		uint64_t n = rnd(&seed) % bulk_pages;

		check_page(bulk + n * PAGE / 8, n, generation[n], "bulk memory");
		if (i % 2)
			put_page(bulk + n * PAGE / 8, n, ++generation[n]);
	}
	sleep_us(2000);
}

static void all_of_it(void)
{
	for (uint64_t n = 0; n < bulk_pages; n++)
		check_page(bulk + n * PAGE / 8, n, generation[n], "bulk memory at the end");
}

/* Guard pages: what must fault, faults. */
static __thread sigjmp_buf escape;
static __thread volatile sig_atomic_t guarded;

static void on_segv(int sig, siginfo_t *si, void *ctx)
{
	(void)ctx;
	if (!guarded)
		bad("signal %d at address %p", sig, si->si_addr);
	siglongjmp(escape, 1);
}

static bool faults(volatile char *p, bool write)
{
	if (sigsetjmp(escape, 1)) {
		guarded = 0;
		return true;
	}
	guarded = 1;
	if (write)
		*p = *p;
	else
		(void)*p;
	guarded = 0;
	return false;
}

static void *guards(void *arg)
{
	struct sigaction sa = { .sa_sigaction = on_segv, .sa_flags = SA_SIGINFO };
	char *none = map(pages(3), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	char *ro = map(pages(1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	sigset_t s;

	(void)arg;
	sigemptyset(&s);
	sigaddset(&s, SIGSEGV);
	must(sigaction(SIGSEGV, &sa, NULL));
	pthread_sigmask(SIG_UNBLOCK, &s, NULL);
	put_page((uint64_t *)ro, 1, 1);
	put_page((uint64_t *)(none + PAGE), 2, 3);
	must(mprotect(ro, PAGE, PROT_READ));
	must(mprotect(none, pages(3), PROT_NONE));
	while (running()) {
		check(faults(none, false) && faults(none + pages(2), true), "a guard page guards no more");
		check(!faults(ro, false) && faults(ro, true), "a read-only page is not read-only");
		check_page((uint64_t *)ro, 1, 1, "read-only page");
		must(mprotect(none + PAGE, PAGE, PROT_READ));
		check_page((uint64_t *)(none + PAGE), 2, 3, "page that was behind PROT_NONE");
		must(mprotect(none + PAGE, PAGE, PROT_NONE));
		sleep_us(5000);
		tick();
	}
	return NULL;
}

/* mremap, munmap, DONTNEED, growth: content goes where it should, and what was
 * given up is zeros. */
static void remap(void *arg)
{
	static uint64_t round;
	size_t n = 8 + round % 8;
	char *p = map(pages(n), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	(void)arg;
	round++;
	for (size_t i = 0; i < n; i++)
		put_page((uint64_t *)(p + pages(i)), i, round);
	sleep_us(1000);
	must(madvise(p + pages(2), pages(2), MADV_DONTNEED));
	p = mremap(p, pages(n), pages(2 * n), MREMAP_MAYMOVE);
	check(p != MAP_FAILED, "mremap: %s", strerror(errno));
	sleep_us(1000);
	for (size_t i = 0; i < n; i++)
		if (i != 2 && i != 3)
			check_page((uint64_t *)(p + pages(i)), i, round, "after mremap");
	for (size_t i = 0; i < PAGE / 8; i++)
		check(((uint64_t *)(p + pages(2)))[i] == 0 && ((uint64_t *)(p + pages(3)))[i] == 0 && ((uint64_t *)(p + pages(n)))[i] == 0,
		      "memory that was given up, or is new, is not zero");
	must(munmap(p, pages(n)));
	check_page((uint64_t *)(p + pages(2 * n - 1)), 0, 0, "new memory after mremap");
	must(munmap(p + pages(n), pages(n)));
}

/* One memory at two places: memfd, shared anonymous, a shared file. */
static void shared(void *arg)
{
	static uint64_t *a, *b, *anon, *file, g;
	static int fd, ffd;
	char path[300];

	(void)arg;
	if (!a) {
		fd = (int)must(memfd_create("everything", MFD_CLOEXEC));
		must(ftruncate(fd, pages(8)));
		a = map(pages(8), PROT_READ | PROT_WRITE, MAP_SHARED, fd);
		b = map(pages(8), PROT_READ, MAP_SHARED, fd);
		anon = map(pages(4), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
		snprintf(path, sizeof(path), "%s/shared.%s", opt.dir, opt.identity);
		ffd = (int)must(open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
		must(ftruncate(ffd, pages(2)));
		file = map(pages(2), PROT_READ | PROT_WRITE, MAP_SHARED, ffd);
	}
	g++;
	for (int i = 0; i < 8; i++)
		put_page(a + i * PAGE / 8, i, g);
	put_page(anon + PAGE / 8, 9, g);
	put_page(file, 11, g);
	sleep_us(3000);
	for (int i = 0; i < 8; i++) {
		uint64_t copy[PAGE / 8];

		check_page(b + i * PAGE / 8, i, g, "second mapping of a memfd");
		check(pread(fd, copy, PAGE, pages(i)) == (ssize_t)PAGE, "pread of a memfd: %s", strerror(errno));
		check_page(copy, i, g, "memfd read as a file");
	}
	check_page(anon + PAGE / 8, 9, g, "shared anonymous memory");
	check_page(file, 11, g, "shared file mapping");
	uint64_t copy[PAGE / 8];
	check(pread(ffd, copy, PAGE, 0) == (ssize_t)PAGE, "pread of a mapped file: %s", strerror(errno));
	check_page(copy, 11, g, "mapped file read as a file");
}

static void remove_shared(void)
{
	char path[300];

	snprintf(path, sizeof(path), "%s/shared.%s", opt.dir, opt.identity);
	unlink(path);
}

/* A private file mapping: its own copies stay its own, the rest is the file's. */
static uint64_t *private;
static char private_path[300];

static void copied(void *arg)
{
	static uint64_t g = 1;

	(void)arg;
	if (!private) {
		int fd;
		uint64_t page[PAGE / 8];

		snprintf(private_path, sizeof(private_path), "%s/private.%s", opt.dir, opt.identity);
		fd = (int)must(open(private_path, O_RDWR | O_CREAT | O_CLOEXEC, 0600));
		for (int i = 0; i < 8; i++) {
			put_page(page, i, 100);
			check(write(fd, page, PAGE) == (ssize_t)PAGE, "write: %s", strerror(errno));
		}
		private = map(pages(8), PROT_READ | PROT_WRITE, MAP_PRIVATE, fd);
		close(fd);
	}
	put_page(private + PAGE / 8, 1, ++g);
	sleep_us(4000);
	check_page(private + PAGE / 8, 1, g, "own copy of a file's page");
	for (int i = 2; i < 8; i++)
		check_page(private + i * PAGE / 8, i, 100, "private mapping of a file");
}

static void remove_private(void)
{
	unlink(private_path);
}

/* Deep stacks: recursion into pages that were never touched. */
static __attribute__((noinline)) uint64_t recurse(int depth, uint64_t seed)
{
	volatile uint64_t frame[64];

	for (int i = 0; i < 64; i++)
		frame[i] = seed + i * depth;
	if (depth % 256 == 0)
		sleep_us(200);
	uint64_t below = depth > 0 ? recurse(depth - 1, seed + 1) : 0;
	for (int i = 0; i < 64; i++)
		check(frame[i] == seed + i * depth, "a stack frame changed at depth %d", depth);
	return below + 1;
}

static void deep(void *arg)
{
	static uint64_t seed = 77;
	int depth = (int)(rnd(&seed) % 6000);

	(void)arg;
	check(recurse(depth, seed) == (uint64_t)depth + 1, "recursion came back wrong");
	sleep_us(3000);
}

/* The allocator, arenas and brk. */
static void allocate(void *arg)
{
	static struct {
		unsigned char *p;
		size_t n;
		unsigned char c;
	} held[64];
	static uint64_t seed = 99;
	uint64_t r = rnd(&seed);
	int i = r % 64;

	(void)arg;
	for (size_t k = 0; k < held[i].n; k++)
		check(held[i].p[k] == held[i].c, "allocated memory changed");
	free(held[i].p);
	held[i].n = r >> 10 & (r & 64 ? 0xfff : 0x3ffff);
	held[i].c = r >> 40;
	held[i].p = malloc(held[i].n + 1);
	memset(held[i].p, held[i].c, held[i].n);
	if (r % 32 == 0) { /* brk itself moves, which malloc copes with */
		must(sbrk(PAGE));
	}
	sleep_us(2000);
}

/* Code that was made at run time; locked memory. */
static void jit(void *arg)
{
	static unsigned char *code;
	static uint32_t n;
	int got;

	(void)arg;
	if (!code) {
		code = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		(void)!mlock(code, PAGE);
	} else {
		got = ((int (*)(void))code)();
		check(got == (int)n, "generated code returned %d, not %u", got, n);
	}
	must(mprotect(code, PAGE, PROT_READ | PROT_WRITE));
	n++;
	code[0] = 0xb8; /* mov $n, %eax; ret */
	memcpy(code + 1, &n, 4);
	code[5] = 0xc3;
	must(mprotect(code, PAGE, PROT_READ | PROT_EXEC));
	sleep_us(6000);
}

void memory_start(void)
{
	bulk_pages = opt.mem_mib << 20 >> 12;
	if (bulk_pages > 0) {
		bulk = map(pages(bulk_pages), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		generation = calloc(bulk_pages, sizeof(*generation));
		for (uint64_t n = 0; n < bulk_pages; n++)
			if ((n + generation[n]) % 4) /* zeros stay untouched */
				put_page(bulk + n * PAGE / 8, n, 0);
		start("bulk", churn, NULL);
		at_end(all_of_it);
	}
	start_raw("guards", guards, NULL);
	start("remap", remap, NULL);
	start("shared", shared, NULL);
	at_end(remove_shared);
	start("private", copied, NULL);
	at_end(remove_private);
	if (has("growth"))
		start("deep", deep, NULL);
	start("malloc", allocate, NULL);
	start("jit", jit, NULL);
}
