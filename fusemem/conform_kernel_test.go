package fusemem

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// Reads at the ends of what an offset can be: whatever the file, none hangs, succeeds
// where nothing is, or ends the mount.
func TestOffsets(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Files: []fileSpec{{Path: "/f", Size: 5000}}})
	for _, name := range []string{"mem", "vma/00400000-00480000", "files/f", "map/0", "maps", "status", "resident"} {
		f := m.open(name)
		for _, at := range []int64{1 << 47, 1<<47 + page.Size, math.MaxInt64 &^ (page.Size - 1), math.MaxInt64 - page.Size, math.MaxInt64 - 1, math.MaxInt64} {
			n, err := unix.Pread(int(f.Fd()), make([]byte, page.Size), at)
			// rw_verify_area refuses a range that would end beyond the largest offset.
			if n > 0 || err != nil && err != unix.EINVAL && err != unix.EOVERFLOW {
				t.Errorf("%s at %#x: %d bytes, %v", name, at, n, err)
			}
		}
		if n, err := unix.Pread(int(f.Fd()), make([]byte, page.Size), -1); err != unix.EINVAL {
			t.Errorf("%s at -1: %d bytes, %v", name, n, err)
		}
		if n, err := unix.Pread(int(f.Fd()), nil, 0); n != 0 || err != nil {
			t.Errorf("%s: nothing read: %d, %v", name, n, err)
		}
	}
	if n, err := unix.Pread(int(m.open("mem").Fd()), make([]byte, page.Size), 0); err != unix.EIO {
		t.Errorf("mem at 0: %d bytes, %v", n, err)
	}
	if n, err := unix.Pread(int(m.open("map/image").Fd()), make([]byte, page.Size), imageSize); n != 0 || err != nil {
		t.Errorf("image behind its end: %d bytes, %v", n, err)
	}
}

// tmp is a new file elsewhere.
func tmp(t *testing.T) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// What copies in the kernel reads as read(2) does.
func TestCopiedByTheKernel(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs})
	expect := want(tagMem, 0x600, 0x100)
	from := int(m.open("mem").Fd())
	copied := func(how string, f func(to int, off *int64) (int, error)) {
		t.Helper()
		to := tmp(t)
		off := int64(0x600000)
		for off < 0x700000 {
			n, err := f(int(to.Fd()), &off)
			if err != nil || n == 0 {
				t.Errorf("%s at %#x: %d, %v", how, off, n, err)
				return
			}
		}
		got, _ := os.ReadFile(to.Name())
		if err := diff(got, expect); err != nil {
			t.Errorf("%s: %v", how, err)
		}
		// Over an edge: what is mapped, and then EIO.
		if off != 0x700000 {
			t.Errorf("%s ends at %#x", how, off)
		} else if n, err := f(int(to.Fd()), &off); err != unix.EIO {
			t.Errorf("%s of what is not mapped: %d, %v", how, n, err)
		}
	}
	rest := func(off *int64) int { return int(max(0x700000-*off, page.Size)) }
	copied("sendfile", func(to int, off *int64) (int, error) { return unix.Sendfile(to, from, off, rest(off)) })
	// Not from one file system to another, since Linux 5.19 (fs/read_write.c): cp then reads.
	if n, err := unix.CopyFileRange(from, new(int64(0x600000)), int(tmp(t).Fd()), nil, page.Size, 0); err != unix.EXDEV {
		t.Errorf("copy_file_range: %d, %v", n, err)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	copied("splice", func(to int, off *int64) (int, error) {
		n, err := unix.Splice(from, off, p[1], nil, min(64<<10, rest(off)), 0)
		for left := n; err == nil && left > 0; {
			var k int64
			if k, err = unix.Splice(p[0], nil, to, nil, int(left), 0); err == nil {
				left -= k
			}
		}
		return int(n), err
	})
}

