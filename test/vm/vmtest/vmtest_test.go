package vmtest

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func TestPattern(t *testing.T) {
	for _, c := range []struct{ name, host, want string }{
		{"TestGuest", "", "^TestGuest$"},
		{"TestGuest", "Guest", "^TestGuest$"},
		{"TestGuest", "Guest/Pair/x", "^TestGuest$/Pair/x"},
		{"TestGuest/Pair", "Guest/Pair", "^TestGuest$/^Pair$"},
		{"TestGuest", "A|Guest/Pair", "^TestGuest$"},
		{"TestGuest", "Guest/[/]", "^TestGuest$"},
		{"TestGuest/a+b", "", `^TestGuest$/^a\+b$`},
	} {
		if got := pattern(c.name, c.host); got != c.want {
			t.Errorf("%s, -run %s: %s, want %s", c.name, c.host, got, c.want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("PAGEFERRY_REQUIRE_ALL", "1")
	t.Setenv("PAGEFERRY_TEST_TEMP", "/tmp/x")
	t.Setenv("PAGEFERRY_LEDGER", "/tmp/host")
	t.Setenv("TMPDIR", "/tmp/x")
	env := environment("TestX")
	for _, want := range []string{"PAGEFERRY_REQUIRE_ALL=1", "PAGEFERRY_LEDGER=" + ledgerFile, envTest + "=TestX"} {
		if !slices.Contains(env, want) {
			t.Errorf("%s is not in %q", want, env)
		}
	}
	if all := strings.Join(env, " "); strings.Contains(all, "/tmp/x") || strings.Contains(all, "/tmp/host") {
		t.Errorf("paths of the host: %q", env)
	}
}

// recorded is what go test -test.v=test2json wrote, of tests that run side by side
// and write lines without an end, before the binary died.
const recorded = "\x16=== RUN   TestOther\n\x16--- PASS: TestOther (0.00s)\n" +
	"\x16=== RUN   TestX\nbegun\n\x16=== RUN   TestX/a\n\x16=== PAUSE TestX/a\n\x16=== RUN   TestX/b\n\x16=== RUN   TestX/b/deep\n" +
	"of deep, no end\x16=== NAME  TestX/b/deep\n    x_test.go:9: wrong\n\x16--- FAIL: TestX/b/deep (0.01s)\n\x16--- FAIL: TestX/b (0.02s)\n" +
	"\x16=== CONT  TestX/a\n    x_test.go:5: no such\n\x16--- SKIP: TestX/a (0.00s)\n" +
	"\x16=== RUN   TestX/c\npanic: out\n"

func TestParse(t *testing.T) {
	r := parse(recorded, "TestX")
	r.enter("ran\tvm.TestX/b\t\nskipped\tvm.TestX/a\tneeds root: you are not\nran\tvm.TestZ\t\n")
	if r.ended || !r.failed() {
		t.Errorf("ended %v, failed %v", r.ended, r.failed())
	}
	for name, want := range map[string]struct{ result, output string }{
		"TestX":        {"", "begun\n"},
		"TestX/a":      {"SKIP", "    x_test.go:5: no such\n"},
		"TestX/b":      {"FAIL", ""},
		"TestX/b/deep": {"FAIL", "of deep, no end\n    x_test.go:9: wrong\n"},
		"TestX/c":      {"", "panic: out\n"},
	} {
		n := r.nodes[name]
		if n == nil {
			t.Fatalf("no test %s", name)
		}
		if n.result != want.result || n.output.String() != want.output {
			t.Errorf("%s: %q, %q", name, n.result, n.output.String())
		}
	}
	if len(r.top.children) != 3 || len(r.nodes) != 5 {
		t.Errorf("%d children of %d tests", len(r.top.children), len(r.nodes))
	}
	if l := r.nodes["TestX/a"].ledger; len(l) != 1 || !l[0].Skipped {
		t.Errorf("ledger of a: %v", l)
	}
	if l := r.nodes["TestX/b"].ledger; len(l) != 1 || l[0].Skipped {
		t.Errorf("ledger of b: %v", l)
	}
}

func TestParseAllPassed(t *testing.T) {
	r := parse("\x16=== RUN   TestX\n\x16=== RUN   TestX/a\n\x16--- PASS: TestX/a (0.00s)\n\x16--- PASS: TestX (0.00s)\n\x16PASS\nledger: 1\n", "TestX")
	if !r.ended || r.failed() || r.rest.String() != "ledger: 1\n" {
		t.Errorf("ended %v, failed %v, rest %q", r.ended, r.failed(), r.rest.String())
	}
}

const envBody = "PAGEFERRY_GUEST_BODY"

// TestBody is a test that does all that can go wrong in a guest; TestReported looks
// at what is made of it.
func TestBody(t *testing.T) {
	if os.Getenv(envBody) == "" {
		return
	}
	Run(t, 4*time.Minute, func(t *testing.T) {
		t.Run("Good", func(t *testing.T) {
			testutil.Require(t, testutil.Root)
			t.Log("all is well")
		})
		t.Run("Bad", func(t *testing.T) {
			t.Run("Deep", func(t *testing.T) { t.Error("as it should be") })
		})
		t.Run("Lacking", func(t *testing.T) { testutil.Require(t, testutil.Program("no-such-program")) })
		t.Run("Fatal", func(t *testing.T) { panic("here it ends") })
	})
}

// What fails, is skipped or panics in the guest does so on the host, under its name.
func TestReported(t *testing.T) {
	testutil.Require(t, Guest)
	testutil.NoLeaks(t)
	ledger := t.TempDir() + "/ledger"
	cmd := exec.Command(os.Args[0], "-test.run=^TestBody$", "-test.v")
	cmd.Env = append(os.Environ(), envBody+"=1", "PAGEFERRY_LEDGER="+ledger, "PAGEFERRY_REQUIRE_ALL=")
	b, err := cmd.CombinedOutput()
	out := string(b)
	if err == nil {
		t.Error("it passed")
	}
	for _, want := range []string{
		"--- PASS: TestBody/Good", "all is well",
		"--- FAIL: TestBody/Bad/Deep", "as it should be",
		"--- SKIP: TestBody/Lacking", "no-such-program is not installed",
		"--- FAIL: TestBody/Fatal", "panic: here it ends",
		"--- FAIL: TestBody (",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the output lacks %q", want)
		}
	}
	if b, err = os.ReadFile(ledger); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"ran\tvmtest.TestBody/Good\t", "skipped\tvmtest.TestBody/Lacking\tneeds program no-such-program in the guest: "} {
		if !strings.Contains(string(b), want) {
			t.Errorf("the ledger lacks %q:\n%s", want, b)
		}
	}
	if t.Failed() {
		t.Logf("the output:\n%s", out)
	}
}
