package survive_test

import (
	bin "encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// dataPages is how many pages the file has that test/programs/homeless maps.
const dataPages = 2048

// word is CONTENT_AT of table.h.
func word(seed, i uint32) uint32 { return 2654435761*(i+1) + 977*seed }

func words(seed uint32, n int) []byte {
	b := make([]byte, 0, 4*n)
	for i := range n {
		b = bin.LittleEndian.AppendUint32(b, word(seed, uint32(i)))
	}
	return b
}

// home is a directory with a program in it, and all the files that it lives from: its
// loader, its libraries, its data.
type home struct {
	dir  string
	args []string
}

func write(t testing.TB, path string, b []byte, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, b, mode); err != nil {
		t.Fatal(err)
	}
}

// libraries copies what program is linked to into dir, and returns the loader.
func libraries(t testing.TB, dir, program string) (loader string) {
	t.Helper()
	out, err := exec.Command("ldd", program).CombinedOutput()
	if err != nil {
		t.Fatalf("ldd %s: %v: %s", program, err, out)
	}
	for f := range strings.FieldsSeq(string(out)) {
		if !strings.HasPrefix(f, "/") || strings.HasPrefix(f, dir) {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(dir, filepath.Base(f))
		write(t, to, b, 0o755)
		if strings.HasPrefix(filepath.Base(f), "ld-") {
			loader = to
		}
	}
	return loader
}

func newHome(t testing.TB, args ...string) *home {
	t.Helper()
	testutil.Require(t, testutil.Program("cc"))
	h := &home{dir: filepath.Join(t.TempDir(), "home")}
	build := t.TempDir()
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for seed := range uint32(3) {
		write(t, fmt.Sprintf("%s/table%d", build, seed+1), words(seed+1, 128<<10), 0o644)
	}
	write(t, h.dir+"/data", words(7, dataPages<<10), 0o644)
	src := filepath.Join(testutil.ModuleRoot(t), "test/programs/homeless")
	cc := func(out string, args ...string) {
		cmd := exec.Command("cc", append([]string{"-O1", "-Wall", "-pthread", "-o", h.dir + "/" + out}, args...)...)
		cmd.Dir = build
		if b, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, b)
		}
	}
	cc("liblinked.so", "-shared", "-fPIC", "-DNAME=of_library", `-DFILE_="table1"`, "-Wl,--build-id=none", src+"/library.c")
	cc("libloaded.so", "-shared", "-fPIC", "-DNAME=of_other_library", `-DFILE_="table2"`, src+"/library.c")
	any := h.dir + "/any"
	cc("any", src+"/homeless.c", h.dir+"/liblinked.so", "-ldl")
	loader := libraries(t, h.dir, any)
	cc("homeless", src+"/homeless.c", h.dir+"/liblinked.so", "-ldl", "-Wl,-rpath,"+h.dir, "-Wl,--dynamic-linker="+loader)
	if err := os.Remove(any); err != nil {
		t.Fatal(err)
	}
	h.args = append([]string{h.dir + "/homeless", "--data", h.dir + "/data", "--library", h.dir + "/libloaded.so"}, args...)
	return h
}

// hide takes a directory away from a host, for as long as that lives.
func (n *node) hide(t testing.TB, dir string) {
	t.Helper()
	if out, err := n.host.Run(t.Context(), "mount", "-t", "tmpfs", "tmpfs", dir); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	n.mounts = n.mountinfo()
}

// fork has the guest fork children that check all that they see, and waits for that.
func (g *guest) fork(t testing.TB) {
	t.Helper()
	forked := func() int {
		b, _ := os.ReadFile(g.output)
		return strings.Count(string(b), "forked")
	}
	before := forked()
	pid := g.outer()
	if pid == 0 { // a signal to our own group
		t.Fatalf("%s is gone: %s", g.identity, g.said())
	}
	if err := unix.Kill(pid, unix.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, 30*time.Second, func() error {
		if forked() == before {
			return fmt.Errorf("%s has not forked: %s", g.identity, g.said())
		}
		return nil
	})
}

