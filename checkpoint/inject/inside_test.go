package inject

import (
	"encoding/binary"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// A thread that goes on with the batch of a dead tracer is seen to be in its area also
// when the one that looks has just run calls of its own on it: until Rest the thread
// stands in another place than it goes on from.
func TestInside(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "count", countProgram), filepath.Join(t.TempDir(), "counts")), time.Minute)
	p.WaitText("\n", 10*time.Second)
	main := p.Pid()
	room := Room{Threads: 20, Arena: 64 << 10, Note: page.Size}
	area := leaveAsleep(t, main, room)

	tr := proc.NewTracer()
	defer tr.Close()
	tids, err := proc.Threads(main)
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		hold(t, tr, tid)
	}
	tg, err := BootstrapKept(tr, main, main, room)
	if err != nil {
		t.Fatal(err)
	}
	look := func(when string, r page.Range, want bool) {
		t.Helper()
		for _, tid := range tids {
			in, err := tg.Inside(tid, r)
			if err != nil {
				t.Fatal(err)
			}
			if want := want && tid == main; in != want {
				t.Errorf("%s, thread %d of %d is in %v: %v, want %v", when, tid, main, r, in, want)
			}
		}
	}
	look("after a batch", area, true)
	look("after a batch", tg.Areas()[0], false)
	if _, _, err := tg.Rest(); err != nil {
		t.Fatal(err)
	}
	look("after Rest", area, true)
	if err := tg.Again(main); err != nil {
		t.Fatal(err)
	}
	if err := tg.Close(main); err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		letGo(t, tr, tid)
	}
}

// leaveAsleep has the main thread sleep in a batch of a tracer that dies, and returns the
// area of it.
func leaveAsleep(t *testing.T, main int, room Room) page.Range {
	t.Helper()
	tr := proc.NewTracer()
	defer tr.Close()
	tids, err := proc.Threads(main)
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		hold(t, tr, tid)
	}
	tg, err := BootstrapKept(tr, main, main, room)
	if err != nil {
		t.Fatal(err)
	}
	b := tg.Batch()
	var ts [16]byte
	binary.LittleEndian.PutUint64(ts[:], 5) // seconds
	b.Call(unix.SYS_NANOSLEEP, b.Bytes(ts[:]), 0)
	KillPoint = func(point string) {
		if point == "enter-mask" {
			runtime.Goexit() // on the tracer's thread, which ends
		}
	}
	defer func() { KillPoint = nil }()
	_ = b.Run(main) // nobody is there to tell
	area := tg.Areas()[0]
	_ = tg.Drop()
	return area
}
