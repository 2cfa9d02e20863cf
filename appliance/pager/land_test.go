package pager

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

// landingPages is how many pages the program below has. Every third is there
// already, and so are the last three, of which the last cannot be written. In the
// last eight none counts as missing.
const landingPages = 64

const landingProgram = `
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#define PAGES 64
int main(void) {
	char *p = mmap(0, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	madvise(p, PAGES * 4096, MADV_NOHUGEPAGE);
	for (int i = 0; i < PAGES; i++)
		if (i % 3 == 0 || i >= PAGES - 3)
			p[i * 4096] = 7;
	mprotect(p + (PAGES - 1) * 4096, 4096, PROT_READ);
	madvise(p + 13 * 4096, 17 * 4096, MADV_DONTFORK); // mappings of their own
	printf("%lx %ld\n", (unsigned long)p, syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
	fflush(stdout);
	for (;;) pause();
}`

// landIn starts that program and returns a lander for its pages.
func landIn(t *testing.T) (*lander, page.Range) {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.Userfaultfd)
	p := testutil.Start(t, testutil.CCText(t, "landing", landingProgram))
	p.WaitText("\n", time.Minute)
	var base uint64
	var fd int
	if _, err := fmt.Sscanf(strings.TrimSpace(p.Text()), "%x %d", &base, &fd); err != nil {
		t.Fatal(err)
	}
	whole := page.Range{Start: page.Addr(base), End: page.Addr(base) + landingPages*page.Size}
	pidfd, err := unix.PidfdOpen(p.Pid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	uffd, err := unix.PidfdGetfd(pidfd, fd, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(uffd) })
	if _, _, err := sys.UffdAPI(uffd, sys.UffdFeatureSigbus); err != nil {
		t.Fatal(err)
	}
	registered := whole.Bytes() - 8*page.Size // where those end nothing is missing: all are there
	if _, err := sys.UffdRegister(uffd, base, registered, sys.UffdioRegisterModeMissing); err != nil {
		t.Fatal(err)
	}
	st, err := pagestore.Create("test")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	src, err := st.AddSource(0, page.NewSet(whole), page.Set{}, page.Set{})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := st.AddSpace(src, p.Pid(), -1, -1, []pagestore.Segment{{Dst: whole, Src: whole.Start, Flags: pagestore.Written}})
	if err != nil {
		t.Fatal(err)
	}
	return &lander{pid: p.Pid(), uffd: uffd, space: sp}, whole
}

func (l *lander) content(t *testing.T, at page.Addr) []byte {
	t.Helper()
	b := make([]byte, page.Size)
	if err := l.ReadPages(0, at.Page(), b); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestZeroAfterHalf: pages of which only a part could be written may be zero when
// they come again. Then what was written must go.
func TestZeroAfterHalf(t *testing.T) {
	l, whole := landIn(t)
	three := page.Range{Start: whole.End - 3*page.Size, End: whole.End}
	l.written = page.NewSet(page.PageOf(three.Start)) // so that it is written over
	if _, err := l.Place(0, three, bytes.Repeat([]byte{1}, 3*page.Size)); err == nil {
		t.Fatal("the last page was written")
	}
	half := three.Start + page.Size
	if b := l.content(t, half); b[0] != 1 {
		t.Fatalf("the page before it was not: it begins with %d", b[0])
	}
	if n, err := l.Zero(0, page.PageOf(half)); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	if b := l.content(t, half); !bytes.Equal(b, make([]byte, page.Size)) {
		t.Errorf("a page of zeros begins with %d", b[0])
	}
}

// TestPut: pages come where some are there and some are missing, whatever is
// believed of them, in and across mappings of the kernel, and land with their content. A page that is still missing can
// be read by nobody, least of all by waiting for it.
func TestPut(t *testing.T) {
	l, whole := landIn(t)
	whole.End -= page.Size // of the last nobody can write
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	if err := l.ReadPages(0, whole.Start.Page()+1, make([]byte, page.Size)); err == nil {
		t.Fatal("a page that is missing was read")
	}
	for at := whole.Start; at < whole.End; at += page.Size {
		if rng.IntN(2) == 0 {
			l.written.Add(page.PageOf(at))
		}
	}
	for round := range 3 {
		want := map[page.Addr]byte{}
		for at := whole.Start; at < whole.End; {
			r := page.Range{Start: at, End: min(whole.End, at+page.Addr(1+rng.IntN(9))*page.Size)}
			data := make([]byte, r.Bytes())
			for i := range r.Pages() {
				v := byte(1 + rng.IntN(255))
				want[r.Start+page.Addr(i)*page.Size] = v
				for j := range page.Size {
					data[i*page.Size+j] = v
				}
			}
			if _, err := l.Place(0, r, data); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			at = r.End
		}
		for at, v := range want {
			if b := l.content(t, at); !bytes.Equal(b, bytes.Repeat([]byte{v}, page.Size)) {
				t.Fatalf("round %d: page %v begins with %d, want %d", round, at, b[0], v)
			}
		}
	}
}
