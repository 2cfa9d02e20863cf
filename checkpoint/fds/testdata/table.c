// A process with a descriptor of every kind, at numbers that are agreed on.
// "table make DIR" makes them and waits; "table wait DIR" only waits. On SIGUSR1
// either one checks that all of them are there and behave, and writes what is
// wrong to DIR/result.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum {
	DATA = 10, DATA_DUP, LOG, GONE, GONE2, DIRFD,
	PR, PW, DR, DW, HUP_R, HUP_W, FIFO,
	EV, SEM, T_PERIOD, T_FIRED, T_ABS, T_LATE, SIGFD, INO,
	MEM, MEM2, MEMBIG, DEVNULL, URANDOM,
	TCP4, TCP6, UDP, UDPC, UDPF, TCPF, TCPB,
	UL, UDG, SA, SB, QA, QB, GA, GB, LAST,
	NLR, NLU, EP, EP2, FLOCKED, POSIXED, OFDED,
	CONN, ACC, PROCFS, OPATH, ASYNC_A, ASYNC_B, OWNPORT,
	GHOST = 200, REUSED = 201, HIGH = 1500,
};

static const char *dir;
static FILE *result;
static int failures;

static char *path(const char *name) {
	static char b[8][512];
	static int k;
	char *p = b[k++ % 8];
	snprintf(p, 512, "%s/%s", dir, name);
	return p;
}

static void die(const char *what) { perror(what); exit(3); }

#define MUST(x) ({ __typeof__(x) r_ = (x); if (r_ == (__typeof__(x))-1) { fprintf(stderr, "line %d: ", __LINE__); die(#x); } r_; })
#define CHECK(x) do { if (!(x)) { failures++; fprintf(result, "line %d: %s (errno %d)\n", __LINE__, #x, errno); } } while (0)

static void at(int fd, int want, int cloexec) {
	if (fd != want) {
		MUST(dup3(fd, want, cloexec ? O_CLOEXEC : 0));
		MUST(close(fd));
	} else if (cloexec) {
		MUST(fcntl(fd, F_SETFD, FD_CLOEXEC));
	}
}

static struct sockaddr_in in4(int port) {
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	return a;
}

static struct sockaddr_un un(const char *name, int abstract, socklen_t *len) {
	struct sockaddr_un a = {.sun_family = AF_UNIX};
	strcpy(a.sun_path + abstract, name);
	*len = offsetof(struct sockaddr_un, sun_path) + abstract + strlen(name) + !abstract;
	return a;
}

static void setint(int fd, int level, int name, int v) { MUST(setsockopt(fd, level, name, &v, sizeof v)); }
static int getint(int fd, int level, int name) {
	int v = -1;
	socklen_t n = sizeof v;
	getsockopt(fd, level, name, &v, &n);
	return v;
}