// settled fails the test unless nothing of a mount, and no file of dir, is mapped by the
// guest, and its executable is none of the mount.
func (g *guest) settled(t testing.TB, dir string) {
	t.Helper()
	pid := g.outer()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil || strings.Contains(string(maps), "/run/pageferry") || strings.Contains(string(maps), dir) {
		t.Errorf("%s: %v:\n%s", g.identity, err, maps)
	}
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil || !strings.HasPrefix(exe, "/memfd:"+dir) {
		t.Errorf("%s: its executable is %s: %v", g.identity, exe, err)
	}
}

// TestFilesFromTheSource moves programs to a host that has none of their files, and
// back, time and again.
func TestFilesFromTheSource(t *testing.T) {
	begin(t)
	r := newRig(t)
	h := newHome(t)
	r.b.hide(t, h.dir)
	for _, mode := range []string{"postcopy", "precopy", "hybrid", "stop"} {
		t.Run(mode, func(t *testing.T) {
			r.watch(t)
			g := r.selfChecking(t, r.a, h.args...)
			rep := g.hop(mode)
			began := time.Now()
			g.fork(t)
			t.Logf("downtime %.1f ms, resident after %.1f ms", rep.DowntimeMS, rep.ResidentMS)
			g.beat(20)
			g.settled(t, h.dir)
			r.clean(t, g)
			t.Logf("clean after %v", time.Since(began))
			g.hop(mode) // home: only the executable is looked for, and found
			g.beat(5)
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", g.outer())); err != nil || exe != h.args[0] {
				t.Errorf("back home its executable is %s: %v", exe, err)
			}
			g.hop(mode)
			g.fork(t)
			g.settled(t, h.dir)
			g.verify()
			r.clean(t)
		})
	}
}

// TestFilesLacking: with --trap uffd files must be there, and be the same.
func TestFilesLacking(t *testing.T) {
	begin(t)
	r := newRig(t)
	h := newHome(t)
	r.watch(t)
	g := r.selfChecking(t, r.a, h.args...)
	refused := func(names ...string) {
		t.Helper()
		req := g.request("postcopy")
		req.Trap = appliance.TrapUFFD
		rep, err := g.migrate(req)
		why := fmt.Sprint(rep.Reason, err)
		for _, name := range append(names, "--trap auto") {
			if rep.Outcome == appliance.OutcomeDone || !strings.Contains(why, name) {
				t.Errorf("%s: %s, without %s", rep.Outcome, why, name)
			}
		}
		g.beat(2)
	}
	r.b.hide(t, h.dir)
	refused(h.args[0], h.dir+"/data", h.dir+"/liblinked.so")
	other := r.b.path(h.dir)
	for _, name := range []string{"homeless", "data", "liblinked.so", "libloaded.so", "libc.so.6"} {
		b, err := os.ReadFile(filepath.Join(h.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(other, name), b, 0o755)
	}
	loader, _ := filepath.Glob(h.dir + "/ld-*")
	b, err := os.ReadFile(loader[0])
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(other, filepath.Base(loader[0])), append(b, 0), 0o755)
	refused(loader[0], "on the source")
	g.hop("postcopy") // all but the loader is mapped from where it is
	g.beat(5)
	testutil.Eventually(t, 10*time.Second, func() error { return r.leftovers(g) })
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", g.outer()))
	if err != nil || !strings.Contains(string(maps), h.dir+"/libc.so.6") || strings.Contains(string(maps), loader[0]) || strings.Contains(string(maps), "/run/pageferry") {
		t.Errorf("%v:\n%s", err, maps)
	}
	if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", g.outer())); err != nil || exe != h.args[0] {
		t.Errorf("its executable is %s: %v", exe, err)
	}
	g.verify()
	r.clean(t)
}
