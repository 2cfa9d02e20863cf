package proc

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

const kindsProgram = `
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
/* 8 pages of a file: read, untouched, written, written and given up, guard, written and closed, read, untouched */
int main(int argc, char **argv) {
	int fd = open(argv[1], O_RDWR | O_CREAT, 0600), guard;
	char *p;
	if (ftruncate(fd, 8 * 4096)) return 1;
	p = mmap(0, 8 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	madvise(p, 8 * 4096, MADV_RANDOM); /* no pages around one that is read */
	volatile char sink;
	p[2 * 4096] = p[3 * 4096] = p[5 * 4096] = 1;
	madvise(p + 3 * 4096, 4096, MADV_DONTNEED);
	guard = madvise(p + 4 * 4096, 4096, 102) == 0;
	mprotect(p + 5 * 4096, 4096, PROT_NONE);
	sink = p[0]; sink = p[6 * 4096];
	printf("%lx %d\n", (long)p, guard); fflush(stdout);
	for (;;) pause();
}`

func TestKindsAndLookup(t *testing.T) {
	testutil.Require(t, testutil.Root)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "kinds", kindsProgram), filepath.Join(t.TempDir(), "file")), time.Minute)
	p.WaitText("\n", 10*time.Second)
	var at page.Addr
	var guard int
	if _, err := fmt.Sscanf(p.Text(), "%x %d", &at, &guard); err != nil {
		t.Fatal(err)
	}
	r := page.Range{Start: at, End: at + 8*page.Size}
	for _, old := range []bool{false, true} {
		pm, err := OpenPagemap(p.Pid())
		if err != nil {
			t.Fatal(err)
		}
		defer pm.Close()
		pm.old = old
		got := []byte("........")
		err = pm.Kinds(r, func(r page.Range, k PageKind) {
			for a := r.Start; a < r.End; a += page.Size {
				got[(a-at)/page.Size] = "fog"[k]
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		want := "f.o..of."
		if guard == 1 && !old && !pm.blind {
			want = "f.o.gof."
		}
		// Where it is off, pages around one that is read are mapped too.
		for i := range got {
			if want[i] == '.' && got[i] == 'f' {
				got[i] = '.'
			}
		}
		if string(got) != want {
			t.Errorf("old %v: %s, want %s", old, got, want)
		}
	}
	maps, err := ReadMaps(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	for _, old := range []bool{false, true} {
		l, err := OpenLookup(p.Pid())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		l.old = old
		for i, m := range maps {
			if strings.HasPrefix(m.Name, "[v") {
				continue // beyond what a process can map
			}
			got, ok, err := l.At(m.End - 1)
			m.Name, m.Deleted = "", false
			if err != nil || !ok || fmt.Sprint(got) != fmt.Sprint(m) {
				t.Errorf("old %v: found %+v, %v, %v instead of %+v", old, got, ok, err, m)
			}
			if i+1 < len(maps) && maps[i+1].Start > m.End {
				if got, ok, err := l.At(m.End); ok || err != nil {
					t.Errorf("old %v: found %+v, %v in a hole", old, got, err)
				}
			}
		}
	}
}

const residentProgram = `
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>
/* 8 pages: shared by fork, of that written again, untouched, zero, written, written and given up, written, untouched */
int main(void) {
	volatile char sink;
	char *p = mmap(0, 16 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *s = mmap(0, 4 * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	madvise(p, 16 * 4096, MADV_NOHUGEPAGE);
	p[0] = p[4096] = 1;
	if (!fork()) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); }
	p[4096] = p[4 * 4096] = p[5 * 4096] = p[6 * 4096] = 1;
	sink = p[3 * 4096];
	madvise(p + 5 * 4096, 4096, MADV_DONTNEED);
	s[0] = 1; sink = s[2 * 4096];
	printf("%lx %lx\n", (long)p, (long)s); fflush(stdout);
	for (;;) pause();
}`

func TestResident(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	p := testutil.StartCmd(t, exec.Command(testutil.CCText(t, "resident", residentProgram)), time.Minute)
	p.WaitText("\n", 10*time.Second)
	var private, shared page.Addr
	if _, err := fmt.Sscanf(p.Text(), "%x %x", &private, &shared); err != nil {
		t.Fatal(err)
	}
	pm, err := OpenPagemap(p.Pid())
	if err != nil {
		t.Fatal(err)
	}
	defer pm.Close()
	for _, c := range []struct {
		at     page.Addr
		shared bool
		want   string
	}{{private, false, ".x..x.x."}, {shared, true, "x.x....."}} {
		got := []byte("........")
		r := page.Range{Start: c.at, End: c.at + 8*page.Size}
		if c.shared {
			r.End = c.at + 4*page.Size
		}
		err := pm.Resident(r, c.shared, func(r page.Range) {
			for a := r.Start; a < r.End; a += page.Size {
				got[(a-c.at)/page.Size] = 'x'
			}
		})
		if err != nil || string(got) != c.want {
			t.Errorf("shared %v: %s, not %s (%v)", c.shared, got, c.want, err)
		}
	}
}
