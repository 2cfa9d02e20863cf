package checkpoint

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// mapper maps the files that it is told: a path behind a '+' shared, all others
// privately, twice. It unmaps nothing, and ends with its files closed.
const mapper = `
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
int main(int argc, char **argv) {
	for (int i = 1; i < argc; i++) {
		int shared = argv[i][0] == '+', fd = open(argv[i] + shared, shared ? O_RDWR : O_RDONLY);
		if (fd < 0) { perror(argv[i]); return 1; }
		char *p = mmap(0, 64 << 10, PROT_READ | (shared ? PROT_WRITE : 0), shared ? MAP_SHARED : MAP_PRIVATE, fd, 0);
		if (p == MAP_FAILED) { perror(argv[i]); return 1; }
		if (!shared) mmap(0, 8 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 8 << 10);
		close(fd);
	}
	printf("ready\n"); fflush(stdout);
	for (;;) pause();
}`

// randomFile makes a file of random bytes.
func randomFile(t *testing.T, name string, size int) []byte {
	t.Helper()
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	must(t, os.WriteFile(name, b, 0o644))
	return b
}

// padded is what n bytes from off on of a file read as.
func padded(content []byte, off, n int) []byte {
	out := make([]byte, n)
	if off < len(content) {
		copy(out, content[off:])
	}
	return out
}

// TestMappedFiles: what a frozen process has mapped privately can be read, whatever
// becomes of the names, and under the same numbers by whoever finds it held.
func TestMappedFiles(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64, testutil.CgroupV2)
	testutil.NoLeaks(t)
	dir := t.TempDir()
	path := func(n string) string { return filepath.Join(dir, n) }
	content := map[string][]byte{}
	for name, size := range map[string]int{"odd": 5000, "whole": 3 * page.Size, "long": 70_000, "early": 9000, "late": 9001, "shared": 10_000} {
		content[path(name)] = randomFile(t, path(name), size)
	}
	p := testutil.Start(t, testutil.CCText(t, "mapper", mapper), path("odd"), path("early"), path("whole"), "/dev/zero", path("late"), "+"+path("shared"), path("long"))
	p.WaitText("ready", time.Minute)
	must(t, os.Remove(path("early")))
	await(t, p.Pid(), 'S')
	s, err := Open(p.Pid(), Options{})
	must(t, err)
	defer func() { s.Close() }()
	ctx := t.Context()
	if err := s.ReadPages(page.FirstFileSpace, []page.Range{{End: page.Size}}, make([]byte, page.Size)); !errors.Is(err, ErrState) {
		t.Errorf("a file read before there is an image: %v", err)
	}
	must(t, s.Isolate(ctx))
	must(t, s.Survey())
	must(t, s.Freeze(ctx))
	img, _, err := s.Capture(ctx)
	must(t, err)
	must(t, s.Hold(ctx))
	b, err := image.Encode(img)
	must(t, err)
	img, err = image.Decode(b)
	must(t, err)

	pr := &img.Processes[0]
	checkMappedFiles(t, img, pr, dir)
	exe, err := os.ReadFile(pr.Exe)
	must(t, err)
	content[pr.Exe] = exe
	check := func(when string) {
		t.Helper()
		var wg sync.WaitGroup
		for i, f := range img.MappedFiles {
			want, ok := content[f.Path]
			if !ok {
				continue
			}
			wg.Go(func() {
				for _, rs := range [][]page.Range{
					{{Start: 0, End: page.Size}},
					{{Start: page.Size, End: 4 * page.Size}, {Start: 0, End: 2 * page.Size}, {Start: 17 * page.Size, End: 18 * page.Size}},
					{{Start: 1 << 40, End: 1<<40 + page.Size}, {Start: 1<<63 - page.Size, End: 1 << 63}, {Start: 1<<64 - 2*page.Size, End: 1<<64 - page.Size}},
				} {
					var buf []byte
					for _, r := range rs {
						buf = append(buf, bytes.Repeat([]byte{0xa5}, int(r.Bytes()))...)
					}
					if err := s.ReadPages(page.FirstFileSpace+page.Space(i), rs, buf); err != nil {
						t.Errorf("%s: %v", when, err)
						return
					}
					for _, r := range rs {
						off := int(min(r.Start, 1<<40))
						if !bytes.Equal(buf[:r.Bytes()], padded(want, off, int(r.Bytes()))) {
							t.Errorf("%s: %v of %s has wrong bytes", when, r, f.Path)
						}
						buf = buf[r.Bytes():]
					}
				}
			})
		}
		wg.Wait()
		if err := s.ReadPages(page.FirstFileSpace+page.Space(len(img.MappedFiles)), []page.Range{{End: page.Size}}, make([]byte, page.Size)); err == nil {
			t.Errorf("%s: there is one file more", when)
		}
	}
	check("after the capture")

	must(t, os.Remove(path("late")))
	must(t, os.Rename(path("odd"), path("zodd")))
	randomFile(t, path("odd"), 7000)
	check("after files have got other names")
	must(t, s.Close())
	s, err = Reattach(ctx, p.Pid(), Options{})
	must(t, err)
	check("by who has found it held")

	must(t, os.Truncate(path("zodd"), 100))
	content[path("odd")] = content[path("odd")][:100]
	check("after a file was truncated")

	files := s.files.Load()
	broken := slices.IndexFunc(files.list, func(f mappedFile) bool { return strings.HasSuffix(f.name, "/whole") })
	must(t, files.list[broken].file.Close())
	err = s.ReadPages(page.FirstFileSpace+page.Space(broken), []page.Range{{End: page.Size}}, make([]byte, page.Size))
	if err == nil || !strings.Contains(err.Error(), path("whole")) {
		t.Errorf("a file that cannot be read: %v", err)
	}

	must(t, s.Thaw(ctx))
	if err := s.ReadPages(page.FirstFileSpace, []page.Range{{End: page.Size}}, make([]byte, page.Size)); !errors.Is(err, ErrState) {
		t.Errorf("a file of a process that runs again: %v", err)
	}
	await(t, p.Pid(), 'S')
}

