package dirty_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/dirty/dirtytest"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// left returns what there is of tracking in a process: mappings with the flag of
// write protection, and bytes that are registered and protected.
func left(t *testing.T, pid int) (flagged int, registered, protected uint64) {
	t.Helper()
	maps, err := proc.ReadSmaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	vec := make([]sys.PageRegion, 1024)
	count := func(r page.Range, a sys.PMScanArg) (bytes uint64) {
		a.Start, a.End = uint64(r.Start), uint64(r.End)
		for a.Start < a.End {
			n, err := sys.PagemapScan(int(f.Fd()), &a, vec)
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range vec[:n] {
				bytes += v.End - v.Start
			}
			a.Start = a.WalkEnd
		}
		return bytes
	}
	for i := range maps {
		m := &maps[i]
		if m.Has("uw") || m.Has("um") || m.Has("ui") {
			flagged++
		}
		if m.Name == "[vsyscall]" {
			continue
		}
		registered += count(m.Range, sys.PMScanArg{CategoryMask: sys.PageIsWPAllowed, ReturnMask: sys.PageIsWPAllowed})
		// The bit itself, whatever the mapping is.
		protected += count(m.Range, sys.PMScanArg{CategoryInverted: sys.PageIsWritten, CategoryMask: sys.PageIsWritten,
			CategoryAnyof: sys.PageIsPresent | sys.PageIsSwapped, ReturnMask: sys.PageIsPresent})
	}
	return flagged, registered, protected
}

func nothingLeft(t *testing.T, pid int) {
	t.Helper()
	// The kernel clears with the last copy of the descriptor, perhaps in another
	// process that is ending.
	testutil.Eventually(t, 20*time.Second, func() error {
		if f, r, p := left(t, pid); f != 0 || r != 0 || p != 0 {
			return fmt.Errorf("left of the tracking: %d mappings flagged, %d bytes registered, %d protected", f, r, p)
		}
		return nil
	})
}

func populate(p *dirtytest.Program) {
	for _, sort := range []string{"anon", "thp", "file", "mempriv", "shared", "memfd"} {
		p.Poke(p.Area(sort, 600).Range, 1)
	}
}

func TestUndoneByClose(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	populate(p)
	tr := track(t, p, dirty.WPAsync)
	for range 2 {
		if _, err := tr.Collect(p.Maps()); err != nil {
			t.Fatal(err)
		}
		// Moved and split mappings have it, too.
		for _, op := range []string{"move", "mprotect", "dontneed", "munmap", "over"} {
			p.Do("do %s 3", op)
		}
	}
	if f, r, q := left(t, p.Pid()); f == 0 || r == 0 || q == 0 {
		t.Errorf("while it is tracked: %d mappings flagged, %d bytes registered, %d protected", f, r, q)
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	// At once: it was the last copy.
	if f, r, q := left(t, p.Pid()); f != 0 || r != 0 || q != 0 {
		t.Errorf("left of the tracking: %d mappings flagged, %d bytes registered, %d protected", f, r, q)
	}
}

const envTracker = "PAGEFERRY_TEST_TRACKER"

// TestTrackerProcess is what TestUndoneByKill kills: it tracks the process that
// its environment names, by descriptor 3.
func TestTrackerProcess(t *testing.T) {
	pid, err := strconv.Atoi(os.Getenv(envTracker))
	if err != nil {
		return // run by itself
	}
	tr, _, err := dirty.New(t.Context(), dirty.Config{PID: pid, Method: dirty.WPAsync,
		OpenUserfault: func(context.Context) (*os.File, error) { return os.NewFile(3, "userfaultfd"), nil }})
	if err != nil {
		t.Fatal(err)
	}
	maps, err := proc.ReadMaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Collect(maps); err != nil {
		t.Fatal(err)
	}
	fmt.Println("tracking")
	time.Sleep(time.Minute)
	t.Fatal("not killed")
}

// Whoever holds the descriptor is killed, and nothing is left.
func TestUndoneByKill(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, can(dirty.WPAsync))
	testutil.NoLeaks(t)
	p := dirtytest.Start(t)
	populate(p)
	f, err := p.Userfault(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestTrackerProcess$")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", envTracker, p.Pid()))
	cmd.ExtraFiles = []*os.File{f}
	holder := testutil.StartCmd(t, cmd, time.Minute)
	f.Close()
	holder.WaitText("tracking", 30*time.Second)
	if f, r, q := left(t, p.Pid()); f == 0 || r == 0 || q == 0 {
		t.Errorf("while it is tracked: %d mappings flagged, %d bytes registered, %d protected", f, r, q)
	}
	holder.Kill()
	nothingLeft(t, p.Pid())
	// And it runs, and can be tracked again.
	p.Do("step 5")
	tr := track(t, p, dirty.WPAsync)
	if got, err := tr.Collect(p.Maps()); err != nil || got.Content.Empty() {
		t.Errorf("tracked again: %d pages, %v", got.Content.Pages(), err)
	}
}

// The descriptor of a program that calls exec, or has ended, leads nowhere.
func TestProcessEnds(t *testing.T) {
	for _, m := range methods(t) {
		testutil.Require(t, testutil.Root, testutil.AMD64, can(m))
		p := dirtytest.Start(t)
		tr := track(t, p, m)
		maps := p.Maps()
		if _, err := tr.Collect(maps); err != nil {
			t.Fatal(err)
		}
		p.Kill()
		if _, err := tr.Collect(maps); err == nil {
			t.Errorf("%s: a look at a process that has ended works", m)
		}
	}
}
