package dirty_test

import (
	"testing"
	"time"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

type test struct {
	name  string
	guest func(t *testing.T) // what is run in the guest, if anything
}

// everyMethod are the tests that run with every method there is.
func everyMethod() []test {
	return []test{
		{"TestRandom", TestRandom},
		{"TestHugePageDropped", TestHugePageDropped},
		{"TestFilePageDropped", TestFilePageDropped},
		{"TestExact", TestExact},
		{"TestClosedTracker", TestClosedTracker},
		{"TestMovedOnto", TestMovedOnto},
		{"TestKindsApart", TestKindsApart},
		{"TestLeftOut", TestLeftOut},
		{"TestGuards", nil}, // MADV_GUARD_INSTALL is of Linux 6.13, the guest is older
		{"TestNewLargeMapping", TestNewLargeMapping},
		{"TestSharedAnonymous", TestSharedAnonymous},
		{"TestSharedHole", TestSharedHole},
		{"TestSharedFork", TestSharedFork},
		{"TestSharedMemfd", TestSharedMemfd},
		{"TestPrivateMemfd", TestPrivateMemfd},
		{"TestBecomesShared", TestBecomesShared},
		{"TestProcessEnds", TestProcessEnds},
	}
}

// inGuest is the method that tests in the guest run with.
var inGuest = dirty.SoftDirty

// TestInGuest runs them with soft-dirty bits, which many hosts lack, and the
// random one with write protection too, as another kernel has it.
func TestInGuest(t *testing.T) {
	testutil.NoLeaks(t)
	testutil.CC(t, "mapchurn")
	vmtest.Run(t, 5*time.Minute, func(t *testing.T) {
		testutil.Require(t, can(dirty.SoftDirty))
		for _, c := range everyMethod() {
			if c.guest != nil {
				t.Run(c.name, c.guest)
			}
		}
		inGuest = dirty.WPAsync
		t.Run("OtherKernel", TestRandom)
	})
}
