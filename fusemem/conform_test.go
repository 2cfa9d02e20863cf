package fusemem

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// memory is what the address space of someVMAs has in [at, at+n): the bytes before the first
// unmapped page.
func mappedBytes(vmas []VMA, at uint64, n int) []byte {
	var b []byte
	for len(b) < n {
		p := page.Addr(at + uint64(len(b)))
		ok := false
		for _, v := range vmas {
			ok = ok || v.Contains(p)
		}
		if !ok {
			break
		}
		b = append(b, want(tagMem, p.Page(), 1)[p%page.Size:]...)
	}
	return b[:min(n, len(b))]
}

// Reads of mem are as those of /proc/PID/mem: mapped bytes, then EIO.
func TestMemAtEdges(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs})
	f := m.open("mem")
	check := func(at uint64, n int) {
		t.Helper()
		buf := make([]byte, n)
		got, err := unix.Pread(int(f.Fd()), buf, int64(at))
		expect := mappedBytes(someVMAs, at, n)
		if len(expect) == 0 {
			if err != unix.EIO {
				t.Errorf("%d bytes at %#x: %d, %v, not EIO", n, at, got, err)
			}
			return
		}
		if err != nil {
			t.Errorf("%d bytes at %#x: %v", n, at, err)
		} else if err := diff(buf[:got], expect); err != nil {
			t.Errorf("%d bytes at %#x: %v", n, at, err)
		}
	}
	for _, v := range someVMAs {
		for _, edge := range []page.Addr{v.Start, v.End} {
			for _, off := range []int64{-1 << 20, -70000, -page.Size - 1, -page.Size, -1, 0, 1, page.Size - 1, page.Size, 70000} {
				for _, n := range []int{1, 8, page.Size, page.Size + 1, 3 * page.Size, 100000, 2 << 20} {
					at := int64(edge) + off
					if at >= memSize {
						continue
					}
					expectEOF := at+int64(n) > memSize
					if expectEOF {
						n = int(memSize - at)
					}
					check(uint64(at), n)
				}
			}
		}
	}
	check(0, page.Size)
	check(page.Size, 1<<20)
	buf := make([]byte, page.Size)
	for _, at := range []int64{memSize, memSize + 1, memSize + 1<<20, 1<<62 - 1} {
		if n, err := unix.Pread(int(f.Fd()), buf, at); n != 0 || err != nil {
			t.Errorf("read beyond the end, at %#x: %d, %v", at, n, err)
		}
	}
	if n, err := unix.Pread(int(f.Fd()), buf, memSize-1); n != 1 || err != nil || buf[0] != want(tagMem, memSize>>page.Shift-1, 1)[page.Size-1] {
		t.Errorf("the last byte: %d %v %#x", n, err, buf[0])
	}
	// No error and no edge has shrunk it.
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Size != memSize {
		t.Errorf("its size is %#x now, %v", st.Size, err)
	}
	if end, err := f.Seek(0, io.SeekEnd); err != nil || end != memSize {
		t.Errorf("SEEK_END: %#x %v", end, err)
	}
	for _, c := range []struct{ at, data, hole int64 }{ // -1 is ENXIO
		{0, 0x400000, 0}, {0x400000, 0x400000, 0x480000}, {0x47ffff, 0x47ffff, 0x480000}, {0x480000, 0x600000, 0x480000},
		{0x604fff, 0x604fff, 0x700000}, {0x7f0000800000, memSize - 0x3000, 0x7f0000800000}, {memSize - 1, memSize - 1, memSize}, {memSize, -1, -1},
	} {
		for whence, wanted := range map[int]int64{unix.SEEK_DATA: c.data, unix.SEEK_HOLE: c.hole} {
			got, err := unix.Seek(int(f.Fd()), c.at, whence)
			if wanted < 0 && err != unix.ENXIO || wanted >= 0 && (err != nil || got != wanted) {
				t.Errorf("seek %d from %#x: %#x %v, not %#x", whence, c.at, got, err, wanted)
			}
		}
	}
}

