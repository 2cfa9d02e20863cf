/* Heartbeats: "beat IDENTITY COUNTER NONCE [TEXT]", see testutil.Recorder. */
#include "everything.h"

#include <arpa/inet.h>
#include <stdatomic.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

static union {
	struct sockaddr sa;
	struct sockaddr_un un;
	struct sockaddr_in in;
} to;
static socklen_t to_len;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t counter;
static int64_t longest, last;

/* A socket is made for each heartbeat, so that between two of them there is
 * none that would have to be carried. What cannot be sent is lost, and its
 * counter with it. */
static void send_beat(const char *text)
{
	char line[600];
	uint64_t nonce;
	int fd, n;

	if (!to_len)
		return;
	pthread_mutex_lock(&lock);
	counter++;
	if (getrandom(&nonce, sizeof(nonce), 0) != sizeof(nonce))
		nonce = (uint64_t)now_ns(CLOCK_REALTIME);
	n = snprintf(line, sizeof(line), "beat %s %lu %lx %s", opt.identity,
		     (unsigned long)counter, (unsigned long)nonce, text);
	fd = socket(to.sa.sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd >= 0) {
		(void)!sendto(fd, line, n, MSG_DONTWAIT | MSG_NOSIGNAL, &to.sa, to_len);
		close(fd);
	}
	pthread_mutex_unlock(&lock);
}

void beat_text(const char *text)
{
	send_beat(text);
}

static void body(void *arg)
{
	int64_t now = now_ns(CLOCK_MONOTONIC);
	char text[40];

	(void)arg;
	if (last) {
		check(now >= last, "CLOCK_MONOTONIC went back by %ld ns", (long)(last - now));
		if (now - last > longest)
			longest = now - last;
	}
	last = now;
	snprintf(text, sizeof(text), "gap %ld", (long)longest);
	send_beat(text);
	sleep_us(opt.beat_us / opt.pace);
}

void beat_start(void)
{
	const char *s = opt.beat_to;

	if (!s)
		return;
	if (strncmp(s, "unix:", 5) == 0) {
		to.un.sun_family = AF_UNIX;
		check(strlen(s + 5) < sizeof(to.un.sun_path), "heartbeat path is too long");
		strcpy(to.un.sun_path, s + 5);
		to_len = sizeof(to.un);
	} else if (strncmp(s, "udp:", 4) == 0) {
		char ip[64];
		int port;

		check(sscanf(s + 4, "%63[^:]:%d", ip, &port) == 2, "heartbeat address %s", s);
		to.in.sin_family = AF_INET;
		to.in.sin_port = htons(port);
		check(inet_pton(AF_INET, ip, &to.in.sin_addr) == 1, "heartbeat address %s", s);
		to_len = sizeof(to.in);
	} else {
		bad("heartbeat address %s", s);
	}
	start("beat", body, NULL);
}
