// Package survive_test moves real programs between real daemons and does to them
// what the world does: daemons and pagers are killed at every kill point, links
// cut and stalled, disks full, peers strangers. Afterwards there must be exactly
// one owner, the program unharmed, a word about what happened, and nothing left.
//
// A rig is two hosts of package lab with a daemon of the real binary in each. The
// daemons report every kill point that they pass to the test, which decides
// there and then what is to happen. The oracle for two owners is testutil's
// Recorder, which is in neither host.
package survive_test

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/pageferry/pageferry/appliance/lab"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm/vmtest"
)

func TestMain(m *testing.M) {
	lab.Main()
	tracerMain()
	testutil.Main(m)
}

var binary struct {
	once sync.Once
	path string
	err  error
}

// pageferry is the real binary, built once for all tests of the package.
func pageferry(t testing.TB) string {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.Userfaultfd, testutil.CgroupV2, testutil.Namespaces)
	if vmtest.Inside() {
		return cmp.Or(os.Getenv("PAGEFERRY_BIN"), forGuest())
	}
	testutil.Require(t, testutil.Program("go"))
	binary.once.Do(func() {
		dir, err := os.MkdirTemp("", "Testbinary") // NoLeaks knows such names as Go's own
		if err != nil {
			binary.err = err
			return
		}
		testutil.AtEnd(func() { _ = os.RemoveAll(dir) })
		binary.path = filepath.Join(dir, "pageferry")
		cmd := exec.Command("go", "build", "-o", binary.path, "./cmd/pageferry")
		cmd.Dir = testutil.ModuleRoot(t)
		if out, err := cmd.CombinedOutput(); err != nil {
			binary.err = fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
		}
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return binary.path
}

// forGuest is where the binary lies for guests, which have no compiler to speak of.
func forGuest() string { return filepath.Join(testutil.ProgramCache(), "pageferry-of-survive") }

// takeAlong puts the binary where guests see it. Call it before vmtest.Run.
func takeAlong(t testing.TB) {
	t.Helper()
	exe := pageferry(t)
	if vmtest.Inside() {
		return
	}
	testutil.CC(t, "everything") // makes the directory
	b, err := os.ReadFile(exe)
	if err == nil {
		err = os.WriteFile(forGuest()+".new", b, 0o755)
	}
	if err == nil {
		err = os.Rename(forGuest()+".new", forGuest())
	}
	if err != nil {
		t.Fatal(err)
	}
}