// A READ past the page cache need not begin at a page, nor end at one.
func TestDirect(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Files: []fileSpec{{Path: "/f", Size: 5000}}})
	direct := func(name string) int {
		f := m.open(name)
		if _, err := unix.FcntlInt(f.Fd(), unix.F_SETFL, unix.O_DIRECT); err != nil { // open(2) refuses it
			t.Fatal(err)
		}
		return int(f.Fd())
	}
	mem, file := direct("mem"), direct("files/f")
	for _, c := range []struct{ at, n int }{{0, 1}, {0, page.Size}, {1, page.Size}, {100, 3 * page.Size}, {page.Size - 1, 2}, {5, 300000}, {0, 0x80000}, {0x7ffff, 1}} {
		buf := make([]byte, c.n)
		n, err := unix.Pread(mem, buf, int64(0x400000+c.at))
		if e := diff(buf[:max(n, 0)], mappedBytes(someVMAs, uint64(0x400000+c.at), c.n)); e != nil || err != nil {
			t.Errorf("%d bytes from %#x on: %v, %v", c.n, c.at, e, err)
		}
	}
	for _, at := range []int{0, 1, page.Size - 1, page.Size, 4999, 5000, 9000} {
		buf := make([]byte, 3*page.Size)
		n, err := unix.Pread(file, buf, int64(at))
		if e := diff(buf[:max(n, 0)], want(tagFile, 0, 2)[min(at, 5000):5000]); e != nil || err != nil {
			t.Errorf("the file from %d on: %v, %v", at, e, err)
		}
	}
	if n, err := unix.Pread(mem, make([]byte, 2*page.Size), 0x47f000); err != unix.EIO {
		t.Errorf("over an edge: %d, %v", n, err)
	}
}

// As TestMemAtEdges through a mapping, where unmapped is SIGBUS.
func TestMemMapped(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs})
	for _, how := range []string{"mmap", "mmapshared", "mmaprandom"} {
		m.reader("mem", how, 0x400000, 0x80000).mustRead(t, want(tagMem, 0x400, 0x80))
		m.reader("mem", how, 0x600000, 0x100000).mustRead(t, want(tagMem, 0x600, 0x100))
		m.reader("mem", how, memSize-0x3000, 0x3000).mustRead(t, want(tagMem, memSize>>page.Shift-3, 3))
		for _, at := range []uint64{0x3ff000, 0x480000, 0x7ffffffc000} {
			if b, status := m.reader("mem", how, at, page.Size).result(t); status != 255 {
				t.Errorf("%s of unmapped memory at %#x: status %d, %d bytes", how, at, status, len(b))
			}
		}
	}
}

