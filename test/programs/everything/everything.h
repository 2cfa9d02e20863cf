/*
 * everything: a program that uses as much of what a process can hold as it can,
 * and checks all the time that none of it changed under it.
 *
 * It is silent while all is well. At the first violation it says what is wrong
 * (standard output, report file, heartbeat) and exits with 1. On SIGTERM it
 * verifies what can only be verified at the end, says OK and exits with 0.
 *
 * All signals are blocked in all threads, but in those that are there for a
 * signal: whoever sees EINTR was interrupted by something that should not be
 * noticed.
 */
#ifndef EVERYTHING_H
#define EVERYTHING_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct options {
	int threads;          /* register threads */
	long mem_mib;         /* memory that is verified all the time */
	long beat_us;         /* microseconds between heartbeats */
	long pace;            /* naps are that many times as long: less work */
	const char *beat_to;  /* "unix:PATH" or "udp:IP:PORT", or NULL */
	const char *identity; /* in heartbeats */
	const char *report;   /* file for the outcome, or NULL */
	const char *dir;      /* for its files */
	bool sigcont_ok;      /* SIGCONT may interrupt what signal(7) says it does */
	bool veiled;          /* memory may be a file's for a while: MADV_FREE fails then */
};
extern struct options opt;

/* has reports whether a check is wanted (--only, --without). */
bool has(const char *check);
/* has_asked reports whether a check that is off by default was asked for (--with). */
bool has_asked(const char *check);

/* bad reports a violation and ends the program. */
void bad(const char *fmt, ...) __attribute__((noreturn, format(printf, 1, 2)));
/* must ends the program if a call that cannot fail did. */
#define must(e) ({ long must_ = (long)(e); if (must_ == -1) bad("%s: %s", #e, strerror(errno)); must_; })
#define check(c, ...) do { if (!(c)) bad(__VA_ARGS__); } while (0)

bool running(void);

/* give_up_lazily is MADV_FREE: what is there may be gone, or not, when it is looked
 * at next. That is so where the call fails as well. */
void give_up_lazily(void *at, size_t n);

/* start makes a thread with all signals blocked; its body is called over and
 * over until the end, and must come back often: who does not is reported. */
void start(const char *name, void (*body)(void *), void *arg);
/* start_last is start, with something to do once after the end has begun: wake
 * those that wait for this thread. */
void start_last(const char *name, void (*body)(void *), void (*last)(void *), void *arg);
/* start_raw makes a thread whose body loops by itself and calls tick(). */
void start_raw(const char *name, void *(*body)(void *), void *arg);
void tick(void);
/* at_end registers a check for the end, when all other threads have gone. */
void at_end(void (*f)(void));

int64_t now_ns(clockid_t c);
void sleep_us(long us);
uint64_t rnd(uint64_t *state);

/* interrupted fails if a call was interrupted. by_cont says that SIGCONT alone
 * may do so (signal(7), "Interruption of system calls by stop signals"). Where
 * it does, and it was allowed, interrupted returns true. */
bool interrupted(const char *call, long rc, bool by_cont);

/* The signals, each with one use. */
enum {
	SIG_TIMER = 1, /* offsets from SIGRTMIN */
	SIG_TIMER_THREAD,
	SIG_QUEUE,
	SIG_PENDING,
	SIG_PENDING_THREAD,
	SIG_FD,
	SIG_SUSPEND,
	SIG_NEVER,
};

void beat_start(void);
void beat_text(const char *text);

void regs_start(void);
void waits_start(void);
void timers_start(void);
void signals_start(void);
void sync_start(void);
void memory_start(void);
void files_start(void);
void clocks_start(void);
void churn_start(void);
void halves_start(void);
void sparse_start(void);
void spawn_start(void);
void trim_start(void);
void shapes_start(void);
void shared_start(void);

#endif
