package restore

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
)

// TestInParts: what is made in many parts is what is made in one.
func TestInParts(t *testing.T) {
	require(t)
	was := partBytes
	partBytes = 1 << 10
	defer func() { partBytes = was }()
	t.Run("threads and mappings", func(t *testing.T) {
		testutil.NoLeaks(t)
		p := testutil.Start(t, testutil.CCText(t, "many", many))
		p.WaitText("ready", limit)
		before, err := proc.ReadMaps(p.Pid())
		if err != nil {
			t.Fatal(err)
		}
		trap := move(t, p, nil)
		trap.resident(t)
		after, err := proc.ReadMaps(p.Pid())
		if err != nil {
			t.Fatal(err)
		}
		if len(after) < len(before)-10 {
			t.Errorf("%d mappings, there were %d", len(after), len(before))
		}
	})
	t.Run("every kind", TestMappingsOfEveryKind)
	t.Run("every kind, landed", TestLandInMappingsOfEveryKind)
	t.Run("landed", TestLand)
}

// TestPartFails: the error of a part names what it was about, and nothing is made
// after it.
func TestPartFails(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	was := partBytes
	partBytes = 1
	defer func() { partBytes = was }()
	ctx := timed(t)
	s, err := Prepare(ctx, config(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort(ctx)
	sc := newScript(s.seed.t)
	for _, n := range []uint64{0, 12345, 0} {
		sc.onf("descriptor %d", n)
		sc.call(unix.SYS_FCNTL, n, unix.F_GETFD)
		sc.part(s.seed.pid)
	}
	made := sc.call(unix.SYS_GETPID)
	err = sc.run(s.seed.pid)
	if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "descriptor 12345") {
		t.Errorf("%v", err)
	}
	if _, err := made.Ret(); err == nil {
		t.Error("what came after it was made")
	}
}
