package appliance

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/dirty"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// slowFile is a file whose reads go past the page cache, as with O_DIRECT, and end
// when they are let. The kernel holds on to the reader's pages meanwhile
// (fuse_direct_io in fs/fuse/file.c).
type slowFile struct {
	path    string
	reading chan struct{} // one for each read that has begun
	let     chan struct{} // one for each that may end
}

func newSlowFile(t *testing.T) *slowFile {
	t.Helper()
	f := &slowFile{filepath.Join(t.TempDir(), "slow"), make(chan struct{}, 1), make(chan struct{}, 1)}
	if err := os.WriteFile(f.path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	opts := fmt.Sprintf("fd=%d,rootmode=100644,user_id=0,group_id=0", fd)
	if err := unix.Mount("slow", f.path, "fuse.slow", 0, opts); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.serve(fd)
	}()
	t.Cleanup(func() {
		close(f.let)
		if err := unix.Unmount(f.path, unix.MNT_DETACH|unix.MNT_FORCE); err != nil {
			t.Error(err)
		}
		<-done
		_ = unix.Close(fd)
	})
	return f
}

// serve answers in the protocol of <linux/fuse.h> until the file is unmounted.
func (f *slowFile) serve(fd int) {
	const forget, getattr, open, read, flush, release, initialize, interrupt = 2, 3, 14, 15, 25, 18, 26, 36
	in := make([]byte, 128<<10)
	for {
		n, err := unix.Read(fd, in)
		if err == unix.EINTR || err == unix.EAGAIN || err == unix.ENOENT {
			continue
		}
		if err != nil || n < 40 {
			return
		}
		le := binary.LittleEndian
		out, code := make([]byte, 16, 8192), int32(0)
		switch le.Uint32(in[4:]) {
		case forget, interrupt:
			continue
		case initialize:
			b := make([]byte, 64)
			le.PutUint32(b, 7)
			le.PutUint32(b[4:], 31)
			le.PutUint32(b[20:], 64<<10) // max_write
			out = append(out, b...)
		case getattr:
			b := make([]byte, 104)
			le.PutUint64(b[16:], 1)        // ino
			le.PutUint64(b[24:], 1<<20)    // size
			le.PutUint32(b[76:], 0o100644) // mode
			le.PutUint32(b[80:], 1)        // nlink
			out = append(out, b...)
		case open:
			b := make([]byte, 16)
			le.PutUint32(b[8:], 1) // FOPEN_DIRECT_IO
			out = append(out, b...)
		case read:
			f.reading <- struct{}{}
			<-f.let
			out = append(out, bytes.Repeat([]byte{'n'}, int(le.Uint32(in[56:])))...)
		case flush, release:
		default:
			code = -int32(unix.ENOSYS)
		}
		le.PutUint32(out, uint32(len(out)))
		le.PutUint32(out[4:], uint32(code))
		le.PutUint64(out[8:], le.Uint64(in[8:]))
		_, _ = unix.Write(fd, out)
	}
}

const directReader = `
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv) {
	char *p = mmap(0, 4 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), line[16];
	int fd = -1;
	memset(p, 'o', 4 * 4096);
	printf("%lx\n", (unsigned long)p); fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		if (line[0] == 'o') fd = open(argv[1], O_RDONLY);
		else if (read(fd, p + 4096, 4096) != 4096) return 1;
		printf("done\n"); fflush(stdout);
	}
	return argc;
}`

// hooked is a tracker that calls a function before its next look.
type hooked struct {
	dirty.Tracker
	before func()
}

func (h *hooked) Collect(maps []proc.Mapping) (dirty.Pages, error) {
	if f := h.before; f != nil {
		h.before = nil
		f()
	}
	return h.Tracker.Collect(maps)
}

// TestReadPastThePageCache: what a device or a file server writes into a page that
// the program gave the kernel before a look, and after it, sets no bit and takes away
// no protection. It must be told as written all the same.
func TestReadPastThePageCache(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("opened late %v", late), func(t *testing.T) {
			testutil.NoLeaks(t)
			file := newSlowFile(t)
			ours, theirs, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer theirs.Close()
			cmd := exec.Command(testutil.CCText(t, "direct", directReader), file.path)
			cmd.Stdin = ours
			r := testutil.StartCmd(t, cmd, time.Minute)
			ours.Close()
			r.WaitText("\n", time.Minute)
			first, _, _ := bufio.NewReader(strings.NewReader(r.Text())).ReadLine()
			base, err := strconv.ParseUint(string(first), 16, 64)
			if err != nil {
				t.Fatal(err)
			}
			dones := 0
			say := func(what string) { fmt.Fprintln(theirs, what); dones++ }
			await := func() {
				t.Helper()
				testutil.Eventually(t, time.Minute, func() error {
					if n := strings.Count(r.Text(), "done"); n < dones {
						return fmt.Errorf("%d of %d done", n, dones)
					}
					return nil
				})
			}
			s, err := checkpoint.Open(r.Pid(), checkpoint.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			p := newProcess(s, r.Pid(), SourceOptions{})
			if method, err := p.Track(t.Context()); err != nil || method != "wp-async" {
				t.Fatal(method, err)
			}
			defer p.untrack()
			at := page.Addr(base) + page.Size
			// What whoever collects the pages has of this one, as the source would send it.
			var have []byte
			look := func() {
				t.Helper()
				l, err := p.Look(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if !l.Content.Contains(at) {
					t.Fatal("the page is not there")
				}
				if l.Written.Contains(at) {
					have = make([]byte, page.Size)
					if err := p.ReadPages(0, []page.Range{page.PageOf(at)}, have); err != nil {
						t.Fatal(err)
					}
				}
			}
			look()
			if !late {
				say("open")
				await()
			}
			begin := func() {
				if late {
					say("open")
					await()
				}
				say("read")
				<-file.reading
				// It ends in the middle of a look, or after it.
				time.AfterFunc(300*time.Millisecond, func() { file.let <- struct{}{} })
			}
			if late {
				p.tracker = &hooked{p.tracker, begin}
			} else {
				begin()
			}
			look()
			await()
			look()
			if !bytes.Equal(have, bytes.Repeat([]byte{'n'}, page.Size)) {
				t.Errorf("the page that was sent last has %q, and the program read %q", have[:3], "nnn")
			}
		})
	}
}
