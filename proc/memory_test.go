package proc

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const pagesProgram = `
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
/* 8 pages: written, untouched, zero page (read), written and closed to all, written, untouched, guard, written */
int main(void) {
	char *p = mmap(0, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int i, guard;
	volatile char sink = p[2 * 4096];
	(void)sink;
	madvise(p, 8 * 4096, MADV_NOHUGEPAGE);
	for (i = 0; i < 8; i++)
		if (i == 0 || i == 3 || i == 4 || i == 7)
			memset(p + i * 4096, 'a' + i, 4096);
	guard = madvise(p + 6 * 4096, 4096, 102) == 0;
	mprotect(p + 3 * 4096, 4096, PROT_NONE);
	printf("%lx %d\n", (unsigned long)p, guard);
	fflush(stdout);
	for (;;) pause();
}`

// pages starts the program and returns the address of its pages.
func pages(t *testing.T) (pid int, at page.Addr, guard bool) {
	t.Helper()
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "pages", pagesProgram)), time.Minute)
	p.WaitText("\n", 10*time.Second)
	f := strings.Fields(p.Text())
	a, err := strconv.ParseUint(f[0], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return p.Pid(), page.Addr(a), f[1] == "1"
}

func TestReadAndWritePages(t *testing.T) {
	testutil.Require(t, testutil.Root)
	pid, at, _ := pages(t)
	m, err := OpenMemory(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	pg := func(i, n int) page.Range {
		return page.Range{Start: at + page.Addr(i*page.Size), End: at + page.Addr((i+n)*page.Size)}
	}
	check := func(rs []page.Range, want string) {
		t.Helper()
		buf := make([]byte, len(want)*page.Size)
		if err := m.ReadPages(rs, buf); err != nil {
			t.Fatalf("%v: %v", rs, err)
		}
		for i := range want {
			c := want[i]
			if c == '.' {
				c = 0
			}
			if !bytes.Equal(buf[i*page.Size:][:page.Size], bytes.Repeat([]byte{c}, page.Size)) {
				t.Errorf("%v: page %d begins with %q, want %q", rs, i, buf[i*page.Size], c)
			}
		}
	}
	check([]page.Range{pg(0, 1)}, "a")
	// Page 3 allows no access; it is read where it stands first, last and inside.
	check([]page.Range{pg(0, 6)}, "a..de.")
	check([]page.Range{pg(3, 1), pg(0, 1), pg(2, 3), pg(7, 1)}, "da.deh")
	check([]page.Range{pg(0, 1), {}, pg(3, 1), {}, pg(7, 1)}, "adh")
	var many []page.Range
	want := ""
	for i := range 2500 {
		many = append(many, pg([]int{0, 3, 7}[i%3], 1))
		want += string("adh"[i%3])
	}
	check(many, want)
	if err := m.ReadPages([]page.Range{pg(0, 2)}, make([]byte, page.Size)); err == nil {
		t.Error("a buffer that is too short was accepted")
	}
	if err := m.ReadPages([]page.Range{{Start: 0x1000, End: 0x2000}}, make([]byte, page.Size)); !errors.Is(err, ErrNoPage) {
		t.Errorf("reading what is not mapped: %v", err)
	}
	if err := m.WriteAt(bytes.Repeat([]byte("z"), page.Size), at+3*page.Size); err != nil {
		t.Fatal(err)
	}
	check([]page.Range{pg(3, 1)}, "z")
}

func TestContent(t *testing.T) {
	testutil.Require(t, testutil.Root)
	pid, at, guard := pages(t)
	all := page.Range{Start: at, End: at + 8*page.Size}
	for _, way := range []string{"scan", "scan of anonymous memory", "without guards", "pagemap"} {
		pm, err := OpenPagemap(pid)
		if err != nil {
			t.Fatal(err)
		}
		pm.vec = pm.vec[:2] // more than one call
		pm.blind = way == "without guards"
		pm.old = way == "pagemap"
		got := []byte("........")
		var gs []page.Range
		if err := pm.Find(all, way == "scan of anonymous memory", func(r page.Range) {
			for a := r.Start; a < r.End; a += page.Size {
				got[(a-at)/page.Size] = 'x'
			}
		}, func(r page.Range) { gs = append(gs, r) }); err != nil {
			t.Fatal(err)
		}
		want := "x..xx..x"
		switch way {
		case "pagemap":
			want = "x.xxx..x" // the zero page cannot be told
			fallthrough
		case "without guards":
			if guard {
				got[6] = '.' // looks like a swapped page
			}
		default:
			if guard && (len(gs) != 1 || gs[0] != page.PageOf(at+6*page.Size)) {
				t.Errorf("%s: guards %v", way, gs)
			}
		}
		if string(got) != want {
			t.Errorf("%s: content %s, want %s", way, got, want)
		}
		pm.Close()
	}
}

func TestGone(t *testing.T) {
	const pid = 1<<22 - 1
	for name, f := range map[string]func() error{
		"maps":    func() error { _, err := ReadMaps(pid); return err },
		"stat":    func() error { _, err := ReadStat(pid); return err },
		"threads": func() error { _, err := Threads(pid); return err },
		"memory":  func() error { _, err := OpenMemory(pid); return err },
		"pagemap": func() error { _, err := OpenPagemap(pid); return err },
		"link":    func() error { _, err := Link(pid, "exe"); return err },
	} {
		if err := f(); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A process that has ended and that nobody has waited for is there still, without memory.
func TestGoneButNotReaped(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if ms, err := ReadMaps(cmd.Process.Pid); !errors.Is(err, ErrGone) {
		t.Errorf("maps: %v, %v", ms, err)
	}
	if ms, err := ReadSmaps(cmd.Process.Pid); !errors.Is(err, ErrGone) {
		t.Errorf("smaps: %v, %v", ms, err)
	}
}

func TestTracer(t *testing.T) {
	testutil.Require(t, testutil.Root)
	tr := NewTracer()
	ids := map[int]bool{}
	for range 10 {
		tr.Do(func() {
			ids[unix.Gettid()] = true
			tr.Do(func() { ids[unix.Gettid()] = true })
		})
		runtime.Gosched()
	}
	if len(ids) != 1 || ids[os.Getpid()] && unix.Gettid() == os.Getpid() {
		t.Errorf("ran on threads %v", ids)
	}
	p := testutil.Start(t, "sleep", "1000")
	tr.Do(func() {
		if err := sys.PtraceSeize(p.Pid(), 0); err != nil {
			t.Error(err)
		}
	})
	tr.Close()
	tr.Close()
	if st, err := ReadStatus(p.Pid()); err != nil || st.TracerPID != 0 {
		t.Errorf("after Close it is traced by %d, %v", st.TracerPID, err)
	}
}
