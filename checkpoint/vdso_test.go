package checkpoint

import (
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

const clockReader = `
#include <stdio.h>
#include <time.h>
int main(void) {
	struct timespec ts;
	puts("ready");
	fflush(stdout);
	for (volatile unsigned long n = 0;;) {
		clock_gettime(CLOCK_MONOTONIC, &ts);
		for (int i = 0; i < 300; i++)
			n += ts.tv_nsec;
	}
}
`

// TestThreadsLeaveTheVDSO: a program that reads the clock several times in a
// microsecond stands in the vdso one time in eight, and hardly ever in a capture.
func TestThreadsLeaveTheVDSO(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "clockreader", clockReader))
	p.WaitText("ready", 20*time.Second)
	s, ctx := openFor(t, p.Pid())
	must(t, s.Isolate(ctx))
	inside := 0
	for range 200 {
		must(t, s.Freeze(ctx))
		if s.vdso.Empty() {
			t.Fatal("it has no vdso")
		}
		var r sys.Regs
		var err error
		s.tr.Do(func() { err = sys.PtraceGetRegs(p.Pid(), &r) })
		must(t, err)
		if s.vdso.Contains(page.Addr(r.Rip)) {
			inside++
		}
		_, _, err = s.Capture(ctx)
		must(t, err)
		must(t, s.Thaw(ctx))
		must(t, s.Isolate(ctx))
	}
	t.Logf("%d of 200 times in the vdso", inside)
	if inside > 10 {
		t.Errorf("it stands in the vdso %d of 200 times", inside)
	}
}
