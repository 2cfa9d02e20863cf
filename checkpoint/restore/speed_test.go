package restore

import (
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
)

// many has 200 threads and 5000 mappings.
const many = `
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
static void *wait_for_ever(void *arg) { for (;;) pause(); return arg; }
int main(void) {
	pthread_attr_t a;
	pthread_t t;
	pthread_attr_init(&a);
	pthread_attr_setstacksize(&a, 1 << 16);
	for (int i = 0; i < 199; i++)
		if (pthread_create(&t, &a, wait_for_ever, NULL)) return 1;
	char *m = mmap(NULL, 5000 * 4096L, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (long i = 0; i < 5000; i += 2) {
		m[i * 4096] = 1;
		mprotect(m + i * 4096, 4096, PROT_READ);
	}
	printf("ready\n"); fflush(stdout);
	pause();
}
`

// A process of many threads and mappings moves; the times are in the log.
func TestManyThreadsAndMappings(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "many", many))
	p.WaitText("ready", limit)
	for range 2 {
		trap := move(t, p, nil)
		trap.resident(t)
		if !p.Alive() {
			t.Fatal("it is gone")
		}
	}
}
