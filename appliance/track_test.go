package appliance

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// TestTrackRedis tracks a real program by a userfaultfd that it was made to open:
// it has no descriptor more than before, what it writes is seen, what it does not
// is not, and after Close nothing is left.
func TestTrackRedis(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	r := testutil.Redis(t)
	r.Populate(20000, 500)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	s, err := checkpoint.Open(r.Pid(), checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	tr, lacking, err := dirty.New(ctx, dirty.Config{PID: r.Pid(), OpenUserfault: s.Userfault})
	if err != nil || len(lacking) > 0 {
		t.Fatal(lacking, err)
	}
	defer tr.Close()
	if got := descriptors(t, r.Pid()); strings.Contains(got, "userfaultfd") || !strings.Contains(got, "eventpoll") {
		t.Errorf("descriptors while tracked: %s", got)
	}
	look := func() dirty.Pages {
		t.Helper()
		maps, err := proc.ReadMaps(r.Pid())
		if err != nil {
			t.Fatal(err)
		}
		p, err := tr.Collect(maps)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	first := look()
	if first.Content.Pages() < 1000 || first.Written.Pages() != first.Content.Pages() {
		t.Errorf("first look: %d pages with content, %d written", first.Content.Pages(), first.Written.Pages())
	}
	look()
	idle := look()
	if idle.Written.Pages() > 200 {
		t.Errorf("%d pages written by an idle redis", idle.Written.Pages())
	}
	// One write to each of many keys: most of their pages.
	for i := range 5000 {
		r.Do("SETRANGE", fmt.Sprintf("key:%d", i), "0", "y")
	}
	busy := look()
	if n := busy.Written.Pages(); n < 400 || n > busy.Content.Pages()*3/4 {
		t.Errorf("%d of %d pages written by 5000 writes", n, busy.Content.Pages())
	}
	// What was not written is as it was.
	same := page.NewSet(busy.Content.Ranges()...)
	for _, w := range busy.Written.Ranges() {
		same.Remove(w)
	}
	if same.Pages() == 0 {
		t.Error("everything was written")
	}
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	if _, err := tr.Collect(nil); err == nil {
		t.Error("a closed tracker tracks")
	}
}

func descriptors(t *testing.T, pid int) string {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		names = append(names, e.Name()+"="+to)
	}
	return strings.Join(names, " ")
}

// sleeper is a process that does nothing, as its source has it while it runs.
func sleeper(t *testing.T) (*testutil.Process, *checkpoint.Session, *process) {
	t.Helper()
	r := testutil.Start(t, "sleep", "60")
	s, err := checkpoint.Open(r.Pid(), checkpoint.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	p := newProcess(s, r.Pid(), SourceOptions{})
	p.running.Store(true)
	return r, s, p
}

// TestReadRunning: what is not there is zeros, and what cannot be read is an error.
func TestReadRunning(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	_, s, p := sleeper(t)
	hole := []page.Range{page.PageOf(0x10000)}
	buf := bytes.Repeat([]byte{1}, page.Size)
	if err := p.ReadPages(0, hole, buf); err == nil {
		t.Error("pages of a process whose memory is not open read as zeros")
	}
	if err := s.Track(nil); err != nil {
		t.Fatal(err)
	}
	if err := p.ReadPages(0, hole, buf); err != nil || !bytes.Equal(buf, make([]byte, page.Size)) {
		t.Errorf("a page that is not there reads as %d...: %v", buf[0], err)
	}
}

// TestLookWhileThrottled: a look that needs the process to stand still takes turns
// with the throttle, which stops it, too.
func TestLookWhileThrottled(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	r, _, p := sleeper(t)
	if err := p.Throttle(0.5); err != nil {
		t.Fatal(err)
	}
	defer p.slow.set(0)
	for range 20 {
		resume, err := p.stopForLook()
		if err != nil {
			t.Fatal(err)
		}
		st, serr := proc.ReadStatus(r.Pid())
		if serr != nil || st.TracerPID == 0 {
			t.Fatalf("it has no tracer during the look (%v)", serr)
		}
		time.Sleep(10 * time.Millisecond) // the throttle may want it meanwhile
		if st, _ := proc.ReadStatus(r.Pid()); st.TracerPID == 0 {
			t.Fatal("it was let go of in the middle of a look")
		}
		if err := resume(); err != nil {
			t.Fatal(err)
		}
	}
	p.slow.mu.Lock()
	done := p.slow.done
	p.slow.mu.Unlock()
	select {
	case <-done:
		t.Error("it is not slowed any more")
	default:
	}
}
