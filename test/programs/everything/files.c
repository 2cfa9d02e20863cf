/* Descriptors: what they stand for, where they stand, what is in them. */
#include "everything.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

static char dir[300];

static int file(const char *name, int flags)
{
	char path[400];

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	return (int)must(open(path, flags | O_CLOEXEC, 0600));
}

/* A file read in order, with the offset shared by a dup. */
static int reading, twin;
static uint32_t expected;

static void in_order(void *arg)
{
	uint32_t v = 0;
	ssize_t n;

	(void)arg;
	n = read(expected % 2 ? twin : reading, &v, 4);
	if (n == 0) {
		must(lseek(twin, 0, SEEK_SET));
		expected = 0;
		return;
	}
	check(n == 4 && v == expected, "a file read in order: %zd bytes, %u instead of %u", n, v, expected);
	expected++;
	check(lseek(reading, 0, SEEK_CUR) == (off_t)expected * 4, "the offset is %ld, not %u", (long)lseek(reading, 0, SEEK_CUR), expected * 4);
	sleep_us(3000);
}

/* Appending, seen through a second descriptor. */
static int appending, checking;
static uint32_t lines;

static void append(void *arg)
{
	char line[16], back[16] = "";
	struct stat st;

	(void)arg;
	snprintf(line, sizeof(line), "%09u\n", lines);
	must(lseek(appending, 0, SEEK_SET)); /* O_APPEND does not care */
	check(write(appending, line, 10) == 10, "append: %s", strerror(errno));
	check(pread(checking, back, 10, (off_t)lines * 10) == 10 && memcmp(line, back, 10) == 0, "appended %.9s, read back %.9s", line, back);
	lines++;
	must(fstat(appending, &st));
	check(st.st_size == (off_t)lines * 10, "a file of %u lines has %ld bytes", lines, (long)st.st_size);
	if (lines == 1000) {
		must(ftruncate(appending, 0));
		lines = 0;
	}
	sleep_us(3000);
}

/* Things that lie in a descriptor and are only looked at, at the end taken. */
static int pipe_fds[2], pair[2], event_fd, deleted = -1, locked, nonblock;
static char stored[3000];
static ino_t dir_inode;
static int dir_fd, listener = -1, unix_listener = -1, udp = -1, epoll_fd;
static uint16_t listen_port, udp_port;

static uint16_t port_of(int fd)
{
	struct sockaddr_in a;
	socklen_t n = sizeof(a);

	must(getsockname(fd, (struct sockaddr *)&a, &n));
	return ntohs(a.sin_port);
}

static void look(void *arg)
{
	struct epoll_event ev;
	struct rlimit rl;
	struct stat st;
	char name[16] = "";
	int n = 0, on = 0;
	socklen_t len = sizeof(on);

	(void)arg;
	must(ioctl(pipe_fds[0], FIONREAD, &n));
	check(n == (int)sizeof(stored), "a pipe holds %d bytes", n);
	check(fcntl(pipe_fds[0], F_GETPIPE_SZ) == 1 << 17, "a pipe's size changed");
	must(ioctl(pair[0], FIONREAD, &n));
	check(n == 100, "a socketpair holds %d bytes", n);
	check(fcntl(nonblock, F_GETFL) & O_NONBLOCK && !(fcntl(pair[0], F_GETFL) & O_NONBLOCK), "O_NONBLOCK is wrong");
	check(fcntl(event_fd, F_GETFD) == 0 && fcntl(pipe_fds[1], F_GETFD) == FD_CLOEXEC, "close-on-exec is wrong");
	must(fstat(dir_fd, &st));
	check(st.st_ino == dir_inode, "a directory's descriptor is another's");
	check(epoll_wait(epoll_fd, &ev, 1, 0) == 1 && ev.data.u64 == 0xfeed, "epoll does not report what is ready");
	must(getrlimit(RLIMIT_NOFILE, &rl));
	check(rl.rlim_cur == 777, "RLIMIT_NOFILE is %ld", (long)rl.rlim_cur);
	check(umask(027) == 027, "umask changed");
	must(prctl(PR_GET_NAME, name));
	check(strcmp(name, "look") == 0, "the thread is called %s", name);
	if (listener >= 0) {
		must(getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &on, &len));
		check(on == 1 && port_of(listener) == listen_port, "a listening TCP socket is lost");
		must(getsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, &len));
		check(on == 1, "SO_REUSEADDR is lost");
		check(port_of(udp) == udp_port, "a UDP socket's port changed");
		must(getsockopt(unix_listener, SOL_SOCKET, SO_ACCEPTCONN, &on, &len));
		check(on == 1, "a listening unix socket is lost");
	}
	sleep_us(10000);
}

