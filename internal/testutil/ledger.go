package testutil

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

const (
	envRequireAll = "PAGEFERRY_REQUIRE_ALL"
	envLedger     = "PAGEFERRY_LEDGER"
)

// Entry is one line of the ledger: one test at the gate.
type Entry struct {
	Test    string
	Skipped bool
	Reason  string
}

var ledger struct {
	mu      sync.Mutex
	entries []Entry
}

func record(e Entry) {
	if os.Getenv(envChild) != "" {
		return // its parent has done so
	}
	ledger.mu.Lock()
	defer ledger.mu.Unlock()
	if slices.Contains(ledger.entries, e) {
		return
	}
	ledger.entries = append(ledger.entries, e)
	path := os.Getenv(envLedger)
	if path == "" {
		return
	}
	status := "ran"
	if e.Skipped {
		status = "skipped"
	}
	line := fmt.Sprintf("%s\t%s\t%s\n", status, e.Test, strings.ReplaceAll(e.Reason, "\n", " "))
	// One write of one line with O_APPEND: packages share the file.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		fmt.Fprintf(os.Stderr, "ledger: %v\n", err)
		return
	}
	defer f.Close()
	_, _ = f.WriteString(line)
}

// ParseLedger reads what a file named by PAGEFERRY_LEDGER has.
func ParseLedger(text string) (entries []Entry) {
	for line := range strings.Lines(text) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), "\t", 3)
		if len(f) == 3 {
			entries = append(entries, Entry{Test: f[1], Skipped: f[0] == "skipped", Reason: f[2]})
		}
	}
	return entries
}

// Ledger returns what has passed the gate so far, in order.
func Ledger() []Entry {
	ledger.mu.Lock()
	defer ledger.mu.Unlock()
	return slices.Clone(ledger.entries)
}

// PrintLedger writes a summary of entries: how many ran, and each one that was
// skipped with its reason.
func PrintLedger(w io.Writer, entries []Entry) {
	entries = slices.Clone(entries)
	slices.SortStableFunc(entries, func(a, b Entry) int { return cmp.Compare(a.Test, b.Test) })
	skipped := 0
	for _, e := range entries {
		if e.Skipped {
			skipped++
			fmt.Fprintf(w, "skipped  %s: %s\n", e.Test, e.Reason)
		}
	}
	fmt.Fprintf(w, "ledger: %d gated tests ran, %d skipped\n", len(entries)-skipped, skipped)
}

var atEnd []func()

// AtEnd has Main call f after the last test, for what all tests of a package
// share. Not to be called by tests that run in parallel.
func AtEnd(f func()) { atEnd = append(atEnd, f) }

// Main runs the tests of a package, prints the ledger and removes the
// package's temporary directory. Use it as
//
//	func TestMain(m *testing.M) { testutil.Main(m) }
//
// It gives the test process a temporary directory of its own, so that files
// and mounts left behind are known to be its own. It does not return.
func Main(m *testing.M) {
	// What a shell or a CI runner left open is not for the programs of tests.
	_ = unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC)
	if os.Getenv(envChild) == "" {
		if dir, err := os.MkdirTemp(realTemp, "pft"); err == nil {
			os.Setenv(envTemp, realTemp)
			os.Setenv("TMPDIR", dir)
			ownTemp = dir
			// The guard finds the directory by this if we are killed.
			_ = os.WriteFile(filepath.Join(dir, ".marker"), []byte(marker), 0o600)
		}
	}
	code := m.Run()
	for _, f := range atEnd {
		f()
	}
	if ownTemp != "" {
		left, _ := os.ReadDir(ownTemp)
		for _, e := range left {
			if e.Name() == ".marker" {
				continue
			}
			fmt.Fprintf(os.Stderr, "left behind in the temporary directory: %s\n", e.Name())
			code = max(code, 1)
		}
		if err := os.RemoveAll(ownTemp); err != nil {
			fmt.Fprintf(os.Stderr, "temporary directory: %v\n", err)
			code = max(code, 1)
		}
	}
	if e := Ledger(); len(e) > 0 && os.Getenv(envChild) == "" {
		PrintLedger(os.Stdout, e)
	}
	os.Exit(code)
}
