package vm

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Image is what a guest boots from.
type Image struct {
	Kernel string // path of the kernel, an ELF file
	Initrd string // path of the initramfs: modules and init
}

// The cache has a directory for each kernel package and list of modules, with
// the kernel, the modules, and an initramfs for each version of init. All get
// their names when they are complete, so what has its name can be used, whoever
// else builds the same.
const (
	kernelName  = "vmlinux"
	modulesName = "modules.cpio"
	scratchName = "scratch" // what the holder of the lock works in
	lockName    = "lock"
)

// layout changes when files in the cache get another form.
const layout = 2

// CacheDir is where boot files are kept: pageferry/vm in the user's cache
// directory. It may be removed at any time when no guest boots.
func CacheDir() (string, error) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("vm: no cache directory, set XDG_CACHE_HOME: %w", err)
	}
	return filepath.Join(dir, "pageferry", "vm"), nil
}

// Prepare returns what to boot from. The first time it fetches a kernel package
// with apt-get, some 100 MB, and builds init with the go command, for which it
// must be called in this module's tree. Many may call it at the same time, also in
// several processes: one does the work.
func Prepare(ctx context.Context) (Image, error) {
	image, err := prepare(ctx)
	if err != nil {
		return Image{}, fmt.Errorf("vm: no guest to boot: %w", err)
	}
	return image, nil
}

func prepare(ctx context.Context) (Image, error) {
	if runtime.GOARCH != "amd64" {
		return Image{}, fmt.Errorf("guests are x86-64, this is %s", runtime.GOARCH)
	}
	if _, err := findQEMU(); err != nil {
		return Image{}, err
	}
	dir, err := CacheDir()
	if err != nil {
		return Image{}, err
	}
	wanted := os.Getenv(EnvKernel)
	if image, ok := cached(dir, wanted); ok {
		return image, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Image{}, err
	}
	unlock, err := lock(ctx, filepath.Join(dir, lockName))
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	if image, ok := cached(dir, wanted); ok {
		return image, nil
	}
	// What is there was left by one that was killed: we hold the lock.
	scratch := filepath.Join(dir, scratchName)
	if err := os.RemoveAll(scratch); err != nil {
		return Image{}, err
	}
	if err := os.Mkdir(scratch, 0o755); err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(scratch)
	kernel, ok := cachedKernel(dir, wanted)
	if !ok {
		if kernel, err = buildKernel(ctx, dir, scratch, wanted); err != nil {
			return Image{}, err
		}
	}
	if err := buildInitrd(ctx, scratch, kernel); err != nil {
		return Image{}, err
	}
	return imageIn(kernel), nil
}

func imageIn(kernel string) Image {
	return Image{Kernel: filepath.Join(kernel, kernelName), Initrd: filepath.Join(kernel, initrdName())}
}

func cached(dir, wanted string) (Image, bool) {
	kernel, ok := cachedKernel(dir, wanted)
	if !ok {
		return Image{}, false
	}
	image := imageIn(kernel)
	_, err := os.Stat(image.Initrd)
	return image, err == nil
}

// cachedKernel returns the directory of the newest kernel that is there; if one
// is wanted, of that one.
func cachedKernel(dir, wanted string) (string, bool) {
	suffix := "-" + digest(fmt.Sprint(layout), strings.Join(modules, " "))
	list, err := os.ReadDir(dir)
	if err != nil {
		return "", false
	}
	prefix := ""
	if wanted != "" {
		// The file of a package is called NAME_VERSION_ARCHITECTURE.deb.
		prefix = strings.TrimSuffix(strings.TrimSuffix(filepath.Base(wanted), ".deb"), "_amd64")
	}
	best := ""
	for _, e := range list {
		name, ok := strings.CutSuffix(e.Name(), suffix)
		if !ok || prefix != "" && name != prefix && !strings.HasPrefix(name, prefix+"_") {
			continue
		}
		if best == "" || newer(name, strings.TrimSuffix(best, suffix)) {
			best = e.Name()
		}
	}
	return filepath.Join(dir, best), best != ""
}

// buildKernel fetches a kernel package and unpacks what a guest needs of it.
func buildKernel(ctx context.Context, dir, scratch, wanted string) (string, error) {
	deb, err := fetch(ctx, scratch, wanted)
	if err != nil {
		return "", err
	}
	name := strings.TrimSuffix(strings.TrimSuffix(filepath.Base(deb), ".deb"), "_amd64")
	name += "-" + digest(fmt.Sprint(layout), strings.Join(modules, " "))
	made := filepath.Join(scratch, "kernel")
	if err := os.Mkdir(made, 0o755); err != nil {
		return "", err
	}
	if err := unpack(ctx, deb, made); err != nil {
		return "", fmt.Errorf("%s: %w", filepath.Base(deb), err)
	}
	to := filepath.Join(dir, name)
	if err := os.Rename(made, to); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", err
	}
	return to, nil
}

//go:embed init/*.go link/*.go
var initSource embed.FS

// initrdName names the initramfs with the init that this program was built with.
func initrdName() string {
	parts := []string{runtime.Version()}
	for _, pattern := range []string{"init/*.go", "link/*.go"} {
		names, _ := fs.Glob(initSource, pattern)
		for _, name := range names {
			b, err := initSource.ReadFile(name)
			if err != nil {
				panic(err) // it is embedded
			}
			parts = append(parts, name, string(b))
		}
	}
	return "initrd-" + digest(parts...)
}

// buildInitrd puts init behind the modules: a kernel takes several archives in
// a row for one (Documentation/driver-api/early-userspace/buffer-format.rst).
func buildInitrd(ctx context.Context, scratch, kernel string) error {
	bin := filepath.Join(scratch, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", bin, "github.com/pageferry/pageferry/test/vm/init")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=-mod=readonly -buildvcs=false")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%v: %w (it must run in the tree of pageferry)\n%s", cmd.Args, err, out)
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return err
	}
	archive, err := os.ReadFile(filepath.Join(kernel, modulesName))
	if err != nil {
		return err
	}
	c := newArchive(archive)
	for _, dir := range []string{"proc", "sys", "dev", "root", "host", "layer"} {
		c.dir(dir)
	}
	// The kernel opens it for init's output before init can mount anything.
	c.console("dev/console")
	c.file("init", 0o755, program)
	made := filepath.Join(scratch, "initrd")
	if err := os.WriteFile(made, c.end(), 0o644); err != nil {
		return err
	}
	prune(kernel)
	return os.Rename(made, filepath.Join(kernel, initrdName()))
}

// prune removes what other versions of init were built into a month ago.
func prune(kernel string) {
	list, _ := filepath.Glob(filepath.Join(kernel, "initrd-*"))
	for _, path := range list {
		if st, err := os.Stat(path); err == nil && time.Since(st.ModTime()) > 30*24*time.Hour {
			_ = os.Remove(path)
		}
	}
}

// digest is a short hash of texts.
func digest(texts ...string) string {
	h := sha256.New()
	for _, s := range texts {
		fmt.Fprintf(h, "%d %s\n", len(s), s)
	}
	return hex.EncodeToString(h.Sum(nil)[:6])
}

// lock takes the lock of a file; whoever dies with it gives it back.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			f.Close()
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("while another process builds it: %w", context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}
