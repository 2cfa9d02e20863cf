// A process that arrives without its memory: it registers a region with a
// userfaultfd, hands that out on descriptor 3, and then uses the region as a
// program would whose content is known page by page.
//
//	arrival MODE PAGES THREADS SEED
//
// Page i of the region is zero where i%7 == 3 or i%11 == 5 (the latter are not
// known to the source at all), else word k of it is mix(i*512+k).
//
// touch: threads read random pages and verify them.
// churn: threads read, write, drop, move, grow, shrink, unmap and fork, and
// verify what they find against a model, in the forked children as well.
//
// shared: the region is shared memory; one thread finds that MADV_DONTNEED keeps
// its content, MADV_REMOVE does not, and a second mapping has the same.
//
// guard: in each 8 pages two get guards (MADV_GUARD_INSTALL) while they are
// missing; they must raise SIGSEGV when all others have come, and be zero when the
// guards are taken away. A thread touches page 2 first and waits for it. Tells on
// descriptor 3 when all guards are there.
//
// It begins after a byte on descriptor 3, ends after the next one, verifies
// everything once more and says so in its exit status.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define WORDS 512
#define BASE 0x200000000000UL
#define CHUNK 32 // pages
#define MAXCHUNK 64

static volatile int stop;
static long pages;
static int threads;

static uint64_t mix(uint64_t x) {
	x += 0x9e3779b97f4a7c15UL;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9UL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebUL;
	return x ^ (x >> 31);
}

