package survive_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
)

// example is a command of a document, and the output that the document shows.
type example struct {
	line    int
	command string
	output  []string
}

// examples are the commands in the blocks of a document that are called console.
func examples(t *testing.T, path string) (out []example) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	inside := false
	for i, line := range strings.Split(string(text), "\n") {
		switch {
		case line == "```console":
			inside = true
		case line == "```":
			inside = false
		case inside && strings.HasPrefix(line, "# "):
			out = append(out, example{line: i + 1, command: line[2:]})
		case inside:
			e := &out[len(out)-1]
			e.output = append(e.output, line)
		}
	}
	return out
}

// Numbers, and what else is another one each time.
var (
	anyNumber = regexp.MustCompile(`\b(0x)?[0-9a-f]*[0-9][0-9a-f]*\b|\b[0-9a-f]{4,}\b`)
	anySpace  = regexp.MustCompile(`\s+`)
)

// form is a line without what may differ.
func form(line string) string {
	return strings.TrimSpace(anySpace.ReplaceAllString(anyNumber.ReplaceAllString(line, "N"), " "))
}

// TestReading runs the examples of docs/reading.md, in one shell, against a redis
// that is still arriving. Each must succeed, and print the lines that the document
// shows, but for numbers. With PAGEFERRY_EXAMPLES=1 it prints what they print.
func TestReading(t *testing.T) {
	begin(t)
	for _, p := range []string{"redis-server", "xxd", "strings", "gdb", "awk", "cmp"} {
		testutil.Require(t, testutil.Program(p))
	}
	list := examples(t, filepath.Join(testutil.ModuleRoot(t), "docs", "reading.md"))
	if len(list) < 12 {
		t.Fatalf("%d examples were found", len(list))
	}
	r := newRig(t)
	r.watch(t)
	g := r.redis(t)
	c, err := r.dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	redis := testutil.NewRedisClient(c, 20*time.Second)
	commands := [][]string{{"DEBUG", "POPULATE", "5000", "bulk", "4000"}}
	for i := range 3 {
		commands = append(commands, []string{"SET", fmt.Sprintf("ship:%d", 4711+i), fmt.Sprintf("waits for berth %d", 12+i)})
	}
	for _, cmd := range commands {
		if _, err := redis.Do(cmd...); err != nil {
			t.Fatal(err)
		}
	}
	c.Close()
	g.compress, g.shown = "none", "keep" // so that it is on its way for some seconds, and nothing goes under our eyes
	g.slowly("auto", func(n *node, id string) {
		var script strings.Builder
		for i, e := range list {
			fmt.Fprintf(&script, "echo '<<< %d'\n%s || echo \">>> failed with $?\"\n", i, e.command)
		}
		dir, err := os.MkdirTemp("", "Testreading")
		if err != nil {
			t.Error(err)
			return
		}
		defer os.RemoveAll(dir)
		if err := os.Symlink(pageferry(t), filepath.Join(dir, "pageferry")); err != nil {
			t.Error(err)
			return
		}
		out, err := n.host.Run(context.Background(), "sh", "-c", fmt.Sprintf("export PATH=%s:$PATH ID=%s\n%s", dir, id, script.String()))
		if os.Getenv("PAGEFERRY_EXAMPLES") != "" {
			t.Log(out)
		}
		if err != nil {
			t.Error(err)
		}
		parts := map[string]string{}
		for _, p := range strings.Split(out, "<<< ")[1:] {
			name, text, _ := strings.Cut(p, "\n")
			parts[name] = text
		}
		for i, e := range list {
			text, ok := parts[strconv.Itoa(i)]
			if !ok || strings.Contains(text, ">>> failed") {
				t.Errorf("docs/reading.md:%d: %s\n%s", e.line, e.command, text)
				continue
			}
			seen := map[string]bool{}
			for l := range strings.Lines(text) {
				seen[form(l)] = true
			}
			for _, l := range e.output {
				if l != "..." && !seen[form(l)] {
					t.Errorf("docs/reading.md:%d: %s\ndoes not print %q, but\n%s", e.line, e.command, l, text)
				}
			}
		}
		m := regexp.MustCompile(`"PagesTotal": (\d+),\n *"PagesResident": (\d+),`).FindStringSubmatch(out)
		if m == nil || m[1] == m[2] {
			t.Errorf("it had arrived before anything was tried: %s", m)
		}
	})
}