static void make(void) {
	int p[2];
	struct sockaddr_un ua;
	socklen_t ul;
	struct rlimit files;
	MUST(getrlimit(RLIMIT_NOFILE, &files));
	if (files.rlim_cur <= HIGH) { /* 1024 is common */
		files.rlim_cur = files.rlim_max;
		MUST(setrlimit(RLIMIT_NOFILE, &files));
	}
	at(MUST(open("/dev/null", O_RDWR)), DEVNULL, 0);
	MUST(dup2(DEVNULL, HIGH));
	at(MUST(open("/dev/urandom", O_RDONLY)), URANDOM, 0);

	at(MUST(open(path("data"), O_CREAT | O_RDWR, 0644)), DATA, 1);
	MUST(write(DATA, "hello world\n", 12));
	MUST(lseek(DATA, 5, SEEK_SET));
	MUST(dup2(DATA, DATA_DUP));
	at(MUST(open(path("log"), O_CREAT | O_WRONLY | O_APPEND, 0644)), LOG, 0);
	MUST(write(LOG, "one\n", 4));

	at(MUST(open(path("gone"), O_CREAT | O_RDWR, 0600)), GONE, 0);
	for (int i = 0; i < 10000; i++) {
		char c = 'a' + i % 26;
		MUST(write(GONE, &c, 1));
	}
	MUST(ftruncate(GONE, 1 << 20));
	MUST(lseek(GONE, 100, SEEK_SET));
	at(MUST(open(path("gone"), O_RDONLY)), GONE2, 1);
	MUST(unlink(path("gone")));
	at(MUST(open(dir, O_RDONLY | O_DIRECTORY)), DIRFD, 1);
	at(MUST(open(dir, O_PATH)), OPATH, 0);
	at(MUST(open("/proc/self/status", O_RDONLY)), PROCFS, 0);

	MUST(pipe2(p, 0));
	at(p[0], PR, 0); at(p[1], PW, 1);
	MUST(fcntl(PR, F_SETPIPE_SZ, 131072));
	MUST(fcntl(PR, F_SETFL, O_NONBLOCK));
	MUST(write(PW, "unread", 6));
	MUST(pipe2(p, O_DIRECT));
	at(p[0], DR, 0); at(p[1], DW, 0);
	MUST(write(DW, "ab", 2)); MUST(write(DW, "cde", 3));
	MUST(pipe(p));
	at(p[0], HUP_R, 0); MUST(write(p[1], "x", 1)); close(p[1]);
	MUST(pipe(p));
	at(p[1], HUP_W, 0); close(p[0]);
	MUST(mkfifo(path("fifo"), 0640));
	at(MUST(open(path("fifo"), O_RDWR)), FIFO, 0);
	MUST(write(FIFO, "fifo", 4));

	at(MUST(eventfd(7, 0)), EV, 1);
	at(MUST(eventfd(3, EFD_SEMAPHORE | EFD_NONBLOCK)), SEM, 0);
	struct itimerspec it = {{5, 6}, {3600, 0}};
	at(MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK)), T_PERIOD, 0);
	MUST(timerfd_settime(T_PERIOD, 0, &it, NULL));
	it = (struct itimerspec){{0, 0}, {0, 1000000}};
	at(MUST(timerfd_create(CLOCK_BOOTTIME, 0)), T_FIRED, 0);
	MUST(timerfd_settime(T_FIRED, 0, &it, NULL));
	it = (struct itimerspec){{3600, 0}, {0, 1000000}};
	at(MUST(timerfd_create(CLOCK_MONOTONIC, 0)), T_LATE, 0);
	MUST(timerfd_settime(T_LATE, 0, &it, NULL));
	struct pollfd tp[2] = {{T_FIRED, POLLIN, 0}, {T_LATE, POLLIN, 0}};
	while (!(tp[0].revents & tp[1].revents & POLLIN)) MUST(poll(tp, 2, 1000));
	it = (struct itimerspec){{0, 0}, {time(NULL) + 1000, 0}};
	at(MUST(timerfd_create(CLOCK_REALTIME, 0)), T_ABS, 0);
	MUST(timerfd_settime(T_ABS, TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET, &it, NULL));

	sigset_t s;
	sigemptyset(&s); sigaddset(&s, SIGUSR2); sigaddset(&s, SIGRTMIN + 3);
	at(MUST(signalfd(-1, &s, SFD_NONBLOCK)), SIGFD, 0);
	MUST(mkdir(path("w1"), 0755)); MUST(mkdir(path("w2"), 0755)); MUST(mkdir(path("w3"), 0755));
	at(MUST(inotify_init1(IN_NONBLOCK)), INO, 1);
	MUST(inotify_add_watch(INO, path("w1"), IN_CREATE));
	int wd = MUST(inotify_add_watch(INO, path("w2"), IN_CREATE));
	MUST(inotify_add_watch(INO, path("w3"), IN_DELETE | IN_CREATE | IN_ONLYDIR));
	MUST(inotify_rm_watch(INO, wd));
	char junk[256];
	MUST(read(INO, junk, sizeof junk)); // IN_IGNORED

	at(MUST(memfd_create("m1", MFD_ALLOW_SEALING)), MEM, 0);
	MUST(ftruncate(MEM, 10000));
	MUST(pwrite(MEM, "memory", 6, 5000));
	MUST(lseek(MEM, 4096, SEEK_SET));
	MUST(fcntl(MEM, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	char pp[64];
	snprintf(pp, sizeof pp, "/proc/self/fd/%d", MEM);
	at(MUST(open(pp, O_RDONLY)), MEM2, 1);
	at(MUST(memfd_create("big", 0)), MEMBIG, 0);
	MUST(ftruncate(MEMBIG, 3 << 20));
	MUST(pwrite(MEMBIG, "end", 3, (3 << 20) - 3));

	struct sockaddr_in a = in4(0);
	socklen_t al = sizeof a;
	at(MUST(socket(AF_INET, SOCK_STREAM, 0)), TCP4, 1);
	setint(TCP4, SOL_SOCKET, SO_REUSEADDR, 1);
	setint(TCP4, IPPROTO_TCP, TCP_DEFER_ACCEPT, 5);
	setint(TCP4, SOL_SOCKET, SO_RCVBUF, 50000);
	setint(TCP4, IPPROTO_TCP, TCP_KEEPIDLE, 77);
	MUST(bind(TCP4, (void *)&a, al)); MUST(listen(TCP4, 77));
	struct sockaddr_in6 a6 = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	at(MUST(socket(AF_INET6, SOCK_STREAM | SOCK_NONBLOCK, 0)), TCP6, 0);
	setint(TCP6, IPPROTO_IPV6, IPV6_V6ONLY, 1);
	setint(TCP6, SOL_SOCKET, SO_REUSEADDR, 1);
	MUST(bind(TCP6, (void *)&a6, sizeof a6)); MUST(listen(TCP6, 5));
	at(MUST(socket(AF_INET, SOCK_DGRAM, 0)), UDP, 0);
	setint(UDP, IPPROTO_IP, IP_TOS, 0x10);
	a = in4(0);
	MUST(bind(UDP, (void *)&a, al)); MUST(getsockname(UDP, (void *)&a, &al));
	at(MUST(socket(AF_INET, SOCK_DGRAM, 0)), UDPC, 0);
	MUST(connect(UDPC, (void *)&a, al));
	at(MUST(socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0)), UDPF, 0);
	setint(UDPF, SOL_SOCKET, SO_BROADCAST, 1);
	at(MUST(socket(AF_INET, SOCK_STREAM, 0)), TCPF, 0);
	setint(TCPF, IPPROTO_TCP, TCP_NODELAY, 1);
	struct linger lg = {1, 9};
	MUST(setsockopt(TCPF, SOL_SOCKET, SO_LINGER, &lg, sizeof lg));
	at(MUST(socket(AF_INET, SOCK_STREAM, 0)), TCPB, 0);
	setint(TCPB, SOL_SOCKET, SO_REUSEADDR, 1);
	a = in4(0);
	MUST(bind(TCPB, (void *)&a, sizeof a));

	at(MUST(socket(AF_INET, SOCK_STREAM, 0)), OWNPORT, 0);
	a = in4(0); al = sizeof a;
	MUST(bind(OWNPORT, (void *)&a, al)); MUST(listen(OWNPORT, 5)); MUST(getsockname(OWNPORT, (void *)&a, &al));
	at(MUST(socket(AF_INET, SOCK_STREAM, 0)), CONN, 0);
	MUST(connect(CONN, (void *)&a, al));
	at(MUST(accept(OWNPORT, NULL, NULL)), ACC, 0);

	at(MUST(socket(AF_UNIX, SOCK_STREAM, 0)), UL, 0);
	ua = un(path("s.sock"), 0, &ul);
	MUST(bind(UL, (void *)&ua, ul)); MUST(chmod(path("s.sock"), 0640)); MUST(listen(UL, 33));
	at(MUST(socket(AF_UNIX, SOCK_DGRAM, 0)), UDG, 0);
	char name[64];
	snprintf(name, sizeof name, "pageferry-test-%d", getpid());
	FILE *f = fopen(path("name"), "w");
	fputs(name, f);
	fclose(f);
	ua = un(name, 1, &ul);
	MUST(bind(UDG, (void *)&ua, ul));
	int c = MUST(socket(AF_UNIX, SOCK_DGRAM, 0));
	MUST(sendto(c, "d1", 2, 0, (void *)&ua, ul)); MUST(sendto(c, "d22", 3, 0, (void *)&ua, ul));
	close(c);
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, p));
	at(p[0], SA, 0); at(p[1], SB, 1);
	char *buf = malloc(100000);
	for (int i = 0; i < 100000; i++) buf[i] = i % 251;
	MUST(write(SB, buf, 100000));
	MUST(shutdown(SB, SHUT_WR));
	MUST(write(SA, "back", 4));
	MUST(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, p));
	at(p[0], QA, 0); at(p[1], QB, 0);
	MUST(write(QB, "a", 1)); MUST(write(QB, "bb", 2)); MUST(write(QB, "ccc", 3));
	MUST(socketpair(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK, 0, p));
	at(p[0], GA, 0); at(p[1], GB, 0);
	MUST(write(GB, "dg", 2)); MUST(write(GB, "dgram", 5));
	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, p));
	at(p[0], LAST, 0); MUST(write(p[1], "last", 4)); close(p[1]);

	at(MUST(socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE)), NLR, 0);
	struct sockaddr_nl nl = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_IPV4_MROUTE};
	MUST(bind(NLR, (void *)&nl, sizeof nl));
	at(MUST(socket(AF_NETLINK, SOCK_DGRAM, NETLINK_KOBJECT_UEVENT)), NLU, 0);

	at(MUST(open(path("l1"), O_CREAT | O_RDWR, 0600)), FLOCKED, 0);
	MUST(flock(FLOCKED, LOCK_EX));
	at(MUST(open(path("l2"), O_CREAT | O_RDWR, 0600)), POSIXED, 0);
	struct flock fl = {.l_type = F_WRLCK, .l_start = 10, .l_len = 10};
	MUST(fcntl(POSIXED, F_SETLK, &fl));
	at(MUST(open(path("l3"), O_CREAT | O_RDWR, 0600)), OFDED, 0);
	fl = (struct flock){.l_type = F_RDLCK, .l_start = 5};
	MUST(fcntl(OFDED, F_OFD_SETLK, &fl));

	MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, p));
	at(p[0], ASYNC_A, 0); at(p[1], ASYNC_B, 0);
	MUST(fcntl(ASYNC_A, F_SETOWN, getpid())); MUST(fcntl(ASYNC_A, F_SETSIG, SIGRTMIN + 4));
	MUST(fcntl(ASYNC_A, F_SETFL, O_ASYNC));

	at(MUST(epoll_create1(0)), EP, 1);
	at(MUST(epoll_create1(0)), EP2, 0);
	struct epoll_event e;