static void die(const char *what) {
	printf("%s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(2);
}

// What a page should hold: a page of the source, or a value in every word.
struct state {
	int64_t src; // -1: value
	uint64_t value;
};

static int verify(const volatile uint64_t *p, struct state s, const char *where, void *base) {
	int zero = s.src >= 0 && (s.src % 7 == 3 || s.src % 11 == 5);
	for (int k = 0; k < WORDS; k++) {
		uint64_t want = s.src < 0 ? s.value : zero ? 0 : mix(s.src * WORDS + k);
		uint64_t got = p[k];
		if (got != want) {
			char text[300];
			int n = snprintf(text, sizeof text, "WRONG in %s, pid %d: %p (of %p) word %d is %lx, should be %lx (source page %ld)\n",
				where, (int)getpid(), (void *)p, base, k, got, want, (long)s.src);
			if (write(1, text, n) < 0) _exit(4);
			return 0;
		}
	}
	return 1;
}

struct chunk {
	char *addr; // NULL: unmapped
	int n;
	struct state s[MAXCHUNK];
};

struct self {
	pthread_t th;
	uint64_t rng;
	struct chunk *c;
	int chunks;
	long first, count; // pages of touch
	uint64_t ops[8];
	uint64_t hits, misses, sum, max; // of touch, ns
};

static uint64_t rnd(struct self *t) { return t->rng = mix(t->rng); }

static int verify_chunks(struct self *t, const char *where) {
	for (int i = 0; i < t->chunks; i++)
		for (int k = 0; k < t->c[i].n && t->c[i].addr; k++)
			if (!verify((uint64_t *)(t->c[i].addr + k * PAGE), t->c[i].s[k], where, t->c[i].addr)) return 0;
	return 1;
}

static void churn_once(struct self *t) {
	struct chunk *c = &t->c[rnd(t) % t->chunks];
	if (!c->addr) return;
	int k = rnd(t) % c->n, len = 1 + rnd(t) % 8;
	if (k + len > c->n) len = c->n - k;
	switch (rnd(t) % 40) {
	default:
		if (!verify((uint64_t *)(c->addr + k * PAGE), c->s[k], "read", c->addr)) _exit(3);
		t->ops[0]++;
		break;
	case 0 ... 5: {
		uint64_t v = rnd(t) | 1;
		for (int w = 0; w < WORDS; w++) ((volatile uint64_t *)(c->addr + k * PAGE))[w] = v;
		c->s[k] = (struct state){-1, v};
		t->ops[1]++;
		break;
	}
	case 6 ... 11:
		if (madvise(c->addr + k * PAGE, len * PAGE, MADV_DONTNEED)) die("madvise");
		for (int i = k; i < k + len; i++) c->s[i] = (struct state){-1, 0};
		t->ops[2]++;
		break;
	case 12 ... 14: { // grow, in place or elsewhere as the kernel likes
		if (c->n + len > MAXCHUNK) break;
		char *p = mremap(c->addr, c->n * PAGE, (c->n + len) * PAGE, MREMAP_MAYMOVE);
		if (p == MAP_FAILED) { if (errno == EFAULT) break; die("mremap grow"); }
		c->addr = p;
		for (int i = 0; i < len; i++) c->s[c->n++] = (struct state){-1, 0};
		t->ops[3]++;
		break;
	}
	case 15 ... 16: { // shrink
		if (c->n - len < 4) break;
		char *p = mremap(c->addr, c->n * PAGE, (c->n - len) * PAGE, 0);
		if (p == MAP_FAILED) { if (errno == EFAULT) break; die("mremap shrink"); }
		c->n -= len;
		t->ops[4]++;
		break;
	}
	case 17 ... 18: { // move to a place of its own
		char *at = mmap(NULL, c->n * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
		if (at == MAP_FAILED) die("mmap");
		char *p = mremap(c->addr, c->n * PAGE, c->n * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at);
		if (p == MAP_FAILED) {
			if (errno != EFAULT) die("mremap fixed");
			// It is several mappings just now. Since Linux 6.17 the first of them may have
			// moved nevertheless (remap_move, mm/mremap.c), and at be somebody else's by
			// now: nothing is known about it.
			c->addr = NULL;
			break;
		}
		c->addr = p;
		t->ops[5]++;
		break;
	}
	case 19:
		if (rnd(t) % 8) break;
		if (munmap(c->addr, c->n * PAGE)) die("munmap");
		c->addr = NULL;
		t->ops[6]++;
		break;
	case 20: {
		if (rnd(t) % 4) break;
		pid_t pid = fork();
		if (pid < 0) die("fork");
		if (pid == 0) _exit(verify_chunks(t, "child") ? 0 : 3);
		int st;
		if (waitpid(pid, &st, 0) != pid) die("waitpid");
		if (st != 0) { printf("child %d ended with %x\n", pid, st); fflush(stdout); _exit(3); }
		t->ops[7]++;
		break;
	}
	}
}

static void *churn(void *arg) {
	struct self *t = arg;
	while (!stop) churn_once(t);
	return NULL;
}

static void *touch(void *arg) {
	struct self *t = arg;
	while (!stop) {
		long i = t->first + rnd(t) % t->count;
		struct timespec a, b;
		clock_gettime(CLOCK_MONOTONIC, &a);
		(void)*(volatile uint64_t *)(BASE + i * PAGE);
		clock_gettime(CLOCK_MONOTONIC, &b);
		uint64_t ns = (b.tv_sec - a.tv_sec) * 1000000000UL + b.tv_nsec - a.tv_nsec;
		if (ns < 3000) t->hits++;
		else {
			t->misses++, t->sum += ns;
			if (ns > t->max) t->max = ns;
		}
		if (!verify((uint64_t *)(BASE + i * PAGE), (struct state){i, 0}, "touch", (void *)BASE)) _exit(3);
	}
	return NULL;
}

static void *shared(void *arg) {
	struct self *t = arg;
	for (long i = 0; i + 8 <= pages && !stop; i += 8) {
		char *p = (char *)BASE + i * PAGE;
		if (madvise(p, 2 * PAGE, MADV_DONTNEED)) die("MADV_DONTNEED");
		if (madvise(p + 2 * PAGE, 2 * PAGE, MADV_REMOVE)) die("MADV_REMOVE");
		char *q = mremap(p + 4 * PAGE, 0, 4 * PAGE, MREMAP_MAYMOVE);
		if (q == MAP_FAILED) die("mremap alias");
		for (int k = 0; k < 8; k++) {
			struct state s = {i + k, 0};
			if (k == 2 || k == 3) s.src = -1;
			char *at = k < 4 || k % 2 ? p + k * PAGE : q + (k - 4) * PAGE; // some through the one first, some through the other
			if (!verify((uint64_t *)at, s, "shared", p)) _exit(3);
			if (k >= 4 && !verify((uint64_t *)(q + (k - 4) * PAGE), s, "alias", q)) _exit(3);
		}
		if (munmap(q, 4 * PAGE)) die("munmap alias");
		for (int k = 0; k < 8; k++)
			if (k != 2 && k != 3 && !verify((uint64_t *)(p + k * PAGE), (struct state){i + k, 0}, "after the alias", p)) _exit(3);
		t->ops[0] = i + 8;
	}
	return NULL;
}

static __thread sigjmp_buf fell;

static void segv(int sig) { siglongjmp(fell, sig); }

// faults: reading at p raises SIGSEGV.
static int faults(volatile char *p) {
	if (sigsetjmp(fell, 1)) return 1;
	(void)*p;
	return 0;
}

static void *waits(void *arg) { return faults(arg) ? "SIGSEGV" : "a page"; }

static void guards(char step(void)) {
	pthread_t th;
	void *got;
	signal(SIGSEGV, segv);
	if (pthread_create(&th, NULL, waits, (void *)(BASE + 2 * PAGE))) die("pthread_create");
	step(); // it waits
	for (long i = 0; i + 8 <= pages; i += 8)
		if (madvise((char *)BASE + (i + 2) * PAGE, 2 * PAGE, 102)) die("MADV_GUARD_INSTALL");
	if (write(3, "g", 1) != 1) die("write");
	step(); // all has come
	pthread_join(th, &got);
	if (strcmp(got, "SIGSEGV")) { printf("the thread that waited for a page found %s\n", (char *)got); exit(3); }
	for (long i = 0; i < pages; i++) {
		char *p = (char *)BASE + i * PAGE;
		if (i % 8 != 2 && i % 8 != 3) {
			if (!verify((uint64_t *)p, (struct state){i, 0}, "beside a guard", p)) exit(3);
			continue;
		}
		if (!faults(p)) { printf("guard of page %ld is lost\n", i); exit(3); }
		if (i % 16 < 8) continue;
		if (madvise(p, PAGE, 103)) die("MADV_GUARD_REMOVE");
		if (!verify((uint64_t *)p, (struct state){-1, 0}, "where a guard was", p)) exit(3);
	}
	if (write(3, "r", 1) != 1) die("write");
	step(); // nothing is trapped any more
	for (long i = 2; i + 5 < pages; i += 16) {
		char *p = (char *)BASE + i * PAGE;
		if (!faults(p)) { printf("guard of page %ld is lost in the end\n", i); exit(3); }
		if (madvise(p, PAGE, 103)) die("MADV_GUARD_REMOVE");
		if (!verify((uint64_t *)p, (struct state){-1, 0}, "where a guard was, in the end", p)) exit(3);
	}
	printf("verified\n");
}

static char step(void) {
	char c;
	if (read(3, &c, 1) != 1) _exit(2);
	return c;
}

static void send_fd(int fd) {
	char c = 'u', buf[CMSG_SPACE(sizeof fd)] = {0};
	struct iovec iov = {&c, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = buf, .msg_controllen = sizeof buf};
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	h->cmsg_level = SOL_SOCKET, h->cmsg_type = SCM_RIGHTS, h->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(h), &fd, sizeof fd);
	if (sendmsg(3, &m, 0) != 1) die("sendmsg");
	close(fd);
}

int main(int argc, char **argv) {
	if (argc != 5) return 2;
	pages = atol(argv[2]), threads = atoi(argv[3]);
	uint64_t seed = strtoull(argv[4], NULL, 10);
	int sharing = !strcmp(argv[1], "shared");
	char *base = mmap((void *)BASE, pages * PAGE, PROT_READ | PROT_WRITE,
		(sharing ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE | MAP_NORESERVE, -1, 0);
	if (base != (char *)BASE) die("mmap");
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0) die("userfaultfd");
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
		UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP};
	if (ioctl(fd, UFFDIO_API, &api)) die("UFFDIO_API");
	struct uffdio_register reg = {.range = {BASE, pages * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
	if (ioctl(fd, UFFDIO_REGISTER, &reg)) die("UFFDIO_REGISTER");
	struct self *t = calloc(threads, sizeof *t);
	int churning = !strcmp(argv[1], "churn");
	long per = pages / threads;
	for (int i = 0; i < threads; i++) {
		t[i].rng = mix(seed + i);
		t[i].first = 0, t[i].count = pages;
		t[i].chunks = churning ? per / CHUNK : 0;
		t[i].c = calloc(t[i].chunks, sizeof *t[i].c);
		for (int k = 0; k < t[i].chunks; k++) {
			long first = i * per + k * CHUNK;
			t[i].c[k].addr = base + first * PAGE, t[i].c[k].n = CHUNK;
			for (int p = 0; p < CHUNK; p++) t[i].c[k].s[p].src = first + p;
		}
	}
	send_fd(fd);
	char c;
	if (read(3, &c, 1) != 1) return 2;
	if (!strcmp(argv[1], "guard")) {
		guards(step);
		return 0;
	}
	for (int i = 0; i < threads; i++)
		if (pthread_create(&t[i].th, NULL, churning ? churn : sharing ? shared : touch, &t[i])) die("pthread_create");
	if (read(3, &c, 1) != 1) return 2;
	stop = 1;
	uint64_t ops[8] = {0}, hits = 0, misses = 0, sum = 0, max = 0;
	for (int i = 0; i < threads; i++) {
		pthread_join(t[i].th, NULL);
		for (int k = 0; k < 8; k++) ops[k] += t[i].ops[k];
		hits += t[i].hits, misses += t[i].misses, sum += t[i].sum;
		if (t[i].max > max) max = t[i].max;
	}
	if (sharing) {
		printf("%lu pages shared\n", ops[0]);
	} else if (churning) {
		for (int i = 0; i < threads; i++)
			if (!verify_chunks(&t[i], "end")) return 3;
		printf("read %lu write %lu drop %lu grow %lu shrink %lu move %lu unmap %lu fork %lu\n",
			ops[0], ops[1], ops[2], ops[3], ops[4], ops[5], ops[6], ops[7]);
	} else {
		for (long i = 0; i < pages; i++)
			if (!verify((uint64_t *)(BASE + i * PAGE), (struct state){i, 0}, "end", base)) return 3;
		printf("hits %lu misses %lu mean_us %.1f max_us %.1f\n", hits, misses, misses ? sum / 1e3 / misses : 0, max / 1e3);
	}
	printf("verified\n");
	return 0;
}
