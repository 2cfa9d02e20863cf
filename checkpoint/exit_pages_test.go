package checkpoint

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

// A robust mutex that a thread holds lies where the kernel finds it, should the
// thread end before the page is asked for: a fault of an exiting thread goes
// nowhere.
func TestHeldRobustMutexIsEager(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	bin := testutil.CCText(t, "holder", `
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static pthread_mutex_t *held, *free_;
static void *hold(void *arg)
{
	pthread_mutex_lock(held);
	printf("ready %p %p\n", (void *)held, (void *)free_);
	fflush(stdout);
	pause();
	return NULL;
}
int main(void)
{
	pthread_mutexattr_t a;
	pthread_t t;
	held = aligned_alloc(4096, 4096);
	free_ = aligned_alloc(4096, 4096);
	pthread_mutexattr_init(&a);
	pthread_mutexattr_setrobust(&a, PTHREAD_MUTEX_ROBUST);
	pthread_mutex_init(held, &a);
	pthread_mutex_init(free_, &a);
	pthread_create(&t, NULL, hold, NULL);
	pthread_join(t, NULL);
	return 0;
}
`)
	p := testutil.Start(t, bin)
	p.WaitText("ready", 20*time.Second)
	var held, free uint64
	if _, err := fmt.Sscanf(strings.TrimSpace(p.Text()), "ready 0x%x 0x%x", &held, &free); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Isolate(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	img, mem, err := s.Capture(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	if !mem[0].Eager.Contains(page.Addr(held)) || mem[0].Lazy.Contains(page.Addr(held)) {
		t.Errorf("a robust mutex that is held may come late")
	}
	if mem[0].Eager.Contains(page.Addr(free)) {
		t.Error("a mutex that nobody holds is eager")
	}
	for _, th := range img.Processes[0].Threads {
		if a := page.Addr(th.ClearTID); th.ClearTID != 0 && !mem[0].Eager.Contains(a) && page.PageOf(a) != page.PageOf(page.Addr(th.Rseq.Ptr)) {
			t.Errorf("thread %d: what the kernel clears at its end may come late", th.TID)
		}
	}
}