#define ADD(ep, fd, ev, d) (e.events = (ev), e.data.u64 = (d), MUST(epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e)))
	ADD(EP, PR, EPOLLIN | EPOLLET, 0x1111);
	ADD(EP, TCP4, EPOLLIN | EPOLLEXCLUSIVE, 0x2222);
	ADD(EP, T_PERIOD, EPOLLIN | EPOLLONESHOT, 0x3333);
	ADD(EP, SIGFD, EPOLLIN, 0x9999);
	ADD(EP, CONN, EPOLLIN | EPOLLRDHUP, 0xaaaa);
	MUST(dup2(SEM, GHOST));
	ADD(EP2, GHOST, EPOLLIN, 0x4444);
	MUST(close(GHOST));
	MUST(dup2(EV, REUSED));
	ADD(EP2, REUSED, EPOLLIN, 0x5555);
	MUST(dup2(UDP, REUSED));
	ADD(EP2, REUSED, EPOLLIN, 0x6666);
	ADD(EP, EP2, EPOLLIN, 0x7777);
}

static volatile sig_atomic_t asynced;
static void onasync(int sig, siginfo_t *si, void *u) { (void)sig; (void)u; asynced = si->si_fd; }

static void check_epoll(void) {
	struct epoll_event e[16];
	int n = epoll_wait(EP2, e, 16, 0), ghost = 0, reused = 0, udp = 0;
	for (int i = 0; i < n; i++) {
		ghost += e[i].data.u64 == 0x4444;
		reused += e[i].data.u64 == 0x5555;
		udp += e[i].data.u64 == 0x6666;
	}
	CHECK(n == 2 && ghost == 1 && reused == 1 && udp == 0);
	struct sockaddr_in a;
	socklen_t al = sizeof a;
	CHECK(getsockname(UDP, (void *)&a, &al) == 0);
	CHECK(sendto(UDPF, "u", 1, 0, (void *)&a, al) == 1);
	n = epoll_wait(EP2, e, 16, 1000);
	for (int i = 0; i < n; i++) udp += e[i].data.u64 == 0x6666;
	CHECK(udp == 1);
	n = epoll_wait(EP, e, 16, 0);
	int pr = 0, nested = 0;
	for (int i = 0; i < n; i++) {
		pr += e[i].data.u64 == 0x1111;
		nested += e[i].data.u64 == 0x7777;
	}
	CHECK(pr == 1 && nested == 1);
	n = epoll_wait(EP, e, 16, 0);
	for (int i = 0; i < n; i++) CHECK(e[i].data.u64 != 0x1111); // edge-triggered
	// A registration exists: adding it again says so.
	e[0].events = EPOLLIN;
	CHECK(epoll_ctl(EP, EPOLL_CTL_ADD, TCP4, e) == -1 && errno == EEXIST);
	CHECK(epoll_ctl(EP, EPOLL_CTL_ADD, T_PERIOD, e) == -1 && errno == EEXIST);
	CHECK(epoll_ctl(EP2, EPOLL_CTL_ADD, REUSED, e) == -1 && errno == EEXIST);
}