// What else a program may do to a file: locks and watches are the kernel's own, there
// are no extended attributes, and nothing can be changed by a descriptor for reading.
func TestOtherCalls(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Files: []fileSpec{{Path: "/a/b", Size: 5000}}})
	for _, name := range []string{"mem", "maps", "status", "resident", "files/a/b", "map/0", "vma/00400000-00480000", "files/a", "."} {
		p := filepath.Join(m.dir, name)
		f, other := m.open(name), m.open(name)
		fd := int(f.Fd())
		if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			t.Errorf("flock of %s: %v", name, err)
		}
		if err := unix.Flock(int(other.Fd()), unix.LOCK_SH|unix.LOCK_NB); err != unix.EWOULDBLOCK {
			t.Errorf("a second flock of %s: %v", name, err)
		}
		if err := unix.Flock(fd, unix.LOCK_UN); err != nil {
			t.Errorf("unlock of %s: %v", name, err)
		}
		for what, err := range map[string]error{"fsync": unix.Fsync(fd), "fdatasync": unix.Fdatasync(fd)} {
			if err != nil && err != unix.EINVAL {
				t.Errorf("%s of %s: %v", what, name, err)
			}
		}
		if n, err := unix.Listxattr(p, make([]byte, 100)); n > 0 || err != nil && err != unix.EOPNOTSUPP {
			t.Errorf("listxattr of %s: %d, %v", name, n, err)
		}
		if n, err := unix.Getxattr(p, "user.x", make([]byte, 100)); err != unix.EOPNOTSUPP && err != unix.ENODATA {
			t.Errorf("getxattr of %s: %d, %v", name, n, err)
		}
		for what, err := range map[string]error{
			"removexattr": unix.Removexattr(p, "user.x"), "fchmod": unix.Fchmod(fd, 0o777), "fchown": unix.Fchown(fd, 1, 1),
			"renameat2 exchange": unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, filepath.Join(m.dir, "maps"), unix.RENAME_EXCHANGE),
		} {
			if err != unix.EROFS && !(what == "renameat2 exchange" && (name == "." && err == unix.EXDEV || err == unix.EBUSY)) {
				t.Errorf("%s of %s: %v", what, name, err)
			}
		}
		_, werr := unix.Pwrite(fd, []byte{1}, 0)
		for what, err := range map[string]error{"ftruncate": unix.Ftruncate(fd, 1), "pwrite": werr, "punch": unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, page.Size)} {
			if err != unix.EBADF && err != unix.EINVAL {
				t.Errorf("%s of %s: %v", what, name, err)
			}
		}
		if fd, err := unix.Open(p, unix.O_TMPFILE|unix.O_RDWR, 0o600); err == nil || err == unix.ENOSYS {
			t.Errorf("O_TMPFILE in %s: %d, %v", name, fd, err)
		}
		var st unix.Statfs_t
		if err := unix.Statfs(p, &st); err != nil || st.Bsize != page.Size || st.Bfree != 0 || st.Flags&unix.ST_RDONLY == 0 {
			t.Errorf("statfs of %s: %+v, %v", name, st, err)
		}
	}
	// A watch sees who opens and reads; of changes there are none to see.
	in, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(in)
	if _, err := unix.InotifyAddWatch(in, filepath.Join(m.dir, "maps"), unix.IN_ALL_EVENTS); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(m.dir, "maps")); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 4096)
	n, err := unix.Read(in, buf)
	if err != nil || n < unix.SizeofInotifyEvent {
		t.Fatalf("events: %d, %v", n, err)
	}
	for mask := range events(buf[:n]) {
		if mask&(unix.IN_MODIFY|unix.IN_ATTRIB|unix.IN_CLOSE_WRITE|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0 {
			t.Errorf("an event %#x of what does not change", mask)
		}
	}
	// A mapping stays when its descriptor is closed, can be made executable only as the
	// file allows, and never writable where it is shared.
	f, err := os.Open(filepath.Join(m.dir, "mem"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0x600000, page.Size, unix.PROT_READ, unix.MAP_SHARED)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(b)
	if err := unix.Mprotect(b, unix.PROT_READ|unix.PROT_WRITE); err != unix.EACCES {
		t.Errorf("a shared mapping became writable: %v", err)
	}
}

// events are the masks of inotify(7)'s structs.
func events(b []byte) map[uint32]bool {
	out := map[uint32]bool{}
	for len(b) >= unix.SizeofInotifyEvent {
		out[uint32(b[4])|uint32(b[5])<<8|uint32(b[6])<<16|uint32(b[7])<<24] = true
		n := int(b[12]) | int(b[13])<<8
		b = b[unix.SizeofInotifyEvent+n:]
	}
	return out
}

// A directory is listed whole from any place that it was left at, in any buffer.
func TestReaddir(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	var vmas []VMA
	for i := range page.Addr(500) {
		vmas = append(vmas, vma(i*0x3000, i*0x3000+0x1000))
	}
	m := start(t, spec{VMAs: vmas})
	list := func(size int) (names []byte) {
		f := m.open("vma")
		for again := range 2 {
			if _, err := f.Seek(0, 0); err != nil {
				t.Fatal(err)
			}
			names = names[:0]
			for buf := make([]byte, size); ; {
				n, err := unix.Getdents(int(f.Fd()), buf)
				if err != nil {
					t.Fatalf("getdents of %d bytes, time %d: %v", size, again, err)
				}
				if n == 0 {
					break
				}
				for b := buf[:n]; len(b) > 0; b = b[int(b[16])|int(b[17])<<8:] {
					name, _, _ := bytes.Cut(b[19:], []byte{0})
					names = append(append(names, name...), '\n')
				}
			}
		}
		return names
	}
	whole := list(1 << 20)
	if n := bytes.Count(whole, []byte("\n")); n != 502 {
		t.Errorf("%d entries, not 500 and two", n)
	}
	for _, size := range []int{64, 100, 4096} {
		if got := list(size); !bytes.Equal(got, whole) {
			t.Errorf("in a buffer of %d bytes there are %d entries", size, bytes.Count(got, []byte("\n")))
		}
	}
}
