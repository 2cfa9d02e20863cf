package restore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint"
	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
)

// table is what both the program and its library have: 256 KiB that are not touched
// until the program is told to.
const table = `
static const unsigned table[64 << 10] = { [0 ... (64 << 10) - 1] = SEED, [70] = 7 * SEED };
static unsigned sum(const unsigned *p, unsigned n) { unsigned s = 0; for (unsigned i = 0; i < n; i++) s = 31 * s + p[i]; return s; }
`

const homelessLibrary = `
#define SEED 0x9e3779b9
` + table + `
unsigned of_library(void) { return sum(table, sizeof table / 4); }
`

// homeless has a file mapped, of which it has changed a page. At a signal it writes
// what all its content adds up to into argv[2].
const homeless = `
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#define SEED 0x85ebca6b
` + table + `
unsigned of_library(void);
static unsigned *data;
static volatile sig_atomic_t told;
static void tell(int s) { (void)s; told = 1; }
int main(int argc, char **argv) {
	sigset_t usr1, none;
	int fd = open(argv[1], O_RDONLY);
	data = mmap(0, 40 << 10, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	close(fd);
	data[5 << 10] = 4711;
	sigemptyset(&none);
	sigemptyset(&usr1); sigaddset(&usr1, SIGUSR1);
	sigprocmask(SIG_BLOCK, &usr1, 0);
	signal(SIGUSR1, tell);
	puts("ready"); fflush(stdout);
	for (;;) {
		char line[80];
		sigsuspend(&none);
		if (!told) continue;
		told = 0;
		fd = open(argv[2], O_CREAT | O_WRONLY | O_TRUNC, 0644);
		write(fd, line, sprintf(line, "%u %u %u\n", sum(table, sizeof table / 4), of_library(), sum(data, 10 << 10)));
		close(fd);
	}
}`

// build compiles into dir.
func compile(t *testing.T, dir, name, text string, flags ...string) string {
	t.Helper()
	testutil.Require(t, testutil.Program("cc"))
	src, out := filepath.Join(t.TempDir(), name+".c"), filepath.Join(dir, name)
	if err := os.WriteFile(src, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command("cc", append([]string{"-O1", "-o", out, src}, flags...)...).CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, b)
	}
	return out
}

