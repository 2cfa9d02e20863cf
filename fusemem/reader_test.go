package fusemem

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

const envReader = "PAGEFERRY_FUSEMEM_READER"

// read is the child process that reads: "pread" or "mmap" (see there) of so many bytes of a file at
// an offset, to standard output. Its exit status is the errno, and for a SIGBUS 255. A Go process
// whose thread waits in a page fault cannot stop the world, so nothing else happens in it.
func read(args []string) {
	debug.SetGCPercent(-1)
	file, how := args[0], args[1]
	offset, _ := strconv.ParseInt(args[2], 0, 64)
	n, _ := strconv.Atoi(args[3])
	switch how {
	case "watch":
		watch(file, n)
	case "stress":
		stress(file, offset, n)
	}
	exit := func(err error) {
		var e unix.Errno
		if x, ok := err.(unix.Errno); ok {
			e = x
		}
		fmt.Fprintln(os.Stderr, how, "of", file, "at", args[2], err)
		os.Exit(int(e))
	}
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		exit(err)
	}
	buf := make([]byte, n)
	switch how {
	case "pread":
		got, err := unix.Pread(fd, buf, offset)
		if err != nil {
			exit(err)
		}
		os.Stdout.Write(buf[:got])
	case "mmap", "mmapshared", "mmaprandom", "mmapwrite":
		flags := unix.MAP_PRIVATE
		if how == "mmapshared" {
			flags = unix.MAP_SHARED
		}
		b, err := unix.Mmap(fd, offset, n, unix.PROT_READ, flags)
		if err != nil {
			exit(err)
		}
		if how == "mmaprandom" || how == "mmapwrite" {
			_ = unix.Madvise(b, unix.MADV_RANDOM)
		}
		if how == "mmapwrite" { // the kernel touches it
			if _, err := unix.Write(1, b); err != nil {
				exit(err)
			}
			break
		}
		debug.SetPanicOnFault(true)
		defer func() {
			if recover() != nil {
				os.Exit(255)
			}
		}()
		copy(buf, b)
		os.Stdout.Write(buf)
	}
	os.Exit(0)
}

// watch is the child that has map/image mapped all the time: for each generation that it reads from
// standard input it says whether the mapping shows that one.
func watch(file string, pages int) {
	debug.SetGCPercent(-1)
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		fail(err)
	}
	b, err := unix.Mmap(fd, 0, pages*page.Size, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		fail(err)
	}
	for {
		var gen uint64
		if _, err := fmt.Scanln(&gen); err != nil {
			os.Exit(0)
		}
		fmt.Println(diff(b, want(tagImage+gen<<8, 0, pages)))
	}
}

// watcher is such a child.
type watcher struct {
	in  io.Writer
	out *bufio.Reader
}

func (m *mounted) watch(pages int) *watcher {
	m.Helper()
	cmd := exec.Command("/proc/self/exe", m.dir+"/map/image", "watch", "0", fmt.Sprint(pages))
	cmd.Env = append(os.Environ(), envReader+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		m.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		m.Fatal(err)
	}
	cmd.Stdout = w
	testutil.StartCmd(m.TB, cmd, 3*time.Minute)
	w.Close()
	m.Cleanup(func() { in.Close(); r.Close() })
	return &watcher{in, bufio.NewReader(r)}
}

// see fails the test if the watcher does not see a generation.
func (w *watcher) see(t *testing.T, gen uint64) {
	t.Helper()
	fmt.Fprintln(w.in, gen)
	if line, err := w.out.ReadString('\n'); err != nil || line != "<nil>\n" {
		t.Errorf("generation %d in a mapping: %q %v", gen, line, err)
	}
}

// reader is a child that reads; see read.
type reader struct {
	*testutil.Process
	out *os.File
	err *os.File
}

// reader starts one. What it reads goes to a file.
func (m *mounted) reader(name, how string, offset uint64, n int) *reader {
	m.Helper()
	cmd := exec.Command("/proc/self/exe", m.dir+"/"+name, how, fmt.Sprint(offset), fmt.Sprint(n))
	cmd.Env = append(os.Environ(), envReader+"=1")
	out, err := os.CreateTemp(m.TempDir(), "out")
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { out.Close() })
	cmd.Stdout = out
	return &reader{Process: testutil.StartCmd(m.TB, cmd, 3*time.Minute), out: out}
}

// result waits for the reader's end and returns what it read, and its exit status.
func (r *reader) result(t *testing.T) ([]byte, int) {
	t.Helper()
	status := 0
	if err := r.Wait(limit); err != nil {
		status = err.(*exec.ExitError).ExitCode()
	}
	b, err := os.ReadFile(r.out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return b, status
}

// reads is a reader that must get these bytes.
func (r *reader) mustRead(t *testing.T, want []byte) {
	t.Helper()
	got, status := r.result(t)
	if status != 0 || !bytes.Equal(got, want) {
		t.Errorf("a reader: status %d, %v", status, diff(got, want))
	}
}
