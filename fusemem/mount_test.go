package fusemem

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// limit is how long anything may take that takes no time.
const limit = 30 * time.Second

// mounted is a mount served by a child process; the test reads it.
type mounted struct {
	testing.TB
	dir    string
	spec   spec
	proc   *testutil.Process
	in     io.WriteCloser
	device int // its number there

	mu      sync.Mutex
	next    int
	answers map[int]chan string
}

// start has a child serve a mount, which is gone at the end of the test.
func start(t testing.TB, s spec) *mounted {
	t.Helper()
	if s.Dir == "" {
		s.Dir = t.TempDir()
	}
	m := &mounted{TB: t, dir: s.Dir, spec: s}
	t.Cleanup(func() {
		if err := Unmount(m.dir); err != nil {
			t.Error(err)
		}
	})
	m.serve(nil)
	return m
}

// serve starts a server for m: the first, or another that takes over.
func (m *mounted) serve(device *os.File) {
	m.Helper()
	s := m.spec
	cmd := exec.Command("/proc/self/exe")
	if device != nil {
		cmd.ExtraFiles = []*os.File{device}
		s.Takeover = 3
	}
	text, err := json.Marshal(s)
	if err != nil {
		m.Fatal(err)
	}
	file := filepath.Join(m.TempDir(), "spec")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		m.Fatal(err)
	}
	cmd.Env = append(os.Environ(), envServer+"="+file, "GORACE=halt_on_error=1 "+os.Getenv("GORACE"))
	r, w, err := os.Pipe()
	if err != nil {
		m.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, os.Stderr
	if m.in, err = cmd.StdinPipe(); err != nil {
		m.Fatal(err)
	}
	m.proc = testutil.StartCmd(m.TB, cmd, 3*time.Minute)
	w.Close()
	m.Cleanup(func() { m.in.Close() })
	lines := bufio.NewReader(r)
	line, err := lines.ReadString('\n')
	if _, err := fmt.Sscanf(line, "ready %d", &m.device); err != nil {
		r.Close()
		m.Fatalf("the server says %q, not that it is ready", line)
	}
	answers := map[int]chan string{}
	m.mu.Lock()
	m.answers = answers
	m.mu.Unlock()
	done := make(chan struct{})
	m.Cleanup(func() { m.proc.Kill(); <-done })
	go func() {
		defer close(done)
		defer r.Close()
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				break
			}
			id, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
			var n int
			_, _ = fmt.Sscan(id, &n)
			m.mu.Lock()
			c := answers[n]
			m.mu.Unlock()
			if c != nil {
				c <- rest
			}
		}
	}()
}

// ask sends a line to the server and returns where its answer comes.
func (m *mounted) ask(format string, args ...any) <-chan string {
	c := make(chan string, 1)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next++
	m.answers[m.next] = c
	fmt.Fprintf(m.in, "%d %s\n", m.next, fmt.Sprintf(format, args...))
	return c
}

// do is ask for what succeeds at once.
func (m *mounted) do(format string, args ...any) string {
	m.Helper()
	select {
	case a := <-m.ask(format, args...):
		rest, ok := strings.CutPrefix(a, "ok")
		if !ok {
			m.Fatalf("%s: %s", fmt.Sprintf(format, args...), a)
		}
		return strings.TrimSpace(rest)
	case <-time.After(limit):
		m.Fatalf("%s: no answer", fmt.Sprintf(format, args...))
	}
	return ""
}

func (m *mounted) open(name string) *os.File {
	m.Helper()
	f, err := os.Open(filepath.Join(m.dir, name))
	if err != nil {
		m.Fatal(err)
	}
	m.Cleanup(func() { f.Close() })
	return f
}

// want is what pages of a tag must be.
func want(tag uint64, first page.Num, pages int) []byte {
	b := make([]byte, pages*page.Size)
	content(tag, first, b)
	return b
}

// diff says where two contents begin to differ.
func diff(got, want []byte) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Errorf("%d bytes, from %#x of %#x on wrong", len(got), i, len(want))
		}
	}
	return fmt.Errorf("%d bytes instead of %d", len(got), len(want))
}

func vma(start, end page.Addr) VMA {
	return VMA{Range: page.Range{Start: start, End: end}, Perms: "rw-p"}
}

// Mappings with a gap, two that touch, and one at the end of the address space.
var someVMAs = []VMA{
	{Range: page.Range{Start: 0x400000, End: 0x480000}, Perms: "r-xp", Offset: 0x1000, Dev: unix.Mkdev(254, 1), Ino: 77, Path: "/usr/bin/x y\n"},
	vma(0x600000, 0x605000),
	vma(0x605000, 0x700000),
	vma(0x7f0000000000, 0x7f0000800000),
	vma(1<<47-0x3000, 1<<47),
}