// homelessProgram makes a program of which all files lie in dir, and returns what
// starts it.
func homelessProgram(t *testing.T, dir string) (start func(out string) *testutil.Process) {
	t.Helper()
	fs, err := exec.Command("ldd", "/bin/sleep").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	loader := filepath.Join(dir, "ld.so")
	for _, f := range strings.Fields(string(fs)) {
		to := ""
		switch {
		case strings.HasPrefix(f, "/") && strings.Contains(f, "/ld-linux"):
			to = loader
		case strings.HasPrefix(f, "/") && strings.Contains(f, "/libc.so"):
			to = filepath.Join(dir, "libc.so.6")
		default:
			continue
		}
		b, err := os.ReadFile(f)
		if err == nil {
			err = os.WriteFile(to, b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	compile(t, dir, "libhomeless.so", homelessLibrary, "-shared", "-fPIC", "-Wl,--build-id=none")
	program := compile(t, dir, "homeless", homeless, "-L"+dir, "-l:libhomeless.so", "-Wl,-rpath,"+dir, "-Wl,--dynamic-linker="+loader)
	data := bytes.Repeat([]byte("some data, "), 4000)[:39_000]
	if err := os.WriteFile(filepath.Join(dir, "data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	return func(out string) *testutil.Process {
		p := testutil.Start(t, program, filepath.Join(dir, "data"), out)
		p.WaitText("ready", time.Minute)
		return p
	}
}

// provider serves files from copies.
type provider struct {
	img   *image.Image
	dir   string
	asked []int
}

// copyFiles reads the files as the destination would.
func (pr *provider) copyFiles(t *testing.T) func(*checkpoint.Session, *image.Image) {
	return func(s *checkpoint.Session, img *image.Image) {
		pr.img, pr.asked = img, nil
		for i, f := range img.MappedFiles {
			b := make([]byte, page.Addr(f.File.Size).Ceil())
			if err := s.ReadPages(page.FirstFileSpace+page.Space(i), []page.Range{{End: page.Addr(len(b))}}, b); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(pr.path(i), b[:f.File.Size], 0o400); err != nil {
				t.Fatal(err)
			}
		}
		pr.asked = nil
	}
}

func (pr *provider) FileAt(i int) (string, error) {
	pr.asked = append(pr.asked, i)
	return pr.path(i), nil
}

func (pr *provider) path(i int) string { return filepath.Join(pr.dir, fmt.Sprint(i)) }

func (pr *provider) Exe(_ context.Context, i int) (*os.File, error) {
	f, err := os.Open(filepath.Join(pr.dir, fmt.Sprint(i)))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return MakeExe(pr.img.MappedFiles[i].Path, pr.img.MappedFiles[i].File.Size, func(b []byte, at int64) error {
		_, err := f.ReadAt(b, at)
		return err
	})
}

// rebuildAt makes the process of sn anew, and p it.
func rebuildAt(t *testing.T, p *testutil.Process, sn *snapshot, adapt func(*Config)) {
	t.Helper()
	cfg := config(t)
	adapt(&cfg)
	ctx, trap := timed(t), serve(t, sn)
	s, err := Prepare(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Rebuild(ctx, sn.img, sn.mem, trap); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Park(ctx), s.Release(ctx)); err != nil {
		t.Fatal(err)
	}
	p.Moved(s.PID())
	t.Cleanup(p.Kill)
	trap.resident(t)
}

// TestHomeless: a process is rebuilt where none of its files exist, from copies of
// them, and can move on from there, and home again.
func TestHomeless(t *testing.T) {
	require(t)
	testutil.NoLeaks(t)
	dir, out := t.TempDir(), filepath.Join(t.TempDir(), "out")
	start := homelessProgram(t, dir)
	ask := func(p *testutil.Process) string {
		t.Helper()
		_ = os.Remove(out)
		p.Signal(unix.SIGUSR1)
		var b []byte
		testutil.Eventually(t, limit, func() (err error) {
			if b, err = os.ReadFile(out); err == nil && !bytes.HasSuffix(b, []byte("\n")) {
				err = errors.New("no answer")
			}
			return err
		})
		return string(b)
	}
	p := start(out)
	exe := func() string {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.Pid()))
		if err != nil {
			t.Error(err)
		}
		return to
	}
	stays := start(out)
	want := ask(stays)
	stays.Kill()
	program, away := exe(), dir+".away"
	content, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}

	pr := &provider{dir: t.TempDir()}
	sn := takeWith(t, p, pr.copyFiles(t))
	if err := os.Rename(dir, away); err != nil {
		t.Fatal(err)
	}
	lacking := Lacking(sn.img)
	if len(lacking) != 5 || !slices.ContainsFunc(lacking, func(l Lack) bool { return l.Exe && l.Mapped && strings.Contains(l.Error(), program) }) {
		t.Errorf("this host lacks %+v", lacking)
	}
	refused := func(adapt func(*Config), names ...string) {
		t.Helper()
		cfg := config(t)
		adapt(&cfg)
		s, err := Prepare(timed(t), cfg)
		if err != nil {
			t.Fatal(err)
		}
		trap := serve(t, sn)
		err = s.Rebuild(timed(t), sn.img, sn.mem, trap)
		if trap.trap != nil {
			trap.resident(t)
		}
		for _, name := range names {
			if err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("refused with %v, and not over %s", err, name)
			}
		}
	}
	refused(func(*Config) {}, "/ld.so", "/libc.so.6", "/libhomeless.so", "/data", "/homeless")
	refused(func(c *Config) { c.FileAt = pr.FileAt }, program)
	refused(func(c *Config) {
		c.FileAt, c.Exe = func(int) (string, error) { return "", errors.New("nothing is mounted") }, pr.Exe
	}, "/data", "nothing is mounted")
	for i := range sn.img.Processes[0].VMAs {
		if v := &sn.img.Processes[0].VMAs[i]; strings.HasSuffix(v.Path, "/data") {
			flags := v.Flags
			v.Flags = append(slices.Clone(flags), "sl")
			refused(func(c *Config) { c.FileAt, c.Exe = pr.FileAt, pr.Exe }, "/data", "sealed")
			v.Flags = flags
		}
	}
	refused(func(c *Config) {
		c.FileAt, c.Exe = pr.FileAt, func(context.Context, int) (*os.File, error) { return nil, errors.New("the link is down") }
	}, "the link is down", program)

	for _, ns := range []string{NamespaceNew, NamespaceAuto} {
		pr.asked = nil
		rebuildAt(t, p, sn, func(c *Config) { c.FileAt, c.Exe, c.PIDNamespace = pr.FileAt, pr.Exe, ns })
		if got := ask(p); got != want {
			t.Errorf("it says %q, and %q where it never moved", got, want)
		}
		if len(pr.asked) != 5 {
			t.Errorf("asked for the files %v", pr.asked)
		}
		if got := exe(); got != "/memfd:"+program+" (deleted)" {
			t.Errorf("its executable is %s", got)
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", p.Pid())); err != nil || !bytes.Equal(b, content) {
			t.Errorf("its executable has %d bytes, not the %d of %s: %v", len(b), len(content), program, err)
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", p.Pid())); err != nil || bytes.Contains(b, []byte(dir)) {
			t.Errorf("%v, %s", err, b)
		}
		last := pr.dir
		pr.dir = t.TempDir()
		sn = takeWith(t, p, pr.copyFiles(t))
		if err := os.RemoveAll(last); err != nil {
			t.Fatal(err)
		}
		if i := sn.img.Processes[0].ExeFile; i == 0 || sn.img.MappedFiles[i-1].Path != program || sn.img.Processes[0].Exe != program {
			t.Errorf("the executable is file %d of %+v", i-1, sn.img.MappedFiles)
		}
	}
	if err := os.Rename(away, dir); err != nil {
		t.Fatal(err)
	}
	rebuildAt(t, p, sn, func(c *Config) { c.FileAt = pr.FileAt }) // the executable is the one here, by its build id
	if got := exe(); got != program {
		t.Errorf("back home its executable is %s", got)
	}
	if got := ask(p); got != want {
		t.Errorf("back home it says %q, and %q where it never moved", got, want)
	}
}

