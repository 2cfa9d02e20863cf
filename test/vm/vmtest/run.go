package vmtest

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/test/vm"
)

// envTest names the test whose body runs in the guest.
const envTest = "PAGEFERRY_GUEST_TEST"

// grace is what a test binary gets to say where it hangs.
const grace = 10 * time.Second

// ledgerFile is where the guest's ledger lies in the guest.
const ledgerFile = "/run/ledger"

// Guest is a host on which a guest can be booted. It is the first check that
// fetches what is needed for that, see [vm.Prepare].
var Guest = testutil.Requirement{Name: "a QEMU guest", Check: func() error {
	_, err := vm.Prepare(context.Background())
	return err
}}

// Inside reports whether this is the test binary in the guest.
func Inside() bool { return vm.Inside() }

// Run runs f, the test's body, in a guest of its own, as root, and fails the
// test if it fails there or takes longer than limit, which does not count the
// boot. Call it first: all of the test before it runs in both places. With
// subtests in f, those become subtests on the host; -run chooses among them as
// usual, and flags of the package's own are handed on.
//
// The guest has the host's files, but a /tmp and a /run of its own; of /tmp only
// what holds this tree, the test binary and programs of testutil.CC is there. A
// compiler is slow in the guest: call testutil.CC before Run as well.
func Run(t *testing.T, limit time.Duration, f func(t *testing.T)) {
	t.Helper()
	if Inside() {
		// Any other that came here would pass without having run.
		if os.Getenv(envTest) != t.Name() {
			t.Fatalf("in a guest that was made for the test %q", os.Getenv(envTest))
		}
		f(t)
		return
	}
	testutil.Require(t, Guest)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	got, err := vm.Run(t.Context(), vm.Job{
		Args:    append([]string{exe}, arguments(t.Name(), limit)...),
		Env:     environment(t.Name()),
		Dir:     dir,
		Keep:    []string{testutil.ModuleRoot(t), testutil.ProgramCache()},
		Collect: []string{ledgerFile},
		Stdout:  &out,
		Stderr:  &out,
		Limit:   limit + 2*grace,
	})
	r := parse(out.String(), t.Name())
	r.enter(string(got.Files[ledgerFile]))
	if err != nil {
		r.report(t)
		t.Fatalf("%v", err)
	}
	t.Logf("booted in %.1f s, ran for %.1f s", got.Boot.Seconds(), got.Ran.Seconds())
	switch {
	case !r.ended && got.Signal != 0:
		t.Errorf("the test binary in the guest was ended by a signal: %v", got.Signal)
	case !r.ended:
		t.Errorf("the test did not end in the guest (exit status %d)", got.Code)
	case got.Signal != 0:
		t.Errorf("after the test, in the guest: %v", got.Signal)
	case got.Code != 0 && !r.failed():
		t.Errorf("the test passed in the guest and the binary did not, exit status %d:\n%s", got.Code, r.rest.String())
	}
	r.report(t)
}

// arguments are those of the test binary in the guest.
func arguments(name string, limit time.Duration) []string {
	args := []string{
		"-test.run=" + pattern(name, flag.Lookup("test.run").Value.String()),
		"-test.v=test2json", "-test.count=1", "-test.paniconexit0",
		"-test.timeout=" + (limit + grace).String(),
	}
	flag.Visit(func(f *flag.Flag) {
		if f.Name == "test.short" || !strings.HasPrefix(f.Name, "test.") {
			args = append(args, "-"+f.Name+"="+f.Value.String())
		}
	})
	return args
}

// pattern chooses the test, and among its subtests as the host's pattern does. One
// with alternatives has several levels for each: then all of them run, and the
// host's own choice comes after.
func pattern(name, host string) string {
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		parts = append(parts, "^"+regexp.QuoteMeta(part)+"$")
	}
	if levels := strings.Split(host, "/"); !strings.ContainsAny(host, "|[(") && len(levels) > len(parts) {
		parts = append(parts, levels[len(parts):]...)
	}
	return strings.Join(parts, "/")
}

// environment is what of the host's holds in the guest as well.
func environment(name string) []string {
	env := []string{envTest + "=" + name, "PAGEFERRY_LEDGER=" + ledgerFile, "PATH=" + vm.DefaultPath + ":" + os.Getenv("PATH")}
	for _, v := range os.Environ() {
		key, _, _ := strings.Cut(v, "=")
		switch {
		case key == "PAGEFERRY_LEDGER", strings.HasPrefix(key, "PAGEFERRY_TEST"):
			// Of this process, in this host's /tmp.
		case strings.HasPrefix(key, "PAGEFERRY_"), strings.HasPrefix(key, "GO"), key == "HOME", key == "LANG":
			env = append(env, v)
		}
	}
	slices.Sort(env)
	return env
}

// report makes each test of the guest one of the host's.
func (r *results) report(t *testing.T) {
	t.Helper()
	r.top.report(t)
}

func (n *node) report(t *testing.T) {
	t.Helper()
	if text := strings.TrimRight(n.output.String(), "\n"); text != "" {
		t.Logf("in the guest:\n%s", text)
	}
	for _, line := range n.ledger {
		n.gate(t, line)
	}
	for _, c := range n.children {
		t.Run(c.name, c.report)
	}
	switch n.result {
	case "PASS":
	case "FAIL":
		if !t.Failed() {
			t.Errorf("failed in the guest (%s)", n.took)
		}
	case "SKIP":
		// Not by the gate, else it would have ended above.
		testutil.Require(t, refusal("not to be skipped in the guest", n.output.String()))
	default:
		t.Errorf("did not end in the guest")
	}
}

// gate repeats what the guest's ledger says of a test.
func (n *node) gate(t *testing.T, e testutil.Entry) {
	t.Helper()
	if !e.Skipped {
		testutil.Require(t)
		return
	}
	what, why, _ := strings.Cut(strings.TrimPrefix(e.Reason, "needs "), ": ")
	testutil.Require(t, refusal(what+" in the guest", why))
}

func refusal(name, why string) testutil.Requirement {
	return testutil.Requirement{Name: name, Check: func() error { return fmt.Errorf("%s", why) }}
}