static void check(int restored) {
	char b[4096];
	struct stat st;
	// epoll first: later checks consume what it reports.
	check_epoll();
	CHECK(lseek(DATA, 0, SEEK_CUR) == 5 && lseek(DATA_DUP, 0, SEEK_CUR) == 5);
	CHECK(read(DATA, b, 3) == 3 && !memcmp(b, " wo", 3) && lseek(DATA_DUP, 0, SEEK_CUR) == 8);
	CHECK(fcntl(DATA, F_GETFD) == FD_CLOEXEC && fcntl(DATA_DUP, F_GETFD) == 0);
	CHECK(fcntl(LOG, F_GETFL) & O_APPEND);
	CHECK(write(LOG, "two\n", 4) == 4 && lseek(LOG, 0, SEEK_CUR) == 8);
	CHECK(fstat(GONE, &st) == 0 && st.st_nlink == 0 && st.st_size == 1 << 20 && (st.st_mode & 0777) == 0600);
	CHECK(read(GONE, b, 2) == 2 && b[0] == 'a' + 100 % 26 && lseek(GONE2, 0, SEEK_CUR) == 0);
	CHECK(pwrite(GONE, "Z", 1, 0) == 1 && pread(GONE2, b, 1, 0) == 1 && b[0] == 'Z');
	CHECK(write(GONE2, "x", 1) == -1 && errno == EBADF);
	CHECK(openat(DIRFD, "data", O_PATH) >= 0);
	CHECK(openat(OPATH, "data", O_PATH) >= 0 && (fcntl(OPATH, F_GETFL) & O_PATH));
	CHECK(read(PROCFS, b, 5) == 5 && !memcmp(b, "Name:", 5));

	CHECK(read(PR, b, 99) == 6 && !memcmp(b, "unread", 6));
	CHECK(read(PR, b, 99) == -1 && errno == EAGAIN && !(fcntl(PW, F_GETFL) & O_NONBLOCK));
	CHECK(fcntl(PR, F_GETPIPE_SZ) == 131072 && write(PW, "y", 1) == 1 && read(PR, b, 9) == 1);
	CHECK(read(DR, b, 99) == 2 && read(DR, b, 99) == 3 && (fcntl(DW, F_GETFL) & O_DIRECT));
	CHECK(write(DW, "1", 1) == 1 && write(DW, "2", 1) == 1 && read(DR, b, 9) == 1 && b[0] == '1');
	CHECK(read(HUP_R, b, 9) == 1 && b[0] == 'x' && read(HUP_R, b, 9) == 0);
	CHECK(write(HUP_W, "x", 1) == -1 && errno == EPIPE);
	CHECK(read(FIFO, b, 99) == 4 && !memcmp(b, "fifo", 4));

	uint64_t v;
	CHECK(read(EV, &v, 8) == 8 && v == 7);
	for (int i = 0; i < 3; i++) CHECK(read(SEM, &v, 8) == 8 && v == 1);
	CHECK(read(SEM, &v, 8) == -1 && errno == EAGAIN);
	struct itimerspec it;
	CHECK(timerfd_gettime(T_PERIOD, &it) == 0 && it.it_interval.tv_sec == 5 && it.it_interval.tv_nsec == 6);
	CHECK(it.it_value.tv_sec <= 3600 && it.it_value.tv_sec > 3500);
	CHECK(read(T_PERIOD, &v, 8) == -1 && errno == EAGAIN);
	CHECK(read(T_FIRED, &v, 8) == 8 && v == 1);
	CHECK(read(T_LATE, &v, 8) == 8 && v == 1);
	CHECK(timerfd_gettime(T_LATE, &it) == 0 && it.it_value.tv_sec > 3500 && it.it_interval.tv_sec == 3600);
	CHECK(timerfd_gettime(T_ABS, &it) == 0 && it.it_value.tv_sec > 900 && it.it_value.tv_sec <= 1000);

	sigset_t s;
	sigemptyset(&s); sigaddset(&s, SIGUSR2);
	sigprocmask(SIG_BLOCK, &s, NULL);
	raise(SIGUSR2);
	struct signalfd_siginfo si;
	struct epoll_event ev[16];
	int n = epoll_wait(EP, ev, 16, 0), sig = 0;
	for (int i = 0; i < n; i++) sig += ev[i].data.u64 == 0x9999;
	CHECK(sig == 1);
	CHECK(read(SIGFD, &si, sizeof si) == sizeof si && si.ssi_signo == SIGUSR2);

	CHECK(read(INO, b, sizeof b) == -1 && errno == EAGAIN);
	close(creat(path("w2/x"), 0600)); close(creat(path("w3/y"), 0600));
	struct inotify_event *ie = (void *)b;
	CHECK(read(INO, b, sizeof b) > 0 && ie->wd == 3 && ie->mask == IN_CREATE && !strcmp(ie->name, "y"));
	unlink(path("w2/x")); unlink(path("w3/y"));
	CHECK(inotify_add_watch(INO, path("w1"), IN_CREATE) == 1);

	CHECK(lseek(MEM, 0, SEEK_CUR) == 4096 && pread(MEM2, b, 6, 5000) == 6 && !memcmp(b, "memory", 6));
	CHECK(fcntl(MEM, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW) && fstat(MEM, &st) == 0 && st.st_size == 10000);
	CHECK(pwrite(MEM, "M", 1, 5000) == 1 && pread(MEM2, b, 1, 5000) == 1 && b[0] == 'M');
	CHECK(write(MEM2, "x", 1) == -1 && fcntl(MEM2, F_GETFD) == FD_CLOEXEC);
	CHECK(fstat(MEMBIG, &st) == 0 && st.st_size == 3 << 20 && pread(MEMBIG, b, 9, (3 << 20) - 3) == 3 && !memcmp(b, "end", 3));
	CHECK(fcntl(MEMBIG, F_GET_SEALS) == F_SEAL_SEAL);
	char pp[64];
	snprintf(pp, sizeof pp, "/proc/self/fd/%d", MEM);
	n = readlink(pp, b, sizeof b);
	CHECK(n > 9 && !memcmp(b, "/memfd:m1", 9));
	CHECK(read(DEVNULL, b, 1) == 0 && read(HIGH, b, 1) == 0 && read(URANDOM, b, 8) == 8);

	struct sockaddr_in a;
	socklen_t al = sizeof a;
	CHECK(getint(TCP4, SOL_SOCKET, SO_ACCEPTCONN) == 1 && getint(TCP4, SOL_SOCKET, SO_REUSEADDR) == 1);
	CHECK(getint(TCP4, SOL_SOCKET, SO_RCVBUF) == 100000 && getint(TCP4, IPPROTO_TCP, TCP_KEEPIDLE) == 77);
	CHECK(getint(TCP4, IPPROTO_TCP, TCP_DEFER_ACCEPT) >= 5);
	struct tcp_info ti;
	socklen_t tl = sizeof ti;
	CHECK(getsockopt(TCP4, IPPROTO_TCP, TCP_INFO, &ti, &tl) == 0 && ti.tcpi_sacked == 77);
	CHECK(getsockname(TCP4, (void *)&a, &al) == 0);
	int c = socket(AF_INET, SOCK_STREAM, 0);
	CHECK(connect(c, (void *)&a, al) == 0);
	CHECK(write(c, "hi", 2) == 2);
	int k = accept(TCP4, NULL, NULL);
	CHECK(k >= 0 && read(k, b, 9) == 2);
	close(c); close(k);
	CHECK(getint(TCP6, IPPROTO_IPV6, IPV6_V6ONLY) == 1 && getint(TCP6, SOL_SOCKET, SO_ACCEPTCONN) == 1);
	CHECK(accept(TCP6, NULL, NULL) == -1 && errno == EAGAIN);
	al = sizeof a;
	CHECK(getsockname(UDP, (void *)&a, &al) == 0 && getint(UDP, IPPROTO_IP, IP_TOS) == 0x10);
	CHECK(recv(UDP, b, 9, 0) == 1);
	CHECK(write(UDPC, "data", 4) == 4 && recv(UDP, b, 9, 0) == 4);
	CHECK(getint(UDPF, SOL_SOCKET, SO_BROADCAST) == 1 && (fcntl(UDPF, F_GETFL) & O_NONBLOCK));
	struct linger lg;
	al = sizeof lg;
	CHECK(getint(TCPF, IPPROTO_TCP, TCP_NODELAY) == 1 && getsockopt(TCPF, SOL_SOCKET, SO_LINGER, &lg, &al) == 0 && lg.l_onoff && lg.l_linger == 9);
	CHECK(listen(TCPB, 1) == 0);

	struct pollfd pf = {CONN, POLLIN | POLLRDHUP, 0};
	if (restored) {
		CHECK(poll(&pf, 1, 0) == 1 && (pf.revents & (POLLHUP | POLLERR)) == (POLLHUP | POLLERR));
		n = epoll_wait(EP, ev, 16, 0);
		int conn = 0;
		for (int i = 0; i < n; i++) conn += ev[i].data.u64 == 0xaaaa && (ev[i].events & EPOLLHUP);
		CHECK(conn == 1);
		CHECK(read(CONN, b, 1) == -1 && errno == ECONNRESET && read(CONN, b, 1) == 0);
		CHECK(write(ACC, b, 1) == -1 && (errno == ECONNRESET || errno == EPIPE));
	} else {
		CHECK(write(CONN, "live", 4) == 4 && read(ACC, b, 9) == 4);
	}

	struct sockaddr_un ua;
	socklen_t ul;
	struct ucred uc;
	ua = un(path("s.sock"), 0, &ul);
	c = socket(AF_UNIX, SOCK_STREAM, 0);
	CHECK(connect(c, (void *)&ua, ul) == 0 && (k = accept(UL, NULL, NULL)) >= 0);
	al = sizeof uc;
	CHECK(getsockopt(c, SOL_SOCKET, SO_PEERCRED, &uc, &al) == 0 && uc.pid == getpid());
	CHECK(stat(path("s.sock"), &st) == 0 && (st.st_mode & 0777) == 0640);
	close(c); close(k);
	CHECK(recv(UDG, b, 99, MSG_DONTWAIT) == 2 && recv(UDG, b, 99, MSG_DONTWAIT) == 3 && !memcmp(b, "d22", 3));
	FILE *f = fopen(path("name"), "r");
	char name[64] = "";
	CHECK(f && fgets(name, sizeof name, f));
	ua = un(name, 1, &ul);
	CHECK(sendto(GA, "x", 1, 0, (void *)&ua, ul) == 1 && recv(UDG, b, 9, MSG_DONTWAIT) == 1);

	char *big = malloc(200000);
	size_t got = 0;
	for (ssize_t r; (r = read(SA, big + got, 200000 - got)) > 0;) got += r;
	CHECK(got == 100000 && read(SA, b, 1) == 0);
	for (size_t i = 0; i < got; i++) if ((unsigned char)big[i] != i % 251) { CHECK(!"stream content"); break; }
	CHECK(read(SB, b, 9) == 4 && !memcmp(b, "back", 4));
	CHECK(write(SB, "x", 1) == -1 && errno == EPIPE);
	al = sizeof uc;
	CHECK(getsockopt(SA, SOL_SOCKET, SO_PEERCRED, &uc, &al) == 0 && uc.pid == getpid());
	CHECK(read(QA, b, 99) == 1 && read(QA, b, 99) == 2 && read(QA, b, 99) == 3 && !memcmp(b, "ccc", 3));
	CHECK(recv(QA, b, 99, MSG_DONTWAIT) == -1 && errno == EAGAIN);
	CHECK(read(GA, b, 99) == 2 && read(GA, b, 99) == 5 && read(GA, b, 99) == -1 && errno == EAGAIN);
	CHECK(getint(GA, SOL_SOCKET, SO_PEEK_OFF) == -1);
	CHECK(read(LAST, b, 99) == 4 && read(LAST, b, 99) == 0);

	struct sockaddr_nl nl;
	al = sizeof nl;
	CHECK(getsockname(NLR, (void *)&nl, &al) == 0 && nl.nl_groups == RTMGRP_IPV4_MROUTE && nl.nl_pid != 0);
	al = sizeof nl;
	CHECK(getsockname(NLU, (void *)&nl, &al) == 0 && nl.nl_pid == 0);

	int l = open(path("l1"), O_RDWR);
	CHECK(flock(l, LOCK_SH | LOCK_NB) == -1 && errno == EWOULDBLOCK);
	l = open(path("l3"), O_RDWR);
	struct flock fl = {.l_type = F_WRLCK, .l_start = 7, .l_len = 1};
	CHECK(fcntl(l, F_OFD_GETLK, &fl) == 0 && fl.l_type == F_RDLCK && fl.l_start == 5 && fl.l_len == 0);
	pid_t kid = fork();
	if (kid == 0) {
		// POSIX locks are seen by another process only.
		struct flock q = {.l_type = F_WRLCK};
		_exit(fcntl(POSIXED, F_GETLK, &q) == 0 && q.l_type == F_WRLCK && q.l_start == 10 && q.l_len == 10 && q.l_pid == getppid() ? 0 : 1);
	}
	int status;
	CHECK(waitpid(kid, &status, 0) == kid && status == 0);

	struct sigaction sa = {.sa_sigaction = onasync, .sa_flags = SA_SIGINFO};
	sigaction(SIGRTMIN + 4, &sa, NULL);
	CHECK(write(ASYNC_B, "x", 1) == 1);
	CHECK(asynced == ASYNC_A);
	CHECK(fcntl(GHOST, F_GETFD) == -1 && errno == EBADF);
}

int main(int argc, char **argv) {
	if (argc != 3) return 2;
	dir = argv[2];
	close_range(3, ~0U, 0); // what whoever started us has left open
	int restored = !strcmp(argv[1], "wait");
	signal(SIGPIPE, SIG_IGN);
	sigset_t s;
	sigemptyset(&s);
	sigaddset(&s, SIGUSR1);
	sigprocmask(SIG_BLOCK, &s, NULL);
	if (!restored) make();
	char tmp[512];
	snprintf(tmp, sizeof tmp, "%s", path(restored ? "ready2" : "ready1"));
	close(creat(tmp, 0600));
	int sig;
	sigwait(&s, &sig);
	result = fopen(path("result.tmp"), "w");
	check(restored);
	fprintf(result, "%d failures\n", failures);
	fclose(result);
	rename(path("result.tmp"), path(restored ? "result2" : "result1"));
	pause();
	return 0;
}