func TestTree(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	var vmas []VMA
	names := map[string]bool{}
	for i := range page.Addr(10000) {
		v := vma(0x10000000+i*0x3000, 0x10000000+i*0x3000+0x1000*(1+i%2))
		v.Path = fmt.Sprintf("/some/file-%d", i)
		vmas = append(vmas, v)
		names[v.Range.String()] = true
	}
	m := start(t, spec{VMAs: vmas, Image: true, Files: []fileSpec{
		{Path: "/usr/lib/a b.so", Size: 5000, Mode: 0o755}, {Path: "/usr/lib/a b.so", Size: 4096}, {Path: "/usr", Size: 1},
		{Path: "/usr/x/y", Size: 3}, {Path: "../../etc/passwd", Size: 2}, {Path: "", Size: 0}, {Path: "/usr/lib/a b.so/below", Size: 4},
		{Path: "/" + strings.Repeat("n", 255), Size: 9},
	}})
	list, err := os.ReadDir(m.dir + "/vma")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		if !names[e.Name()] {
			t.Errorf("there is %s, which is no mapping, or is there twice", e.Name())
		}
		delete(names, e.Name())
	}
	if len(names) > 0 {
		t.Errorf("vma lacks %d mappings", len(names))
	}
	var found []string
	err = filepath.Walk(m.dir, func(path string, st os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		if st.IsDir() != (st.Mode().Perm() == 0o500) && !strings.HasSuffix(path, "/a b.so") && !strings.HasSuffix(path, "map/0") ||
			!st.IsDir() && st.Mode().Perm()&0o400 == 0 || st.Mode().Perm()&0o277 != 0 {
			t.Errorf("%s has mode %v", path, st.Mode())
		}
		s := st.Sys().(*syscall.Stat_t)
		if s.Uid != 0 || s.Gid != 0 || s.Nlink == 0 || s.Ino == 0 {
			t.Errorf("%s: %+v", path, s)
		}
		if rel, _ := filepath.Rel(m.dir, path); !strings.HasPrefix(rel, "vma/") {
			found = append(found, fmt.Sprintf("%s %d", rel, st.Size()))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	maps, _ := os.ReadFile(m.dir + "/maps")
	expect := fmt.Sprintf(". 0,files 0,files/etc 0,files/etc/passwd 2,files/%s 9,files/unnamed 0,files/usr 0,files/usr/lib 0,files/usr/lib/a b.so 5000,"+
		"files/usr/lib/a b.so~1 4096,files/usr/lib/a b.so~1~2 0,files/usr/lib/a b.so~1~2/below 4,files/usr/x 0,files/usr/x/y 3,files/usr~1 1,"+
		"map 0,map/0 5000,map/1 4096,map/2 1,map/3 3,map/4 2,map/5 0,map/6 4,map/7 9,map/image %d,maps %d,mem %d,resident 0,status 0,vma 0",
		strings.Repeat("n", 255), int64(imageSize), len(maps), int64(memSize))
	if got := strings.Join(found, ","); got != expect {
		t.Errorf("the tree is\n%s, not\n%s", got, expect)
	}
	if n := bytes.Count(maps, []byte("\n")); n != 10000 {
		t.Errorf("maps has %d lines", n)
	}
	if st, err := os.Stat(m.dir + "/files/usr/lib/a b.so"); err != nil || !st.ModTime().Equal(time.Unix(1e9, 5)) {
		t.Errorf("%v %v", st, err)
	}
	if _, err := os.Stat(m.dir + "/vma/nothing"); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	for _, i := range []int{0, 1, 9999} {
		got, err := os.ReadFile(m.dir + "/vma/" + vmas[i].Range.String())
		if err != nil {
			t.Error(err)
		}
		if err := diff(got, want(tagMem, vmas[i].Start.Page(), vmas[i].Pages())); err != nil {
			t.Errorf("vma/%v: %v", vmas[i].Range, err)
		}
	}
	for name, expect := range map[string][]byte{
		"files/usr/lib/a b.so": want(tagFile, 0, 2)[:5000], "map/0": want(tagFile, 0, 2)[:5000], "files/usr~1": want(tagFile+2, 0, 1)[:1],
		"map/6": want(tagFile+6, 0, 1)[:4], "files/unnamed": {}, "resident": {0xf0, 1, 2},
	} {
		got, err := os.ReadFile(filepath.Join(m.dir, name))
		if err := errors.Join(err, diff(got, expect)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Content beyond the end of a file is zeros in its last page.
	m.reader("map/0", "mmap", page.Size, page.Size).mustRead(t, append(want(tagFile, 1, 1)[:5000-page.Size], make([]byte, 2*page.Size-5000)...))
}

// maps has the form that /proc/PID/maps has.
func TestMapsText(t *testing.T) {
	var got []byte
	for _, v := range []VMA{
		{Range: page.Range{Start: 0x400000, End: 0x401000}, Perms: "r--p", Dev: unix.Mkdev(0xfe, 0), Ino: 918, Path: "/usr/bin/redis-server"},
		{Range: page.Range{Start: 0x7ffc0a2b1000, End: 0x7ffc0a2d2000}, Perms: "rw-p", Path: "[stack]"},
		{Range: page.Range{Start: 0x7f0000000000, End: 0x7f0000021000}, Perms: "---s", Offset: 0x123456789000, Dev: unix.Mkdev(0, 0x1f), Ino: 12345678901},
		{Range: page.Range{Start: 0xffffffffff600000, End: 0xffffffffff601000}, Perms: "--xp", Path: "[vsyscall]"},
	} {
		got = appendMapsLine(got, v)
	}
	const expect = `00400000-00401000 r--p 00000000 fe:00 918                                /usr/bin/redis-server
7ffc0a2b1000-7ffc0a2d2000 rw-p 00000000 00:00 0                          [stack]
7f0000000000-7f0000021000 ---s 123456789000 00:1f 12345678901 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
`
	if string(got) != expect {
		t.Errorf("got\n%swant\n%s", got, expect)
	}
	// This process's own, line by line.
	own, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		var v VMA
		var major, minor uint32
		if _, err := fmt.Sscanf(line, "%x-%x %s %x %x:%x %d", &v.Start, &v.End, &v.Perms, &v.Offset, &major, &minor, &v.Ino); err != nil {
			t.Fatal(err)
		}
		v.Dev = unix.Mkdev(major, minor)
		if f := strings.Fields(line); len(f) > 5 {
			v.Path = strings.TrimSuffix(line[strings.Index(line, f[5]):], "\n")
		}
		if got := string(appendMapsLine(nil, v)); got != line {
			t.Errorf("got  %swant %s", got, line)
		}
	}
}

// status is of one piece, however it is read, and new for each reader.
func TestStatus(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{})
	seen := map[string]bool{}
	for range 5 {
		f := m.open("status")
		for range 2 { // from the beginning again, as of any file of /proc
			var all []byte
			buf := make([]byte, 1000)
			for off := int64(0); ; {
				n, err := f.ReadAt(buf, off)
				all = append(all, buf[:n]...)
				off += int64(n)
				if err == io.EOF || n == 0 {
					break
				}
			}
			if !bytes.HasPrefix(all, []byte("{\n")) || !bytes.HasSuffix(all, []byte("\"test\"\n}\n")) || len(all) < 20000 {
				t.Errorf("%d bytes: %.20q ... %q", len(all), all, all[max(0, len(all)-20):])
			}
			if seen[string(all)] {
				t.Error("the same status again")
			}
			seen[string(all)] = true
		}
	}
}

func TestReadOnly(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Image: true, Files: []fileSpec{{Path: "/a/b", Size: 5000}}})
	// The mount is made writable, so that it is our refusal and not only the kernel's.
	for _, remount := range []bool{false, true} {
		if remount {
			if err := unix.Mount("", m.dir, "", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV, ""); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"mem", "maps", "status", "files/a/b", "map/0", "map/image", "vma/00400000-00480000", "files/a"} {
			p := filepath.Join(m.dir, name)
			for _, flags := range []int{unix.O_WRONLY, unix.O_RDWR, unix.O_WRONLY | unix.O_TRUNC, unix.O_RDONLY | unix.O_TRUNC, unix.O_RDWR | unix.O_CREAT, unix.O_WRONLY | unix.O_APPEND} {
				fd, err := unix.Open(p, flags, 0)
				if err != unix.EROFS && !(name == "files/a" && err == unix.EISDIR) {
					t.Errorf("open of %s with %#x: %v", name, flags, err)
				}
				if err == nil {
					unix.Close(fd)
				}
			}
			for what, err := range map[string]error{
				"truncate": unix.Truncate(p, 1),
				"chmod":    unix.Chmod(p, 0o777),
				"chown":    unix.Chown(p, 1, 1),
				"utimes":   unix.Utimes(p, make([]unix.Timeval, 2)),
				"setxattr": unix.Setxattr(p, "user.x", []byte("y"), 0),
				"link":     unix.Link(p, p+"2"),
				"rename":   unix.Rename(p, p+"2"),
				"unlink":   unix.Unlink(p),
				"rmdir":    unix.Rmdir(p),
			} {
				switch {
				case err == unix.EROFS:
				case what == "setxattr" && remount && err == unix.EOPNOTSUPP: // there are none
				case what == "link" && name == "files/a" && err == unix.EPERM:
				case (what == "rmdir" || what == "unlink" || what == "truncate") && (err == unix.ENOTDIR || err == unix.EISDIR):
				default:
					t.Errorf("%s of %s: %v", what, name, err)
				}
			}
		}
		for what, err := range map[string]error{
			"mkdir":   unix.Mkdir(m.dir+"/new", 0o700),
			"mknod":   unix.Mknod(m.dir+"/files/new", unix.S_IFIFO|0o600, 0),
			"symlink": unix.Symlink("x", m.dir+"/vma/new"),
		} {
			if err != unix.EROFS {
				t.Errorf("%s: %v", what, err)
			}
		}
		fd, err := unix.Open(m.dir+"/map/new", unix.O_RDWR|unix.O_CREAT, 0o600)
		if err != unix.EROFS {
			t.Errorf("create: %d %v", fd, err)
		}
	}
	// Opened for reading nothing can be written, mapped or otherwise.
	f := m.open("mem")
	if _, err := unix.Mmap(int(f.Fd()), 0x400000, page.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != unix.EACCES {
		t.Errorf("a shared writable mapping: %v", err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, page.Size); err != unix.EBADF {
		t.Errorf("fallocate: %v", err)
	}
	if fd, err := unix.Open(m.dir+"/mem", unix.O_RDONLY|unix.O_DIRECT, 0); err != unix.EINVAL {
		t.Errorf("open with O_DIRECT: %d %v", fd, err)
	}
	// Nobody but root.
	out, err := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", m.dir+"/maps").CombinedOutput()
	if err == nil {
		t.Errorf("another user may read: %s", out)
	}
}

// What runs from the mount, and what the kernel reads from it.
func TestExecute(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE, testutil.AMD64)
	testutil.NoLeaks(t)
	code := filepath.Join(t.TempDir(), "code")
	text := make([]byte, 2*page.Size)
	copy(text[page.Size:], "\xb8\x2a\x00\x00\x00\xc3") // mov $42, %eax; ret
	if err := os.WriteFile(code, text, 0o600); err != nil {
		t.Fatal(err)
	}
	bin := testutil.CCText(t, "runmap", `
#include <fcntl.h>
#include <sys/mman.h>
int main(int argc, char **argv) {
	int fd = open(argv[1], O_RDONLY);
	char *p = mmap(0, 8192, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);
	return argc < 2 || p == MAP_FAILED ? 1 : ((int (*)(void))(p + 4096))();
}`)
	st, err := os.Stat(bin)
	if err != nil {
		t.Fatal(err)
	}
	m := start(t, spec{Files: []fileSpec{{Path: "/code", Size: int64(len(text)), From: code}, {Path: bin, Size: st.Size(), Mode: 0o755, From: bin}}})
	for _, program := range []string{bin, m.dir + "/map/1", filepath.Join(m.dir, "files", bin)} {
		var exit *exec.ExitError
		if err := exec.Command(program, m.dir+"/map/0").Run(); !errors.As(err, &exit) || exit.ExitCode() != 42 {
			t.Errorf("code from the mount, by %s: %v", program, err)
		}
	}
	if err := exec.Command(m.dir + "/map/0").Run(); !errors.Is(err, os.ErrPermission) {
		t.Errorf("what is not executable was executed: %v", err)
	}
	// sendfile(2), to a socket and to a file.
	from := m.open("map/1")
	to, err := os.Create(filepath.Join(t.TempDir(), "copy"))
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	for {
		n, err := unix.Sendfile(int(to.Fd()), int(from.Fd()), nil, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			break
		}
	}
	got, _ := os.ReadFile(to.Name())
	expect, _ := os.ReadFile(bin)
	if err := diff(got, expect); err != nil {
		t.Errorf("sendfile: %v", err)
	}
	if n, err := strconv.Atoi(m.do("demand")); err != nil || n == 0 {
		t.Errorf("reads below map were no demand: %d %v", n, err)
	}
}

// Each open file has the read-ahead that was set when it was opened.
func TestReadAhead(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.FUSE)
	testutil.NoLeaks(t)
	m := start(t, spec{VMAs: someVMAs, Files: []fileSpec{{Path: "/f", Size: 64 << 20}}})
	fault := func(f *os.File, at int64) string {
		buf := make([]byte, page.Size)
		if n := copyMapped(int(f.Fd()), buf, at, false, false); n != len(buf) {
			t.Errorf("a fault: %d bytes", n)
		}
		return m.do("most")
	}
	far := m.open("map/0")
	m.do("readahead 64")
	near := m.open("map/0")
	m.do("readahead 1024")
	if n := fault(near, 16<<20); n != "65536" {
		t.Errorf("a fault in what was opened with 64 KiB asked for %s bytes", n)
	}
	if n := fault(far, 32<<20); n != "1048576" {
		t.Errorf("a fault in what was opened with 1024 KiB asked for %s bytes", n)
	}
	if _, err := m.open("files/f").ReadAt(make([]byte, 8<<20), 0); err != nil {
		t.Error(err)
	}
	if n := m.do("most"); n != "1048576" {
		t.Errorf("a large read asked for %s bytes at most", n)
	}
}
