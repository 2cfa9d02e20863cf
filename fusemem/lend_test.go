package fusemem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// hold makes a Held with size bytes of content.
func hold(tag uint64, size int64) *Held {
	fd, err := unix.MemfdCreate("held", unix.MFD_CLOEXEC)
	if err != nil {
		fail(err)
	}
	b := make([]byte, (size+page.Size-1)&^(page.Size-1))
	content(tag, 0, b)
	if n, err := unix.Pwrite(fd, b[:size], 0); int64(n) != size {
		fail(fmt.Errorf("a memfd: %d, %w", n, err))
	}
	return NewHeld(fd, size)
}

// counted counts the calls of ReadPages.
type counted struct {
	*Held
	calls *atomic.Uint64
}

func (c *counted) ReadPages(ctx context.Context, first page.Num, buf []byte, prio page.Priority) error {
	c.calls.Add(1)
	return c.Held.ReadPages(ctx, first, buf, prio)
}

// Whatever is asked of a file that is held is answered from where it lies, whether it begins at a
// page or not, up to a last page that is not whole.
func TestLent(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	const size = 5<<20 + 1234
	m := start(t, spec{Files: []fileSpec{{Path: "/empty", Held: true}, {Path: "/f", Size: size, Held: true}}})
	expect := want(tagFile+1, 0, size>>page.Shift+1)
	clear(expect[size:])
	for _, name := range []string{"map/1", "files/f"} {
		got, err := os.ReadFile(m.open(name).Name())
		if err != nil || !bytes.Equal(got, expect[:size]) {
			t.Errorf("%s: %d bytes, %v, %v", name, len(got), err, diff(got, expect[:size]))
		}
		b, err := unix.Mmap(int(m.open(name).Fd()), 0, len(expect), unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			t.Fatal(err)
		}
		if err := diff(b, expect); err != nil {
			t.Errorf("%s, mapped: %v", name, err)
		}
		_ = unix.Munmap(b)
	}
	if got, err := os.ReadFile(m.open("map/0").Name()); err != nil || len(got) > 0 {
		t.Errorf("an empty file: %d bytes, %v", len(got), err)
	}
	// Past the page cache, which would ask for whole pages; open(2) refuses it.
	f := int(m.open("map/1").Fd())
	if _, err := unix.FcntlInt(uintptr(f), unix.F_SETFL, unix.O_DIRECT); err != nil {
		t.Fatal(err)
	}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		at, n := r.IntN(size+page.Size), 1+r.IntN(2<<20)
		got := make([]byte, n)
		n, err := unix.Pread(f, got, int64(at))
		if err != nil || !bytes.Equal(got[:max(0, n)], expect[min(at, size):min(at+len(got), size)]) {
			t.Fatalf("seed %d: %d bytes at %#x: %d, %v", seed, len(got), at, n, err)
		}
	}
	if calls := m.do("calls"); calls != "0" {
		t.Errorf("%s reads were not lent", calls)
	}
}

// Memory that is gone, against what was promised, is EIO for a reader and nothing worse.
func TestLentAndGone(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{Files: []fileSpec{{Path: "/f", Size: 4 << 20, Held: true}}})
	m.do("shrink")
	f := m.open("map/0")
	ended := make(chan error, 1)
	go func() {
		_, err := unix.Pread(int(f.Fd()), make([]byte, 1<<20), 1<<20)
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, unix.EIO) {
			t.Errorf("a read: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a read hangs")
	}
	if st, err := os.Stat(m.open("map/0").Name()); err != nil || st.Size() != 4<<20 {
		t.Errorf("the mount after it: %v", err)
	}
}

func TestHeld(t *testing.T) {
	testutil.NoLeaks(t)
	const size = 3*page.Size + 5
	h := hold(7, size)
	defer unix.Close(h.fd)
	expect := want(7, 0, 6)
	clear(expect[size:])
	for _, c := range []struct {
		first page.Num
		n     int
		lent  bool
	}{{0, 4, true}, {3, 1, true}, {1, 2, true}, {0, 5, false}, {4, 1, false}, {3, 2, false}, {math.MaxUint64, 1, false}, {1 << 52, 1, false}, {0, math.MaxInt, false}} {
		got := h.Lend(c.first, c.n)
		if (got != nil) != c.lent || c.lent && !bytes.Equal(got, expect[c.first.Addr():][:c.n<<page.Shift]) {
			t.Errorf("pages %d + %d: %d bytes lent", c.first, c.n, len(got))
		}
	}
	if err := h.Close(); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil || h.Lend(0, 1) != nil {
		t.Error("lends after Close", err)
	}
	got := bytes.Repeat([]byte{1}, 6*page.Size)
	if err := h.ReadPages(t.Context(), 0, got, page.Reader); err != nil || diff(got, expect) != nil {
		t.Errorf("read: %v, %v", err, diff(got, expect))
	}
}