// here is when the file was changed, in ns.
func here(path string) int64 {
	var st unix.Stat_t
	_ = unix.Stat(path, &st)
	return st.Mtim.Nano()
}

// TestSameFile: a file is another one unless size and time agree, or build id, or
// content.
func TestSameFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	write := func(text string, when time.Time) {
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chtimes(path, when, when)); err != nil {
			t.Fatal(err)
		}
	}
	old, now := time.Unix(1e9, 5), time.Unix(1e9, 6)
	const sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // SHA-256 of "abc"
	for _, c := range []struct {
		here   string
		when   time.Time
		want   image.FileID
		shared bool
		ok     bool
	}{
		{"abc", old, image.FileID{Size: 3, MTimeNS: old.UnixNano()}, false, true},
		{"abcd", old, image.FileID{Size: 3, MTimeNS: old.UnixNano()}, false, false},
		{"abc", now, image.FileID{Size: 3, MTimeNS: old.UnixNano()}, false, false},
		{"abc", now, image.FileID{Size: 3, MTimeNS: old.UnixNano()}, true, true},
		{"abc", now, image.FileID{Size: 3, MTimeNS: old.UnixNano(), Hash: sum}, false, true},
		{"abd", now, image.FileID{Size: 3, MTimeNS: old.UnixNano(), Hash: sum}, false, false},
		{"abd", old, image.FileID{Size: 3, MTimeNS: old.UnixNano(), Hash: sum}, false, true},
		{"abc", now, image.FileID{Size: 3, MTimeNS: old.UnixNano(), BuildID: "00"}, false, false},
	} {
		write(c.here, c.when)
		same := SameFile
		if c.shared {
			same = sameSize
		}
		if c.want.Hash != "" && here(path) != old.UnixNano() { // nobody has looked at the content yet
			if err := seemsSame(path, c.want); !errors.Is(err, ErrFileDiffers) {
				t.Errorf("%q of %v is the file %+v at first sight: %v", c.here, c.when, c.want, err)
			}
		}
		err := same(path, c.want)
		if c.want.Hash != "" {
			if quick := seemsSame(path, c.want); (quick == nil) != c.ok {
				t.Errorf("%q of %v for %+v, by what is known: %v", c.here, c.when, c.want, quick)
			}
		}
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrFileDiffers) {
			t.Errorf("%q of %v for %+v: %v", c.here, c.when, c.want, err)
		}
	}
}
