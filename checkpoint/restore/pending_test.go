package restore

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sys/unix"
)

// TestPendingFault: a thread was stopped between a fault of its own and the
// handler, which must find the signal as the kernel made it.
func TestPendingFault(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2, testutil.Userfaultfd, testutil.Namespaces)
	testutil.NoLeaks(t)
	ctx := timed(t)
	cfg := config(t)
	img, mem, trap, _ := tiny(t, freePID(t))
	defer trap.close()
	cfg.PIDNamespace = NamespaceNew
	const segvMapErr = 1
	var si sys.Siginfo
	binary.LittleEndian.PutUint32(si[0:], uint32(unix.SIGSEGV))
	binary.LittleEndian.PutUint32(si[8:], segvMapErr)
	binary.LittleEndian.PutUint64(si[16:], 0x7f545dc67000)
	img.Processes[0].Threads[0].Pending = [][]byte{si[:]}
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(ctx)
	if err := s.Rebuild(ctx, img, mem, trap); err != nil {
		t.Fatal(err)
	}
	if err := s.Park(ctx); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID()))
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("SigPnd:\t%016x\n", sys.SigBit(int(unix.SIGSEGV))); !strings.Contains(string(b), want) {
		t.Errorf("no %q in\n%s", want, b)
	}
}
