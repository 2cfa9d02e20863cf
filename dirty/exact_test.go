package dirty

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/page"
)

// A list of mappings that has grown old splits nothing.
func TestBorders(t *testing.T) {
	b, err := openBorders(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	// Between two guards, so that it joins nothing.
	mem, err := unix.Mmap(-1, 0, 8*page.Size, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	if err := unix.Mprotect(mem[page.Size:7*page.Size], unix.PROT_READ|unix.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	var base page.Addr
	if _, err := fmt.Sscanf(fmt.Sprintf("%p", mem), "0x%x", (*uint64)(&base)); err != nil {
		t.Fatal(err)
	}
	base += page.Size
	at := func(first, end int) page.Range {
		return page.Range{Start: base + page.Addr(first)*page.Size, End: base + page.Addr(end)*page.Size}
	}
	for _, c := range []struct {
		first, end int
		want       bool
	}{{0, 6, true}, {0, 3, false}, {3, 6, false}, {1, 5, false}} {
		if got := b.hold(at(c.first, c.end)); got != c.want {
			t.Errorf("pages %d to %d of 6: %v, want %v", c.first, c.end, got, c.want)
		}
	}
	// Two mappings that touch.
	if err := unix.Mprotect(mem[page.Size:4*page.Size], unix.PROT_READ); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		first, end int
		want       bool
	}{{0, 6, true}, {0, 3, true}, {3, 6, true}, {1, 6, false}} {
		if got := b.hold(at(c.first, c.end)); got != c.want {
			t.Errorf("pages %d to %d of 3 and 3: %v, want %v", c.first, c.end, got, c.want)
		}
	}
}
