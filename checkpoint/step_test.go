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
	for (;;)
		for (int i = 0; i < 1000; i++)
			clock_gettime(CLOCK_MONOTONIC, &ts);
}
`

// TestThreadsLeaveTheVDSO: a program that reads the clock all the time stands in
// the vdso most of the time, and never in a capture.
func TestThreadsLeaveTheVDSO(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "clockreader", clockReader))
	p.WaitText("ready", 20*time.Second)
	s, ctx := openFor(t, p.Pid())
	must(t, s.Isolate(ctx))
	for range 50 {
		must(t, s.Freeze(ctx))
		if s.vdso.Empty() {
			t.Fatal("it has no vdso")
		}
		var r sys.Regs
		var err error
		s.tr.Do(func() { err = sys.PtraceGetRegs(p.Pid(), &r) })
		must(t, err)
		if s.vdso.Contains(page.Addr(r.Rip)) {
			t.Errorf("it stands at %#x, in the vdso", r.Rip)
		}
		_, _, err = s.Capture(ctx)
		must(t, err)
		must(t, s.Thaw(ctx))
		must(t, s.Isolate(ctx))
	}
}
