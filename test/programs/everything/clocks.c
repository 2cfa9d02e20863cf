/* Clocks: none that must not may go back. */
#include "everything.h"

static const struct {
	clockid_t id;
	const char *name;
} clocks[] = {
	{ CLOCK_MONOTONIC, "CLOCK_MONOTONIC" },
	{ CLOCK_MONOTONIC_RAW, "CLOCK_MONOTONIC_RAW" },
	{ CLOCK_MONOTONIC_COARSE, "CLOCK_MONOTONIC_COARSE" },
	{ CLOCK_BOOTTIME, "CLOCK_BOOTTIME" },
};
#define N (sizeof(clocks) / sizeof(clocks[0]))

static void body(void *arg)
{
	int64_t *last = arg;

	for (size_t i = 0; i < N; i++) {
		int64_t now = now_ns(clocks[i].id);

		check(now >= last[i], "%s went back by %ld ns", clocks[i].name, (long)(last[i] - now));
		/* An hour: another host's clock, not a long pause. */
		check(!last[i] || now - last[i] < 3600000000000LL, "%s jumped %ld s ahead", clocks[i].name,
		      (long)((now - last[i]) / 1000000000));
		last[i] = now;
	}
	sleep_us(2000);
}

void clocks_start(void)
{
	static int64_t last[N];

	start("clocks", body, last);
}
