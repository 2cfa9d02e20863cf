package survive_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// mapped are the files that the guest has mapped, as maps call them.
func (g *guest) mapped(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", g.outer()))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestFilesKept: a host that is to keeps the files that come, and maps the copies then
// and the next time. Where there is no space for them the process gets private memory.
func TestFilesKept(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	h := newHome(t, "--drop") // what is given up is to be the file's again
	r.b.hide(t, h.dir)
	const dir = "/var/lib/files"
	r.b.config = "files_dir: " + dir + "\n"
	r.b.restart(t)
	copies := func() (out []string) {
		_ = filepath.WalkDir(r.b.path(dir), func(path string, d os.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				out = append(out, path)
			}
			return nil
		})
		return out
	}
	var first []string
	for i, mode := range []string{"postcopy", "hybrid"} {
		g := r.selfChecking(t, r.a, h.args...)
		g.hop(mode)
		g.beat(20)
		r.clean(t, g)
		maps := g.mapped(t)
		for _, name := range []string{"/homeless", "/data", "/libc.so.6", "/liblinked.so", "/libloaded.so"} {
			if !strings.Contains(maps, dir+"/pageferry-file-") || !strings.Contains(maps, h.dir+name) || strings.Contains(maps, " "+h.dir) {
				t.Errorf("it does not have the copy of %s mapped:\n%s", name, maps)
				break
			}
		}
		if i == 0 {
			first = copies()
		} else if again := copies(); fmt.Sprint(again) != fmt.Sprint(first) {
			t.Errorf("there are other copies now: %q, then %q", first, again)
		}
		g.fork(t)
		g.hop(mode) // home, where these files are
		g.beat(5)
		if maps := g.mapped(t); strings.Contains(maps, "pageferry") || !strings.Contains(maps, " "+h.dir+"/data") {
			t.Errorf("at home it has not its own files mapped:\n%s", maps)
		}
		g.verify()
		r.clean(t)
	}
	if len(first) < 6 {
		t.Errorf("only these copies were kept: %q", first)
	}
	for _, f := range first {
		if st, err := os.Stat(f); err != nil || st.Mode()&0o277 != 0 || st.Mode()&0o400 == 0 {
			t.Errorf("%s: %v, %v", f, st.Mode(), err)
		}
	}
	// Hardly any space.
	if out, err := r.b.host.Run(t.Context(), "sh", "-ec", "rm -r "+dir+"/*; mount -t tmpfs -o size=2m tmpfs "+dir); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r.b.mounts = r.b.mountinfo()
	h.args = h.args[:len(h.args)-1] // private memory that is given up is zero
	g := r.selfChecking(t, r.a, h.args...)
	g.hop("postcopy")
	g.beat(5)
	r.clean(t, g)
	maps := g.mapped(t)
	if strings.Contains(maps, "/data") || !strings.Contains(maps, "/liblinked.so") {
		t.Errorf("what there is space for is kept, and nothing else:\n%s", maps)
	}
	for _, f := range copies() {
		if strings.Contains(f, "keeping") || strings.HasSuffix(f, "/data") {
			t.Errorf("%s is there", f)
		}
	}
	g.verify()
	r.clean(t)
}

// TestFilesNowhere moves a program whose files exist at neither host any more.
func TestFilesNowhere(t *testing.T) {
	begin(t)
	r := newRig(t)
	r.watch(t)
	h := newHome(t)
	r.b.hide(t, h.dir)
	g := r.selfChecking(t, r.a, h.args...)
	g.hop("hybrid")
	r.a.hide(t, h.dir)
	for _, mode := range []string{"postcopy", "precopy", "hybrid", "stop"} {
		g.hop(mode)
		g.beat(5)
		g.fork(t)
		g.settled(t, h.dir)
		r.clean(t, g)
	}
	g.verify()
	r.clean(t)
}

// TestFilesOfPython moves an interpreter whose program and libraries are on no other host.
func TestFilesOfPython(t *testing.T) {
	begin(t)
	testutil.Require(t, testutil.Program("ldd"))
	r := newRig(t)
	r.watch(t)
	dir := filepath.Join(t.TempDir(), "home")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	interpreter := python(t)
	b, err := os.ReadFile(interpreter)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/python", b, 0o755)
	libraries(t, dir, interpreter)
	// sys.prefix is found by the path of the program, which has moved.
	version, err := r.a.host.Run(t.Context(), interpreter, "-c", "import sys; print(sys.prefix)")
	if err != nil {
		t.Fatal(err)
	}
	r.b.hide(t, dir)
	for _, mode := range []string{"postcopy", "precopy", "hybrid"} {
		g := r.selfChecking(t, r.a, "/usr/bin/env", "PYTHONHOME="+strings.TrimSpace(version), "LD_LIBRARY_PATH="+dir, dir+"/python", "-u",
			filepath.Join(testutil.ModuleRoot(t), "test/programs/selfcheck.py"), "--entries", "4000")
		g.comm = "python"
		began := time.Now()
		rep := g.hop(mode)
		t.Logf("%s: downtime %.1f ms, resident after %.1f ms, all in %v", mode, rep.DowntimeMS, rep.ResidentMS, time.Since(began))
		g.beat(20)
		r.clean(t, g)
		g.settled(t, dir)
		g.hop(mode)
		g.beat(5)
		g.hop(mode)
		g.beat(5)
		g.settled(t, dir)
		g.verify()
		r.clean(t)
	}
}
