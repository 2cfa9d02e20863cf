package checkpoint

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
)

// memfds has one that it has not mapped, one of which it has mapped a part, one with
// a mapping that is longer, and a small one.
const memfds = `
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#define MIB (1L << 20)
static int alone;
static void grow(int s) { (void)s; ftruncate(alone, 5 * MIB); pwrite(alone, "grown", 5, 4 * MIB); }
static void shut(int s) { (void)s; close(alone); }
static int make(const char *name, long size, char with) {
	static char b[1L << 20];
	int fd = memfd_create(name, MFD_CLOEXEC);
	memset(b, with, MIB);
	for (long at = 0; at < size; at += MIB) pwrite(fd, b, MIB, at);
	return fd;
}
int main(void) {
	int part, longer;
	signal(SIGUSR1, grow);
	signal(SIGUSR2, shut);
	alone = make("alone", 3 * MIB, 'a');
	part = make("part", 2 * MIB, 'p');
	mmap(0, MIB, PROT_READ | PROT_WRITE, MAP_SHARED, part, 0);
	longer = make("longer", 2 * MIB, 'l');
	mmap(0, 3 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, longer, 0);
	make("small", MIB, 's');
	printf("ready\n"); fflush(stdout);
	for (;;) pause();
}`

// TestWindows: what only descriptors lead to has addresses that stay the same as long
// as they can, is read by them, and is in the layout and in the image as mappings are.
func TestWindows(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	p := testutil.Start(t, testutil.CCText(t, "memfds", memfds))
	p.WaitText("ready", time.Minute)
	s, err := Open(p.Pid(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Track(nil); err != nil {
		t.Fatal(err)
	}
	look := func() (maps []proc.Mapping, of map[string]proc.Mapping) {
		t.Helper()
		maps, err := s.Mappings()
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Windows(maps)
		if err != nil {
			t.Fatal(err)
		}
		of = map[string]proc.Mapping{}
		for _, m := range w {
			of[strings.TrimPrefix(m.Name, "/memfd:")] = m
		}
		return append(maps, w...), of
	}
	maps, first := look()
	if len(first) != 2 || first["alone"].Bytes() != 3<<20 || first["part"].Bytes() != 2<<20 {
		t.Fatalf("windows %+v", first)
	}
	for name, c := range map[string]byte{"alone": 'a', "part": 'p'} {
		// With a page of a mapping before and after it.
		r := page.PageOf(first[name].Start + 1<<20 + 5*page.Size)
		var stack page.Range
		for i := range maps {
			if maps[i].Name == "[stack]" {
				stack = page.PageOf(maps[i].End - 1)
			}
		}
		b := make([]byte, 3*page.Size)
		if err := s.ReadPages(0, []page.Range{stack, r, stack}, b); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b[page.Size:2*page.Size], bytes.Repeat([]byte{c}, page.Size)) || !bytes.Equal(b[:page.Size], b[2*page.Size:]) {
			t.Errorf("a page of memfd %s reads as %q...", name, b[page.Size:page.Size+8])
		}
	}
	l, room, err := s.Layout(maps)
	if err != nil {
		t.Fatal(err)
	}
	b, err := image.EncodeLayout(l)
	if err == nil {
		l, err = image.DecodeLayout(b)
	}
	if err != nil || len(l.Memories) != 3 {
		t.Fatalf("%+v, %v", l, err)
	}
	windows := 0
	for i := range l.VMAs {
		v := &l.VMAs[i]
		if v.Window {
			windows++
		}
		if v.Kind == image.VMAShared && l.Memories[v.Memory].Name == "longer" && (v.Bytes() != 3<<20 || room.BytesIn(v.Range) != 2<<20) {
			t.Errorf("in a mapping of 3 MiB of a memfd of 2 there is room for %d bytes", room.BytesIn(v.Range))
		}
	}
	if windows != 2 {
		t.Errorf("%d windows in the layout", windows)
	}
	if _, again := look(); again["alone"].Range != first["alone"].Range || again["part"].Range != first["part"].Range {
		t.Errorf("other addresses, though nothing has changed: %+v, %+v", first, again)
	}
	p.Signal(unix.SIGUSR1)
	testutil.Eventually(t, time.Minute, func() error {
		_, now := look()
		if m := now["alone"]; m.Start != first["alone"].Start || m.Bytes() != 5<<20 {
			return fmt.Errorf("it has grown: %+v", m)
		}
		return nil
	})
	buf := make([]byte, page.Size)
	if err := s.ReadPages(0, []page.Range{page.PageOf(first["alone"].Start + 4<<20)}, buf); err != nil || string(buf[:5]) != "grown" {
		t.Errorf("%q, %v", buf[:8], err)
	}
	checkImage(t, s, first["alone"].Start)
	if err := s.Track(nil); err != nil { // it runs again
		t.Fatal(err)
	}
	p.Signal(unix.SIGUSR2)
	testutil.Eventually(t, time.Minute, func() error {
		if _, now := look(); len(now) != 1 {
			return fmt.Errorf("it was closed: %+v", now)
		}
		return nil
	})
}

// checkImage fails unless the image knows those pages by the same addresses.
func checkImage(t *testing.T, s *Session, alone page.Addr) {
	t.Helper()
	if err := s.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer s.Thaw(t.Context())
	s.find = nil // as if nothing was tracked
	img, mem, err := s.Capture(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Validate(); err != nil {
		t.Fatal(err)
	}
	for i := range img.Memories {
		if m := &img.Memories[i]; m.Size > image.MaxInlineMemory && len(m.Chunks) > 0 {
			t.Errorf("%q is in the image itself", m.Name)
		}
	}
	if n := mem[0].Eager.BytesIn(page.Range{Start: alone, End: alone + 5<<20}); n != 3<<20+page.Size {
		t.Errorf("%d bytes of a memfd that is not mapped", n)
	}
}
