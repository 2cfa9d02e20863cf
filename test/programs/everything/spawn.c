/*
 * Spawn: a process that shares this one's memory for a while (vfork(2), as posix_spawn and
 * Go's os/exec make one), beside threads that write, give up and verify theirs all the
 * time. Whoever goes through processes one by one meets this memory twice. A process with
 * children does not move, so there is one only while a file shows the memory.
 */
#include "everything.h"

#include <sys/mman.h>
#include <sys/wait.h>

#define PAGE 4096UL
#define PAGES 512

struct memory {
	uint64_t *p, seed, count[PAGES]; /* what the first word of a page must be */
};

static void body(void *arg)
{
	struct memory *m = arg;

	for (int i = 0; i < 64; i++) {
		uint64_t r = rnd(&m->seed);
		size_t k = r % PAGES;
		uint64_t *p = m->p + k * PAGE / 8;

		check(*p == m->count[k], "page %zu at %p is %#lx, not %#lx: %s", k, (void *)p, (unsigned long)*p,
		      (unsigned long)m->count[k], m->count[k] ? "it is lost or stale" : "old bytes came back");
		if (r >> 60 == 0) {
			must(madvise(p, PAGE, MADV_DONTNEED));
			m->count[k] = 0;
			check(*p == 0, "page %zu at %p is %#lx after MADV_DONTNEED", k, (void *)p, (unsigned long)*p);
		} else {
			*p = ++m->count[k];
		}
	}
	sleep_us(500);
}

static struct memory *all[4];

/* shown reports whether the mapping at p is one of a file. */
static bool shown(void *p)
{
	char line[512];
	FILE *f = fopen("/proc/self/maps", "re");
	unsigned long start, end, ino;
	bool is = false;

	check(f, "/proc/self/maps: %s", strerror(errno));
	while (!is && fgets(line, sizeof(line), f))
		is = sscanf(line, "%lx-%lx %*s %*s %*s %lu", &start, &end, &ino) == 3 && ino != 0 && (unsigned long)p >= start &&
		     (unsigned long)p < end;
	fclose(f);
	return is;
}

static void spawn(void *arg)
{
	int status = 0;
	pid_t child;

	(void)arg;
	if (!shown(all[0]->p)) {
		sleep_us(2000);
		return;
	}
	child = vfork();
	if (child == 0) { /* slow to execute another program */
		usleep(20000);
		_exit(0);
	}
	must(child);
	while (waitpid(child, &status, 0) == -1)
		check(errno == EINTR && opt.sigcont_ok, "waitpid: %s", strerror(errno));
	check(status == 0, "the child ended with %#x", status);
	sleep_us(5000);
}

static void at_last(void)
{
	for (int t = 0; t < 4 && all[t]; t++)
		for (size_t k = 0; k < PAGES; k++)
			check(all[t]->p[k * PAGE / 8] == all[t]->count[k], "at the end: page %zu", k);
}

void spawn_start(void)
{
	int n = opt.threads < 1 ? 1 : opt.threads > 4 ? 4 : opt.threads;

	for (int t = 0; t < n; t++) {
		struct memory *m = all[t] = calloc(1, sizeof(struct memory));

		m->seed = 0x456789aULL * (t + 1);
		m->p = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		check(m->p != MAP_FAILED, "mmap: %s", strerror(errno));
		for (size_t k = 0; k < PAGES; k++)
			m->p[k * PAGE / 8] = ++m->count[k];
		start("spawn", body, m);
	}
	start("spawn-child", spawn, NULL);
	at_end(at_last);
}
