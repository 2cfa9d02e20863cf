package vm

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"golang.org/x/sync/errgroup"
)

// fakeKernel makes a kernel package that has all that unpacking looks for, and
// nothing that could boot.
func fakeKernel(t *testing.T) (deb string, kernel []byte) {
	t.Helper()
	testutil.Require(t, testutil.Program("dpkg-deb"), testutil.Program("xz"), testutil.Program("zstd"))
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	put := func(name string, data []byte) {
		t.Helper()
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	through := func(data []byte, name string, args ...string) []byte {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Stdin = bytes.NewReader(data)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	kernel = append([]byte("\x7fELF"), bytes.Repeat([]byte("kernel "), 1000)...)
	payload := append(through(kernel, "zstd", "-c"), 0, 0, 0, 0) // and its size
	image := make([]byte, 1024+64)
	image[bootSetupSects] = 1
	copy(image[bootMagic:], "HdrS")
	binary.LittleEndian.PutUint32(image[bootPayloadOffset:], 64)
	binary.LittleEndian.PutUint32(image[bootPayloadLength:], uint32(len(payload)))
	put("boot/vmlinuz-6.12.1-test", append(append(image, payload...), "rest"...))

	const tree = "lib/modules/6.12.1-test/"
	for i, name := range modules {
		switch {
		case name == "fuse":
			put(tree+"modules.builtin", []byte("kernel/fs/fuse/fuse.ko\n"))
		case i == 0:
			put(tree+"kernel/"+name+".ko", []byte("\x00depends=base-module\x00first\x00"))
		default:
			put(tree+"kernel/"+strings.ReplaceAll(name, "_", "-")+".ko.xz", through([]byte("\x00depends=\x00"+name+"\x00"), "xz", "-c"))
		}
	}
	put(tree+"kernel/base-module.ko", []byte("\x00depends=\x00base\x00"))
	put("DEBIAN/control", []byte("Package: linux-image-6.12.1-test\nVersion: 6.12.1-1\nArchitecture: amd64\nMaintainer: tests <tests@example.org>\nDescription: for a test\n"))
	deb = filepath.Join(dir, "linux-image-6.12.1-test_6.12.1-1_amd64.deb")
	if out, err := exec.Command("dpkg-deb", "--build", "-Zxz", root, deb).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return deb, kernel
}

// counted puts a program in front of PATH that notes that it was run.
func counted(t *testing.T, names ...string) (runs func(name string) int) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range names {
		real, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		script := fmt.Sprintf("#!/bin/sh\necho >> %s/%s.runs\nexec %s \"$@\"\n", dir, name, real)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return func(name string) int {
		b, _ := os.ReadFile(filepath.Join(dir, name+".runs"))
		return len(b)
	}
}

// emptyCache gives us a cache directory with nothing in it, but for the go command's
// own, which stays where it is.
func emptyCache(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("GOCACHE", strings.TrimSpace(string(out)))
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	dir, err := CacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// What many want at once is built once, with what a killed builder left in the
// way, and after that nothing is run.
func TestCache(t *testing.T) {
	testutil.Require(t, testutil.Program(qemu), testutil.Program("go"))
	testutil.NoLeaks(t)
	deb, kernel := fakeKernel(t)
	dir := emptyCache(t)
	t.Setenv(EnvKernel, deb)
	runs := counted(t, "dpkg-deb", "go")
	left := filepath.Join(dir, scratchName, "half")
	if err := os.MkdirAll(left, 0o755); err != nil {
		t.Fatal(err)
	}
	var all errgroup.Group
	images := make([]Image, 8)
	for i := range images {
		all.Go(func() (err error) {
			images[i], err = Prepare(t.Context())
			return err
		})
	}
	if err := all.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		if i != images[0] {
			t.Errorf("%v and %v", i, images[0])
		}
	}
	if runs("dpkg-deb") != 1 || runs("go") != 1 {
		t.Errorf("unpacked %d times, init built %d times", runs("dpkg-deb"), runs("go"))
	}
	if b, err := os.ReadFile(images[0].Kernel); err != nil || !bytes.Equal(b, kernel) {
		t.Errorf("the kernel has %d bytes, not the %d it had: %v", len(b), len(kernel), err)
	}
	checkInitrd(t, images[0].Initrd)
	if _, err := os.Stat(filepath.Join(dir, scratchName)); err == nil {
		t.Error("the scratch directory is still there")
	}
	if !strings.Contains(images[0].Kernel, "6.12.1-test_6.12.1-1") {
		t.Errorf("%s does not tell the package's version", images[0].Kernel)
	}

	// A name finds it, too, and so does nothing at all; another does not.
	for _, name := range []string{"linux-image-6.12.1-test", ""} {
		t.Setenv(EnvKernel, name)
		if i, err := Prepare(t.Context()); err != nil || i != images[0] {
			t.Errorf("%q: %v, %v", name, i, err)
		}
	}
	if _, ok := cachedKernel(dir, "linux-image-6.12"); ok {
		t.Error("the beginning of a name was taken for it")
	}
	if runs("dpkg-deb") != 1 || runs("go") != 1 {
		t.Error("something was built again")
	}

	// Another init needs no package.
	if err := os.Remove(images[0].Initrd); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(t.Context()); err != nil || runs("dpkg-deb") != 1 || runs("go") != 2 {
		t.Errorf("%v; unpacked %d times, init built %d times", err, runs("dpkg-deb"), runs("go"))
	}
}

// checkInitrd looks for the modules, in an order in which they can be loaded, and
// init behind them.
func checkInitrd(t *testing.T, path string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, order, ok := strings.Cut(string(b), "modules/order\x00")
	order, _, _ = strings.Cut(order, "070701")
	names := strings.Fields(strings.Trim(order, "\x00"))
	if !ok || len(names) != len(modules) || names[0] != "base_module" || names[1] != "virtio_pci" {
		t.Errorf("order %q", names)
	}
	if strings.Contains(string(b), "fuse.ko") {
		t.Error("what is part of the kernel is a module")
	}
	i, j := strings.Index(string(b), "TRAILER!!!"), strings.LastIndex(string(b), "init\x00")
	if i < 0 || j < i {
		t.Errorf("modules end at %d, init is at %d", i, j)
	}
}

// While another builds one waits, and as long as one wants to.
func TestLock(t *testing.T) {
	testutil.NoLeaks(t)
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := lock(ctx, path); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("%v", err)
	}
	unlock()
	unlock, err = lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	unlock()
}

// What is missing is said, with what to do.
func TestWhatIsMissing(t *testing.T) {
	testutil.Require(t, testutil.Program(qemu), testutil.Program("dpkg-deb"))
	says := func(words ...string) {
		t.Helper()
		_, err := Prepare(t.Context())
		for _, w := range words {
			if err == nil || !strings.Contains(err.Error(), w) {
				t.Errorf("%v: does not say %q", err, w)
			}
		}
	}
	dir := emptyCache(t)
	t.Run("Package", func(t *testing.T) {
		t.Setenv(EnvKernel, "/nowhere/linux.deb")
		says("/nowhere/linux.deb", "no such file")
	})
	t.Run("Kernel", func(t *testing.T) {
		// A package without one.
		empty := t.TempDir()
		control := "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: tests <tests@example.org>\nDescription: for a test\n"
		if err := os.MkdirAll(filepath.Join(empty, "DEBIAN"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(empty, "DEBIAN/control"), []byte(control), 0o644); err != nil {
			t.Fatal(err)
		}
		deb := filepath.Join(t.TempDir(), "x.deb")
		if out, err := exec.Command("dpkg-deb", "--build", empty, deb).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Setenv(EnvKernel, deb)
		says("x.deb", "no kernel")
	})
	t.Run("Apt", func(t *testing.T) {
		// A program of that name that has nothing.
		bin := t.TempDir()
		for _, name := range []string{"apt-cache", "apt-get"} {
			if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
		says("apt offers no package", EnvKernel)
	})
	if list, _ := filepath.Glob(filepath.Join(dir, "*")); len(list) != 1 { // the lock
		t.Errorf("left in the cache: %q", list)
	}
	t.Run("QEMU", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		says(qemu, "apt-get install qemu-system-x86")
	})
}
