package restore

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

// early is a lander into a skeleton that has nothing yet.
func early(t *testing.T) *lander {
	t.Helper()
	require(t)
	testutil.NoLeaks(t)
	cfg := config(t)
	pid := freePID(t)
	cfg.PID, cfg.PGID, cfg.SID = pid, pid, pid
	mono, boot, err := checkpoint.Clocks(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	cfg.Monotonic, cfg.Boottime = mono, boot
	ctx := timed(t)
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Abort(ctx); err != nil {
			t.Error(err)
		}
	})
	return &lander{t, s, ctx}
}

// fill writes a page of b, and expect says whether there is one.
func (l *lander) fill(at page.Addr, b byte) {
	l.t.Helper()
	l.write(page.PageOf(at), bytes.Repeat([]byte{b}, page.Size))
}

func (l *lander) expect(what string, at page.Addr, want byte) {
	l.t.Helper()
	buf := make([]byte, page.Size)
	local := []unix.Iovec{{Base: &buf[0], Len: page.Size}}
	_, err := unix.ProcessVMReadv(l.s.PID(), local, []unix.RemoteIovec{{Base: uintptr(at), Len: page.Size}}, 0)
	if err != nil && (err != unix.EFAULT || want != 0) { // else it is missing
		l.t.Fatalf("%s: read %v: %v", what, at, err)
	}
	if !bytes.Equal(buf, bytes.Repeat([]byte{want}, page.Size)) {
		l.t.Errorf("%s: at %v there is %d, want %d", what, at, buf[0], want)
	}
	if l.s.laid.pages.Contains(at) != (want != 0) {
		l.t.Errorf("%s: page %v counts as landed: %v", what, at, want == 0)
	}
}

// blocks of all objects: what lies there takes memory.
func (l *lander) blocks() (n int64) {
	l.t.Helper()
	for _, o := range l.s.laid.objects {
		var st unix.Stat_t
		if err := unix.Fstat(int(o.file.Fd()), &st); err != nil {
			l.t.Fatal(err)
		}
		n += st.Blocks * 512 / page.Size
	}
	return n
}

const (
	mib             = 1 << 20
	atA, atB, atAny = page.Addr(0x10000000), page.Addr(0x20000000), page.Addr(0x30000000)
)

func span(at page.Addr, bytes uint64) page.Range {
	return page.Range{Start: at, End: at + page.Addr(bytes)}
}

func shows(at page.Addr, bytes uint64, memory int, offset uint64) image.VMA {
	return image.VMA{Range: span(at, bytes), Kind: image.VMAShared, Shared: true, Memory: memory, Offset: offset}
}

func memfd(ino uint64, size int64) image.SharedMemory {
	return image.SharedMemory{Memfd: true, Name: "m", Size: size, ID: image.ObjectID{Dev: 1, Ino: ino}}
}

func anonymous(ino uint64, size int64) image.SharedMemory {
	return image.SharedMemory{Size: size, ID: image.ObjectID{Dev: 1, Ino: ino}}
}

// TestLayShared: an object's pages stay as long as the mapping does by which they
// came, whatever becomes of the layout around them, and not longer.
func TestLayShared(t *testing.T) {
	for _, make := range []func(uint64, int64) image.SharedMemory{memfd, anonymous} {
		t.Run(describe(&image.SharedMemory{Memfd: make(1, 1).Memfd}), func(t *testing.T) {
			l := early(t)
			a, b := make(1, 8*mib), make(2, 8*mib)
			l.lay([]image.VMA{shows(atA, 4*mib, 0, 0), shows(atB, 2*mib, 1, 6*mib)}, a, b)
			l.fill(atA+5*page.Size, 11)
			l.fill(atB+5*page.Size, 12)
			// The other mapping in view of the same page.
			l.lay([]image.VMA{shows(atA, 4*mib, 0, 0), shows(atB, 2*mib, 1, 6*mib), shows(atAny, 2*mib, 1, 5*mib)}, a, b)
			l.expect("one more mapping", atA+5*page.Size, 11)
			l.expect("one more mapping", atB+5*page.Size, 12)
			l.fill(atAny+5*page.Size+mib, 13)
			if l.s.laid.pages.Contains(atB + 5*page.Size) {
				t.Error("a page counts as landed after another has come in its place")
			}
			stale := page.NewSet(page.PageOf(atB + 5*page.Size))
			if err := l.s.Drop(stale); err != nil {
				t.Fatal(err)
			}
			l.expect("dropped by its former name", atAny+5*page.Size+mib, 13)
			// Where they are held is wanted for something else.
			taken := []image.VMA{shows(atA, 4*mib, 0, 0), shows(atAny, 2*mib, 1, 5*mib)}
			for _, o := range l.s.laid.objects {
				if !o.temp.Empty() {
					taken = append(taken, image.VMA{Range: page.PageOf(o.temp.Start + mib), Kind: image.VMAAnon})
				}
			}
			if n := len(taken); n == 4 && taken[2].Start > taken[3].Start {
				taken[2], taken[3] = taken[3], taken[2]
			}
			l.lay(taken, a, b)
			l.expect("moved", atA+5*page.Size, 11)
			l.expect("moved", atAny+5*page.Size+mib, 13)
			if n := l.blocks(); n != 2 {
				t.Errorf("%d pages lie there, 2 have landed", n)
			}
			// Given up.
			stale = page.NewSet(page.PageOf(atA + 5*page.Size))
			if err := l.s.Drop(stale); err != nil {
				t.Fatal(err)
			}
			l.expect("dropped", atA+5*page.Size, 0)
			l.fill(atA+9*page.Size, 14)
			// The mapping is elsewhere now: what came by it is not known there.
			l.lay([]image.VMA{shows(atA+mib, 4*mib, 0, 0), shows(atAny, 2*mib, 1, 5*mib)}, a, b)
			l.expect("elsewhere", atA+mib+9*page.Size, 0)
			l.expect("still there", atAny+5*page.Size+mib, 13)
			// Another object at the same place.
			c := make(3, 8*mib)
			l.fill(atA+mib, 15)
			l.lay([]image.VMA{shows(atA+mib, 4*mib, 0, 0), shows(atAny, 2*mib, 1, 5*mib)}, c, b)
			l.expect("another object", atA+mib, 0)
			l.fill(atA+mib, 16)
			// The same number, but it is something else.
			d := c
			d.Memfd, d.Name = !c.Memfd, "other"
			l.lay([]image.VMA{shows(atA+mib, 4*mib, 0, 0), shows(atAny, 2*mib, 1, 5*mib)}, d, b)
			l.expect("another kind", atA+mib, 0)
			l.expect("still there", atAny+5*page.Size+mib, 13)
			if n := l.blocks(); n != 1 {
				t.Errorf("%d pages lie there, 1 has landed", n)
			}
			l.lay(nil)
			if n := l.descriptors(); n != 0 || len(l.s.laid.objects) != 0 {
				t.Errorf("%d descriptors and %d objects are left of nothing", n, len(l.s.laid.objects))
			}
		})
	}
}

