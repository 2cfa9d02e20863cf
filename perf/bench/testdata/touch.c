// Touches missing pages and says how long each touch took, and measures what
// such a touch is made of where no program of ours is in between.
//
//	touch move MIB THREADS     waits until it finds itself on another host, then
//	                           touches every page once, in scattered order, all
//	                           threads at once; again after the next move
//	touch hold MIB             maps and fills the region, and waits: a source
//	touch fresh MIB            maps the region, does not touch it, and waits
//	touch arrive MIB           registers the empty region with a userfaultfd that
//	                           it hands out on descriptor 3; for every number N
//	                           that comes there it touches N pages and answers
//	                           with their times
//	touch local COUNT          times of a userfaultfd served by a second thread
//	touch pingpong COUNT       times of asking for a page over loopback TCP
//
// Times are in nanoseconds.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define BASE 0x200000000000UL
#define MAXTHREADS 64
#define HIT 2000 // a touch that took less did not wait
#define ASK 64   // bytes of a question over TCP

static void die(const char *what)
{
	printf("touch: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	_exit(2);
}

static inline uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static inline uint64_t touch(unsigned long page)
{
	uint64_t t = now();

	(void)*(volatile uint64_t *)(BASE + page * PAGE);
	return now() - t;
}

static unsigned long pages, stride;

// scattered is the i-th page in an order that meets each once and no two
// neighbours one after the other.
static inline unsigned long scattered(unsigned long i)
{
	return (unsigned long)((unsigned __int128)i * stride % pages);
}

static unsigned long gcd(unsigned long a, unsigned long b)
{
	return b ? gcd(b, a % b) : a;
}

static void map_region(const char *mib, int fill)
{
	uint64_t x = 88172645463325252UL;

	pages = strtoul(mib, NULL, 10) << 8;
	if (pages < 256)
		die("at least one MiB");
	stride = pages * 0.6180339887 + 1;
	while (gcd(stride, pages) != 1)
		stride++;
	if (mmap((void *)BASE, pages * PAGE, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) != (void *)BASE)
		die("mmap");
	for (unsigned long i = 0; fill && i < pages * PAGE / 8; i++) {
		x ^= x << 13, x ^= x >> 7, x ^= x << 17;
		((uint64_t *)BASE)[i] = x;
	}
}

// --- move ---

static struct runner {
	pthread_t th;
	uint64_t *times;
	unsigned long n, hits;
} runners[MAXTHREADS];
static int threads;
static unsigned long room; // times in each runner
static pthread_barrier_t begin, done;

static void *run(void *arg)
{
	struct runner *r = arg;

	for (;;) {
		pthread_barrier_wait(&begin);
		for (unsigned long i = r - runners; i < pages; i += threads) {
			uint64_t t = touch(scattered(i));

			if (t < HIT)
				r->hits++;
			else if (r->n < room)
				r->times[r->n++] = t;
		}
		pthread_barrier_wait(&done);
	}
	return NULL;
}

// print writes what was measured since the last move, as one line: the host,
// how many pages were there already, and the times of the others.
static void print(const char *host)
{
	unsigned long hits = 0;

	for (int i = 0; i < threads; i++)
		hits += runners[i].hits;
	printf("moved %s %lu", host, hits);
	for (int i = 0; i < threads; i++)
		for (unsigned long k = 0; k < runners[i].n; k++)
			printf(" %lu", runners[i].times[k]);
	printf("\n");
	fflush(stdout);
}

static int move(int argc, char **argv)
{
	struct timespec nap = { 0, 200000 };
	struct utsname before, here;
	static char buffer[1 << 16];

	if (argc != 4)
		return 2;
	map_region(argv[2], 1);
	threads = atoi(argv[3]);
	if (threads < 1 || threads > MAXTHREADS)
		return 2;
	setvbuf(stdout, buffer, _IOFBF, sizeof(buffer));
	room = pages / threads + 1;
	pthread_barrier_init(&begin, NULL, threads + 1);
	pthread_barrier_init(&done, NULL, threads + 1);
	for (int i = 0; i < threads; i++)
		if (pthread_create(&runners[i].th, NULL, run, &runners[i]))
			die("pthread_create");
	uname(&before);
	printf("ready\n");
	fflush(stdout);
	for (;;) {
		nanosleep(&nap, NULL);
		uname(&here);
		if (strcmp(here.nodename, before.nodename) == 0)
			continue;
		before = here;
		// Where the times go must not be missing itself.
		for (int i = 0; i < threads; i++) {
			runners[i].times = mmap(NULL, room * 8, PROT_READ | PROT_WRITE,
						MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
			if (runners[i].times == MAP_FAILED)
				die("mmap");
			runners[i].n = runners[i].hits = 0;
		}
		pthread_barrier_wait(&begin);
		pthread_barrier_wait(&done);
		print(here.nodename);
		for (int i = 0; i < threads; i++)
			munmap(runners[i].times, room * 8);
	}
}

// --- userfaultfd ---

static int make_uffd(int flags, uint64_t features)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register reg = { .range = { BASE, pages * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = syscall(SYS_userfaultfd, UFFD_USER_MODE_ONLY | O_CLOEXEC | flags);

	if (fd < 0)
		die("userfaultfd");
	if (ioctl(fd, UFFDIO_API, &api))
		die("UFFDIO_API");
	if (ioctl(fd, UFFDIO_REGISTER, &reg))
		die("UFFDIO_REGISTER");
	return fd;
}

static int arrive(int argc, char **argv)
{
	char c = 'u', ctl[CMSG_SPACE(sizeof(int))] = { 0 };
	struct iovec iov = { &c, 1 };
	struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = ctl, .msg_controllen = sizeof(ctl) };
	struct cmsghdr *h = CMSG_FIRSTHDR(&m);
	static uint64_t times[4096];
	unsigned long at = 0;
	uint32_t n;
	int fd;

	if (argc != 3)
		return 2;
	map_region(argv[2], 0);
	memset(times, 1, sizeof(times));
	fd = make_uffd(O_NONBLOCK, UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP |
		       UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP | UFFD_FEATURE_MISSING_SHMEM);
	h->cmsg_level = SOL_SOCKET;
	h->cmsg_type = SCM_RIGHTS;
	h->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(h), &fd, sizeof(int));
	if (sendmsg(3, &m, 0) != 1)
		die("sendmsg");
	close(fd);
	while (read(3, &n, sizeof(n)) == sizeof(n) && n <= 4096) {
		for (uint32_t i = 0; i < n; i++)
			times[i] = touch(scattered(at++));
		if (write(3, times, n * 8) != (ssize_t)(n * 8))
			die("write");
	}
	return 0;
}

static void *serve(void *arg)
{
	static char data[PAGE] __attribute__((aligned(PAGE))) = { 1 };
	int fd = *(int *)arg;
	struct uffd_msg m;

	while (read(fd, &m, sizeof(m)) == sizeof(m)) {
		struct uffdio_copy c = { .dst = m.arg.pagefault.address & ~(PAGE - 1), .src = (uint64_t)data, .len = PAGE };

		if (m.event == UFFD_EVENT_PAGEFAULT && ioctl(fd, UFFDIO_COPY, &c))
			die("UFFDIO_COPY");
	}
	return NULL;
}

static int local(int argc, char **argv)
{
	unsigned long n = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
	uint64_t *times = calloc(n + 1, 8);
	char mib[20];
	pthread_t th;
	int fd;

	snprintf(mib, sizeof(mib), "%lu", n / 256 + 1);
	map_region(mib, 0);
	memset(times, 1, n * 8);
	fd = make_uffd(0, 0);
	if (pthread_create(&th, NULL, serve, &fd))
		die("pthread_create");
	for (unsigned long i = 0; i < n; i++)
		times[i] = touch(scattered(i));
	for (unsigned long i = 0; i < n; i++)
		printf("%lu\n", times[i]);
	return 0;
}

// --- TCP ---

static void full(int fd, char *buf, size_t n)
{
	while (n > 0) {
		ssize_t k = read(fd, buf, n);

		if (k <= 0)
			_exit(0); // the other end has gone
		buf += k, n -= k;
	}
}

static int pingpong(int argc, char **argv)
{
	unsigned long n = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t len = sizeof(at);
	static char buf[ASK + PAGE] = { 1 };
	uint64_t *times = calloc(n + 1, 8);
	int one = 1, ln = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), fd;
	pid_t child;

	if (bind(ln, (struct sockaddr *)&at, len) || listen(ln, 1) || getsockname(ln, (struct sockaddr *)&at, &len))
		die("listen");
	fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (connect(fd, (struct sockaddr *)&at, len))
		die("connect");
	child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		close(fd);
		fd = accept(ln, NULL, NULL);
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		for (;;) {
			full(fd, buf, ASK);
			if (write(fd, buf, sizeof(buf)) != sizeof(buf))
				_exit(0);
		}
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	for (unsigned long i = 0; i < n; i++) {
		uint64_t t = now();

		if (write(fd, buf, ASK) != ASK)
			die("write");
		full(fd, buf, sizeof(buf));
		times[i] = now() - t;
	}
	close(fd);
	waitpid(child, NULL, 0);
	for (unsigned long i = 0; i < n; i++)
		printf("%lu\n", times[i]);
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (strcmp(what, "move") == 0)
		return move(argc, argv);
	if (strcmp(what, "arrive") == 0)
		return arrive(argc, argv);
	if (strcmp(what, "local") == 0)
		return local(argc, argv);
	if (strcmp(what, "pingpong") == 0)
		return pingpong(argc, argv);
	if (strcmp(what, "hold") == 0 && argc == 3) {
		map_region(argv[2], 1);
		printf("ready\n");
		fflush(stdout);
		for (;;)
			pause();
	}
	fprintf(stderr, "touch: unknown arguments\n");
	return 2;
}
