// Memory of all kinds that a device may or may not be given, for tests that register it.
//
//     pinned [--seccomp] [--threads N] [--stripes MIB] [--bulk MIB]
//
// It prints a line "NAME ADDRESS BYTES" for each kind and "ready", and counts on in a
// thread. On SIGUSR1 it says "ok N" if all is as it was, else what is not.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MiB = 1 << 20, Page = 4096 };

static struct area {
	const char *name;
	size_t size;
	unsigned char *at;
	size_t step, part; // part bytes of each step are written
	int readable;
} areas[] = {
	{ .name = "shared-by-fork", .size = 2 * MiB, .step = MiB, .part = MiB, .readable = 1 },
	{ .name = "anon", .size = 8 * MiB, .step = MiB, .part = MiB, .readable = 1 },
	{ .name = "holes", .size = 64 * MiB, .step = MiB, .part = 16 * Page, .readable = 1 },
	{ .name = "zero", .size = 4 * MiB, .step = MiB, .part = 0, .readable = 1 },
	{ .name = "none", .size = MiB, .step = MiB, .part = MiB },
	{ .name = "readonly", .size = MiB, .step = MiB, .part = MiB, .readable = 1 },
	{ .name = "shared", .size = 2 * MiB, .step = MiB, .part = MiB, .readable = 1 },
	{ .name = "stripes", .size = 0, .step = 2 * Page, .part = Page, .readable = 1 },
	{ .name = "bulk", .size = 0, .step = MiB, .part = MiB, .readable = 1 },
};
enum { Forked, Anon, Holes, Zero, None, Readonly, Shared, Stripes, Bulk, Areas };

static unsigned char byte(int area, size_t i)
{
	return i * 31 + (i >> 12) * 7 + area;
}

static void make(int k)
{
	struct area *a = &areas[k];
	if (!a->size)
		return;
	a->at = mmap(NULL, a->size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_NORESERVE | (k == Shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);
	if (a->at == MAP_FAILED) {
		perror("mmap");
		exit(1);
	}
	madvise(a->at, a->size, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < a->size; i++)
		if (i % a->step < a->part)
			a->at[i] = byte(k, i);
	volatile unsigned char sum = 0;
	for (size_t i = 0; k == Zero && i < a->size; i += Page)
		sum += a->at[i];
}

static const char *check(void)
{
	for (int k = 0; k < Areas; k++) {
		struct area *a = &areas[k];
		for (size_t i = 0; a->readable && i < a->size; i += 61)
			if (a->at[i] != (i % a->step < a->part ? byte(k, i) : 0))
				return a->name;
	}
	return NULL;
}

static volatile unsigned long count;

static void *counts(void *arg)
{
	(void)arg;
	for (;; count++)
		usleep(1000);
	return NULL;
}

static void refuse_ioctl(void)
{
	struct sock_filter f[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog p = { sizeof f / sizeof *f, f };
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p)) {
		perror("seccomp");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	int threads = 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--stripes"))
			areas[Stripes].size = atoi(argv[i + 1]) * MiB;
		if (!strcmp(argv[i], "--bulk"))
			areas[Bulk].size = atoi(argv[i + 1]) * MiB;
	}
	make(Forked);
	pid_t parent = getpid();
	if (fork() == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		while (getppid() == parent)
			pause();
		_exit(0);
	}
	for (int k = Forked + 1; k < Areas; k++)
		make(k);
	mprotect(areas[None].at, areas[None].size, PROT_NONE);
	mprotect(areas[Readonly].at, areas[Readonly].size, PROT_READ);
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--seccomp"))
			refuse_ioctl();
		if (!strcmp(argv[i], "--threads"))
			threads = atoi(argv[++i]);
	}
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	sigprocmask(SIG_BLOCK, &set, NULL);
	for (int i = 0; i < threads; i++) {
		pthread_t t;
		if (pthread_create(&t, NULL, counts, NULL))
			return 1;
	}
	for (int k = 0; k < Areas; k++)
		printf("%s %lx %zu\n", areas[k].name, (unsigned long)areas[k].at, areas[k].size);
	puts("ready");
	for (int n = 1;; n++) {
		int sig;
		if (sigwait(&set, &sig))
			return 1;
		unsigned long before = count;
		usleep(20000);
		const char *bad = check();
		if (bad)
			printf("%s is not as it was\n", bad);
		else if (count == before)
			puts("nothing counts");
		else
			printf("ok %d\n", n);
	}
}