// descriptors that hold objects in the process.
func (l *lander) descriptors() (n int) {
	l.t.Helper()
	es, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", l.s.PID()))
	if err != nil {
		l.t.Fatal(err)
	}
	for _, e := range es {
		if fd, _ := strconv.Atoi(e.Name()); fd >= helperFDs {
			n++
		}
	}
	return n
}

// A memfd is cut and grows, as the program has done between two rounds.
func TestLayCut(t *testing.T) {
	l := early(t)
	at := []image.VMA{shows(atA, 4*mib, 0, 0)}
	l.lay(at, memfd(1, 4*mib))
	l.fill(atA, 1)
	l.fill(atA+3*mib, 2)
	l.lay(at, memfd(1, 2*mib))
	l.lay(at, memfd(1, 4*mib))
	l.expect("what stayed", atA, 1)
	l.expect("what was cut off", atA+3*mib, 0)
	if n := l.descriptors(); n != 1 {
		t.Errorf("%d descriptors of one memfd", n)
	}
}

// A file that the destination has is mapped, and pages that are given up are the
// file's again. One that it has not, or another, is only stood in for.
func TestLayFile(t *testing.T) {
	l := early(t)
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, bytes.Repeat([]byte{7}, mib), 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	here := image.VMA{Range: span(atA, mib/2), Kind: image.VMAFile, Offset: mib / 4, Path: path,
		File: image.FileID{Dev: 5, Ino: 6, Size: mib, MTimeNS: st.Mtim.Nano(), Mode: st.Mode}}
	other := here
	other.Range, other.File.Ino, other.File.Size = span(atB, mib/2), 7, mib-1
	missing := here
	missing.Range, missing.Path = span(atAny, mib/2), path+".not"
	vmas := []image.VMA{here, other, missing}
	l.lay(vmas)
	for i := range vmas {
		l.fill(vmas[i].Start+page.Size, 9)
		l.expect("landed", vmas[i].Start+page.Size, 9)
		if kept := len(l.s.laid.kept(&vmas[i])); kept != 1-min(i, 1) {
			t.Errorf("%d parts of mapping %d would be kept", kept, i)
		}
	}
	if err := l.s.Drop(page.NewSet(page.PageOf(atA+page.Size), page.PageOf(atB+page.Size))); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1)
	for at, want := range map[page.Addr]byte{atA + page.Size: 7, atB + page.Size: 0} {
		local := []unix.Iovec{{Base: &buf[0], Len: 1}}
		buf[0] = 0
		_, err := unix.ProcessVMReadv(l.s.PID(), local, []unix.RemoteIovec{{Base: uintptr(at), Len: 1}}, 0)
		if (err == unix.EFAULT) != (want == 0) || buf[0] != want { // what is missing cannot be read
			t.Errorf("at %v there is %d, want %d: %v", at, buf[0], want, err)
		}
	}
	// Its neighbour in the file is one mapping with it, another part of it is not.
	more := here
	more.Range, more.Offset = span(atA+mib/2, mib/4), 3*mib/4
	far := here
	far.Range, far.Offset = span(atA+mib, mib/4), 0
	l.lay([]image.VMA{here, more, far})
	both := here
	both.End = more.End
	if got := l.s.laid.kept(&both); len(got) != 1 || got[0] != both.Range {
		t.Errorf("of two that touch %v would be kept", got)
	}
	both.End = far.End
	if got := l.s.laid.kept(&both); len(got) != 1 || got[0].End != more.End {
		t.Errorf("of three of which one shows another part %v would be kept", got)
	}
}
