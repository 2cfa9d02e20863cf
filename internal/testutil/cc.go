package testutil

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// CC returns the path of a C program from test/programs, compiled. source is
// one file ("uffdchurn.c") or a folder of them ("everything"); flags go to the
// compiler. The result is kept between runs, keyed by all that it depends on.
func CC(t testing.TB, source string, flags ...string) string {
	t.Helper()
	Require(t, Program("cc"))
	from := filepath.Join(ModuleRoot(t), "test", "programs", source)
	var files, all []string
	if st, err := os.Stat(from); err != nil {
		t.Fatal(err)
	} else if st.IsDir() {
		files, _ = filepath.Glob(filepath.Join(from, "*.c"))
		all, _ = filepath.Glob(filepath.Join(from, "*.[ch]"))
	} else {
		files, all = []string{from}, []string{from}
	}
	args := append([]string{"-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"}, flags...)
	name := strings.TrimSuffix(filepath.Base(source), ".c")
	return build(t, name, all, args, func(out string) *exec.Cmd {
		args := slices.Concat(args, []string{"-o", out}, files, []string{"-lm", "-lrt"})
		return exec.Command("cc", args...)
	})
}

// CCText is CC for a program given as text, for what only one test needs.
func CCText(t testing.TB, name, text string, flags ...string) string {
	t.Helper()
	Require(t, Program("cc"))
	src := filepath.Join(t.TempDir(), name+".c")
	if err := os.WriteFile(src, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	args := append([]string{"-O2", "-g", "-Wall", "-pthread"}, flags...)
	return build(t, name, []string{src}, args, func(out string) *exec.Cmd {
		return exec.Command("cc", slices.Concat(args, []string{"-o", out, src, "-lm", "-lrt"})...)
	})
}

// GoProgram returns the path of a Go program of this module, built: "./cmd/pageferry",
// "./test/programs/gcprog". The go command's own cache makes it cheap.
func GoProgram(t testing.TB, pkg string, flags ...string) string {
	t.Helper()
	Require(t, Program("go"))
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", slices.Concat([]string{"build", "-o", out}, flags, []string{pkg})...)
	cmd.Dir = ModuleRoot(t)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, b)
	}
	return out
}

// Pageferry returns the path of the binary, built from the tree as it is.
func Pageferry(t testing.TB) string {
	t.Helper()
	return GoProgram(t, "./cmd/pageferry")
}

// ProgramCache is the directory of what CC has compiled.
func ProgramCache() string { return filepath.Join(realTemp, cacheName()) }

func cacheName() string { return fmt.Sprintf("pageferry-programs-%d", os.Getuid()) }

// build makes a program unless the cache has it. The cache is a directory that
// only we can write: what lies in it is executed.
func build(t testing.TB, name string, files, key []string, cmd func(out string) *exec.Cmd) string {
	t.Helper()
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", key)
	if v, err := exec.Command("cc", "--version").Output(); err == nil {
		h.Write(v)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(h, "%s %d\n", filepath.Base(f), len(b))
		h.Write(b)
	}
	dir := ProgramCache()
	if err := os.Mkdir(dir, 0o755); err != nil && !os.IsExist(err) {
		t.Fatal(err)
	}
	if st, err := os.Lstat(dir); err != nil || !st.IsDir() || st.Mode().Perm()&0o022 != 0 || !ownedByUs(st) {
		t.Fatalf("%s is not a directory that only this user can write: remove it", dir)
	}
	bin := filepath.Join(dir, hex.EncodeToString(h.Sum(nil)[:8]), name)
	if _, err := os.Stat(bin); err == nil {
		return bin
	}
	if err := os.MkdirAll(filepath.Dir(bin), 0o755); err != nil {
		t.Fatal(err)
	}
	tmp := fmt.Sprintf("%s.%d", bin, os.Getpid())
	c := cmd(tmp)
	if b, err := c.CombinedOutput(); err != nil {
		_ = os.Remove(tmp)
		t.Fatalf("%v: %v\n%s", c.Args, err, b)
	}
	// Whoever is first wins; the others' result is the same.
	if err := os.Rename(tmp, bin); err != nil {
		t.Fatal(err)
	}
	return bin
}

func ownedByUs(st fs.FileInfo) bool {
	uid, ok := owner(st)
	return ok && uid == os.Getuid()
}
