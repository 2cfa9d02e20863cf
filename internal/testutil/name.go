package testutil

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
)

var names atomic.Uint32

// Name returns a short name (at most 15 bytes, as a network device's must be)
// that no other test uses, for namespaces, cgroups and the like. NoLeaks knows
// by it whose something is. It may be called from any goroutine.
func Name() string { return fmt.Sprintf("pft%dx%d", os.Getpid(), names.Add(1)) }

// Socket returns a path for a unix socket, short enough for sun_path whatever
// the test is called; its directory is removed at the end of the test.
func Socket(t testing.TB, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return filepath.Join(dir, name)
}

// ModuleRoot is the directory of go.mod.
func ModuleRoot(t testing.TB) string {
	t.Helper()
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		t.Fatal("no source path in this binary")
	}
	dir := filepath.Dir(filepath.Dir(filepath.Dir(file)))
	if _, err := os.Stat(filepath.Join(dir, "go.mod")); err != nil {
		// Built with -trimpath: a test runs in its package's directory.
		dir, _ = os.Getwd()
		for dir != "/" {
			if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
				return dir
			}
			dir = filepath.Dir(dir)
		}
		t.Fatal("no go.mod above the test's directory")
	}
	return dir
}
