// A program that lives from files which other hosts lack: it is linked to a library,
// loads another, and has a file of data mapped privately, of which it changes pages.
// All the content of these is known, and checked all the time, by it and by children
// that it forks on SIGUSR1. With --drop it also gives changed pages up, and wants those of the file.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "table.h"

#define PAGE 4096
#define WORDS (PAGE / 4)

const uint32_t *of_library(void);
static const uint32_t *linked, *loaded;
EMBED(own, "table3")

static const char *identity = "homeless", *report = "", *library, *file;
static struct sockaddr_un heart;
static volatile sig_atomic_t ending, asked;
static int drop;

static uint32_t *data, *twice; // the file, mapped twice
static size_t pages;
static uint32_t *written; // by page: what was added to its first word
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void tell(const char *format, ...) {
	char line[400];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	line[n++] = '\n';
	if (write(1, line, n) < 0) {}
	int fd = *report ? open(report, O_CREAT | O_WRONLY | O_APPEND, 0644) : -1;
	if (fd >= 0) {
		if (write(fd, line, n) < 0) {}
		close(fd);
	}
}

#define bad(...) (tell("bad " __VA_ARGS__), _exit(1))

static void beat(void) {
	static uint64_t counter;
	uint64_t nonce;
	char line[200];
	if (!heart.sun_family) return;
	counter++;
	if (getrandom(&nonce, sizeof nonce, 0) != sizeof nonce) bad("getrandom");
	int n = snprintf(line, sizeof line, "beat %s %llu %llx", identity, (unsigned long long)counter, (unsigned long long)nonce);
	int s = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0);
	if (s >= 0) {
		sendto(s, line, n, 0, (struct sockaddr *)&heart, sizeof heart);
		close(s);
	}
}

static void table(const char *what, const uint32_t *t, uint32_t seed, size_t i) {
	if (t[i] != CONTENT_AT(seed, i)) bad("%s has %u at %zu", what, t[i], i);
}

static void page(size_t p, int whole) {
	for (size_t i = 0; i < WORDS; i += whole ? 1 : WORDS - 1) {
		uint32_t want = CONTENT_AT(7, p * WORDS + i);
		if (twice[p * WORDS + i] != want) bad("page %zu of the file has %u at %zu, not %u", p, twice[p * WORDS + i], i, want);
		if (i == 0) want += written[p];
		if (data[p * WORDS + i] != want) bad("page %zu has %u at %zu, not %u", p, data[p * WORDS + i], i, want);
	}
}

static uint64_t draw(uint64_t *seed) {
	*seed ^= *seed << 13, *seed ^= *seed >> 7, *seed ^= *seed << 17;
	return *seed;
}

static void some(uint64_t *seed) {
	for (int i = 0; i < 4; i++) {
		table("the program", own, 3, draw(seed) % TABLE);
		table("the library", linked, 1, draw(seed) % TABLE);
		table("the other library", loaded, 2, draw(seed) % TABLE);
		page(draw(seed) % pages, 0);
	}
}

static void all(void) {
	for (size_t i = 0; i < TABLE; i++) {
		table("the program", own, 3, i);
		table("the library", linked, 1, i);
		table("the other library", loaded, 2, i);
	}
	for (size_t p = 0; p < pages; p++) page(p, 1);
	if (!dlopen(library, RTLD_NOW | RTLD_NOLOAD)) bad("%s", dlerror());
}

static void *change(void *unused) {
	uint64_t seed = 0x9e3779b97f4a7c15;
	while (!ending) {
		pthread_mutex_lock(&lock);
		some(&seed);
		size_t p = draw(&seed) % pages;
		data[p * WORDS] += p + 1;
		written[p] += p + 1;
		if (drop && seed % 8 == 0) {
			p = draw(&seed) % pages;
			if (madvise(data + p * WORDS, PAGE, MADV_DONTNEED)) bad("madvise: %s", strerror(errno));
			written[p] = 0;
			page(p, 1);
		}
		pthread_mutex_unlock(&lock);
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, 0);
	}
	return unused;
}

static void child(uint64_t seed) {
	pthread_mutex_lock(&lock);
	pid_t pid = fork();
	if (pid == 0) {
		pthread_mutex_unlock(&lock);
		for (int i = 0; i < 100; i++) {
			some(&seed);
			data[seed % pages * WORDS + 1]++; // its own
			data[seed % pages * WORDS + 1]--;
		}
		_exit(0);
	}
	pthread_mutex_unlock(&lock);
	int status;
	if (pid < 0) bad("fork: %s", strerror(errno));
	if (waitpid(pid, &status, 0) != pid || status) bad("a child ended with %#x", status);
}

static void end(int s) { ending = s; }
static void ask(int s) { asked = s; }

static void *map(int prot) {
	struct stat st;
	int fd = open(file, O_RDONLY);
	if (fd < 0 || fstat(fd, &st)) bad("%s: %s", file, strerror(errno));
	pages = st.st_size / PAGE;
	void *at = mmap(0, st.st_size, prot, MAP_PRIVATE, fd, 0);
	if (at == MAP_FAILED) bad("mmap: %s", strerror(errno));
	close(fd);
	return at;
}

int main(int argc, char **argv) {
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--drop")) { drop = 1; continue; }
		if (i + 1 == argc) bad("%s needs a value", argv[i]);
		const char *value = argv[i + 1];
		if (!strcmp(argv[i], "--data")) file = value;
		else if (!strcmp(argv[i], "--library")) library = value;
		else if (!strcmp(argv[i], "--identity")) identity = value;
		else if (!strcmp(argv[i], "--report")) report = value;
		else if (!strcmp(argv[i], "--heartbeat") && !strncmp(value, "unix:", 5)) {
			heart.sun_family = AF_UNIX;
			snprintf(heart.sun_path, sizeof heart.sun_path, "%s", value + 5);
		} else bad("%s is not known", argv[i]);
		i++;
	}
	void *l = dlopen(library, RTLD_NOW);
	const uint32_t *(*of_other)(void) = l ? (const uint32_t *(*)(void))dlsym(l, "of_other_library") : 0;
	if (!of_other) bad("%s", dlerror());
	linked = of_library();
	loaded = of_other();
	data = map(PROT_READ | PROT_WRITE);
	twice = map(PROT_READ);
	written = calloc(pages, sizeof *written);
	for (size_t p = 0; p < pages; p += 16) data[p * WORDS] += written[p] = 4711;
	signal(SIGTERM, end);
	signal(SIGUSR1, ask);
	pthread_t changer;
	if (pthread_create(&changer, 0, change, 0)) bad("pthread_create");
	if (write(1, "ready\n", 6) < 0) {}
	for (uint64_t n = 1; !ending; n++) {
		beat();
		if (asked) {
			asked = 0;
			for (int i = 0; i < 8; i++) child((n + i) * 0x9e3779b97f4a7c15);
			if (write(1, "forked\n", 7) < 0) {}
		}
		nanosleep(&(struct timespec){.tv_nsec = 3000000}, 0);
	}
	pthread_join(changer, 0);
	all();
	tell("ok");
	return 0;
}
