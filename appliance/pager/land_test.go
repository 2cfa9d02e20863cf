package pager

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/pagestore"
)

const twoPages = `
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
	char *p = mmap(0, 2 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mprotect(p + 4096, 4096, PROT_READ);
	printf("%lx\n", (unsigned long)p); fflush(stdout);
	for (;;) pause();
}`

// TestZeroAfterHalf: pages of which only a part could be written may be zero when
// they come again. Then what was written must go.
func TestZeroAfterHalf(t *testing.T) {
	testutil.Require(t, testutil.Root)
	p := testutil.Start(t, testutil.CCText(t, "two", twoPages))
	p.WaitText("\n", time.Minute)
	base, err := strconv.ParseUint(strings.TrimSpace(p.Text()), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	both := page.Range{Start: page.Addr(base), End: page.Addr(base) + 2*page.Size}
	st, err := pagestore.Create("test")
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	src, err := st.AddSource(0, page.NewSet(both), page.Set{}, page.Set{})
	if err != nil {
		t.Fatal(err)
	}
	sp, err := st.AddSpace(src, p.Pid(), -1, -1, []pagestore.Segment{{Dst: both, Src: both.Start, Flags: pagestore.Written}})
	if err != nil {
		t.Fatal(err)
	}
	l := &lander{pid: p.Pid(), space: sp}
	if _, err := l.Place(0, both, bytes.Repeat([]byte{1}, 2*page.Size)); err == nil {
		t.Fatal("the second page was written")
	}
	if n, err := l.Zero(0, page.PageOf(both.Start)); err != nil || n != 1 {
		t.Fatal(n, err)
	}
	b := make([]byte, page.Size)
	if err := l.ReadPages(0, both.Start.Page(), b); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, make([]byte, page.Size)) {
		t.Error(fmt.Sprintf("a page of zeros begins with %d", b[0]))
	}
}