// checkMappedFiles holds the list against the mappings.
func checkMappedFiles(t *testing.T, img *image.Image, pr *image.Process, dir string) {
	t.Helper()
	var order []string
	for _, v := range pr.VMAs {
		private := v.Path != "" && v.Path[0] == '/' && !v.Shared && v.Kind != image.VMADevice
		if private && !slices.Contains(order, v.Path) {
			order = append(order, v.Path)
		}
		if (v.Kind == image.VMAFile) != (v.MappedFile > 0) {
			t.Errorf("mapping %v of %s, kind %d, is of file %d", v.Range, v.Path, v.Kind, v.MappedFile-1)
		} else if v.MappedFile > 0 {
			if f := img.MappedFiles[v.MappedFile-1]; f.Path != v.Path || f.File != v.File || f.Deleted {
				t.Errorf("mapping %v of %s is of file %+v", v.Range, v.Path, f)
			}
		}
	}
	var list []string
	for _, f := range img.MappedFiles {
		list = append(list, f.Path)
		if hashed := filepath.Dir(f.Path) == dir; hashed != (f.File.Hash != "") || hashed == (f.File.BuildID != "") {
			t.Errorf("%s has the hash %q and the build id %q", f.Path, f.File.Hash, f.File.BuildID)
		}
		if want := filepath.Join(dir, "early") == f.Path; f.Deleted != want || f.File.Mode&unix.S_IFMT != unix.S_IFREG {
			t.Errorf("file %+v", f)
		}
	}
	if !slices.Equal(list, order) || len(list) < 7 {
		t.Errorf("files %q, mappings show %q", list, order)
	}
	if pr.ExeFile == 0 || img.MappedFiles[pr.ExeFile-1].Path != pr.Exe {
		t.Errorf("the executable is file %d of %q", pr.ExeFile-1, list)
	}
}

// TestUnmappedExecutable: a program may have unmapped all of its file. It comes last.
func TestUnmappedExecutable(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	fs := listMappedFiles(os.Getpid(), nil, nil)
	defer fs.close()
	<-fs.opened
	exe, err := os.Executable()
	must(t, err)
	if len(fs.list) != 1 || fs.exe != 0 || fs.list[0].name != exe || fs.list[0].err != nil {
		t.Errorf("%+v, the executable is number %d", fs.list, fs.exe)
	}
}