static void take(void)
{
	char buf[sizeof(stored) + 1];
	uint64_t v;
	int fd;

	check(read(pipe_fds[0], buf, sizeof(buf)) == (ssize_t)sizeof(stored) && memcmp(buf, stored, sizeof(stored)) == 0, "what lay in a pipe changed");
	check(recv(pair[0], buf, sizeof(buf), MSG_DONTWAIT) == 100 && memcmp(buf, stored, 100) == 0, "what lay in a socketpair changed");
	check(read(event_fd, &v, 8) == 8 && v == 4242, "an eventfd holds %lu", (unsigned long)v);
	if (deleted >= 0)
		check(pread(deleted, buf, 100, 0) == 100 && memcmp(buf, stored, 100) == 0, "a deleted file changed");
	if (has("locks")) {
		/* Another open file of the same name must meet the lock. */
		fd = file("locked", O_RDWR);
		check(flock(fd, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "a lock is lost");
		close(fd);
	}
}

static int watching;

static void watch_dir(void *arg)
{
	char buf[1024] __attribute__((aligned(8)));
	struct inotify_event *e = (void *)buf;
	int fd;
	ssize_t n;

	(void)arg;
	fd = file("watched/f", O_CREAT | O_WRONLY);
	close(fd);
	n = read(watching, buf, sizeof(buf));
	interrupted("read of inotify", n, true);
	if (n > 0)
		check(e->mask & IN_CREATE && strcmp(e->name, "f") == 0, "inotify reported %#x for %s", e->mask, e->name);
	unlinkat(dir_fd, "watched/f", 0);
	sleep_us(20000);
}

static void clean(void)
{
	static const char *const names[] = { "in-order", "append", "locked", "listener" };

	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		unlinkat(dir_fd, names[i], 0);
	unlinkat(dir_fd, "watched", AT_REMOVEDIR);
	rmdir(dir);
}

static void sockets(void)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_ANY) };
	struct sockaddr_un un = { .sun_family = AF_UNIX };
	int on = 1;

	listener = (int)must(socket(AF_INET, SOCK_STREAM, 0));
	must(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)));
	must(bind(listener, (struct sockaddr *)&in, sizeof(in)));
	must(listen(listener, 17));
	listen_port = port_of(listener);
	udp = (int)must(socket(AF_INET, SOCK_DGRAM, 0));
	must(bind(udp, (struct sockaddr *)&in, sizeof(in)));
	udp_port = port_of(udp);
	unix_listener = (int)must(socket(AF_UNIX, SOCK_STREAM, 0));
	snprintf(un.sun_path, sizeof(un.sun_path), "%.80s/listener", dir);
	must(bind(unix_listener, (struct sockaddr *)&un, sizeof(un)));
	must(listen(unix_listener, 5));
}

void files_start(void)
{
	struct rlimit rl;
	struct stat st;
	uint64_t v = 4242;
	struct epoll_event ev = { .events = EPOLLIN, .data.u64 = 0xfeed };
	int fd;

	for (size_t i = 0; i < sizeof(stored); i++)
		stored[i] = (char)(i * 7);
	umask(027);
	must(getrlimit(RLIMIT_NOFILE, &rl));
	rl.rlim_cur = 777;
	must(setrlimit(RLIMIT_NOFILE, &rl));

	snprintf(dir, sizeof(dir), "%s/%s", opt.dir, opt.identity);
	must(mkdir(dir, 0700));
	at_end(clean);
	dir_fd = (int)must(open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	must(fstat(dir_fd, &st));
	dir_inode = st.st_ino;

	fd = file("in-order", O_CREAT | O_RDWR);
	for (uint32_t i = 0; i < 5000; i++)
		check(write(fd, &i, 4) == 4, "write: %s", strerror(errno));
	close(fd);
	reading = file("in-order", O_RDONLY);
	twin = (int)must(dup(reading));
	appending = file("append", O_CREAT | O_WRONLY | O_APPEND);
	checking = file("append", O_RDONLY);
	nonblock = file("append", O_RDONLY | O_NONBLOCK);

	must(pipe2(pipe_fds, O_CLOEXEC));
	must(fcntl(pipe_fds[0], F_SETPIPE_SZ, 1 << 17));
	check(write(pipe_fds[1], stored, sizeof(stored)) == (ssize_t)sizeof(stored), "write");
	must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
	check(write(pair[1], stored, 100) == 100, "write");
	event_fd = (int)must(eventfd(0, 0));
	check(write(event_fd, &v, 8) == 8, "write");
	epoll_fd = (int)must(epoll_create1(EPOLL_CLOEXEC));
	must(epoll_ctl(epoll_fd, EPOLL_CTL_ADD, pipe_fds[0], &ev));
	if (has("deleted")) {
		deleted = file("deleted", O_CREAT | O_RDWR);
		check(write(deleted, stored, 100) == 100, "write");
		must(unlinkat(dir_fd, "deleted", 0));
	}
	if (has("locks")) {
		locked = file("locked", O_CREAT | O_RDWR);
		must(flock(locked, LOCK_EX));
	}
	if (has("listen"))
		sockets();
	if (has("inotify")) {
		char path[400];

		must(mkdirat(dir_fd, "watched", 0700));
		snprintf(path, sizeof(path), "%s/watched", dir);
		watching = (int)must(inotify_init1(IN_CLOEXEC));
		must(inotify_add_watch(watching, path, IN_CREATE));
		start("inotify", watch_dir, NULL);
	}
	at_end(take);
	start("in order", in_order, NULL);
	start("append", append, NULL);
	start("look", look, NULL);
}
