// Package pageferry_test holds the rules that the whole tree obeys: who may
// import whom, and what is allowed where.
package pageferry_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/pageferry/pageferry"

// layers is the table of ARCHITECTURE.md. A folder stands for itself and all
// below it, unless something below it has a line of its own.
var layers = map[string]int{
	"internal/sys": 0,

	"page":              1,
	"internal/yamlfile": 1,

	"wire":      2,
	"codec":     2,
	"plan":      2,
	"pagestore": 2,
	"proc":      2,
	"transport": 2,

	"transport/tcp": 3,
	"rdma":          3,
	"fault":         3,
	"fusemem":       3,
	"dirty":         3,
	"checkpoint":    3,

	"migrate":   4,
	"appliance": 5,
	"perf":      6,
	"configs":   6,

	"cmd":  7,
	"test": 7,
}

// beside lists the imports between two units of one layer that are wanted.
var beside = map[[2]string]string{
	{"transport", "wire"}: "a lane carries frames",
	{"codec", "wire"}:     "an encoder makes the runs of a frame",
}

// besideInTests lists such imports that only tests may make.
var besideInTests = map[[2]string]string{
	{"checkpoint/restore", "fault"}: "what it makes anew runs, and only a real trap understands what a userfaultfd tells of that",
}

// forbidden lists what a unit must not import though its layer would allow it.
var forbidden = map[string]struct {
	layer int
	why   string
}{
	"migrate": {3, "appliance hands transports, traps and engines in, so that the state machines run on fakes"},
}

// unit returns the line of the table that a package of this module belongs to.
func unit(pkg string) (string, bool) {
	for p := pkg; p != "." && p != "/"; p = path.Dir(p) {
		if _, ok := layers[p]; ok {
			return p, true
		}
	}
	return "", false
}

// fake reports whether a package is there for other packages' tests.
func fake(pkg string) bool {
	return pkg == "internal/testutil" || strings.HasSuffix(path.Base(pkg), "test")
}

// source is one Go file of the module.
type source struct {
	name, dir string // slash-separated, relative to the module
	test      bool
	fset      *token.FileSet
	ast       *ast.File
	lines     int
}

func sources(t *testing.T) []source {
	t.Helper()
	var list []source
	err := filepath.WalkDir(".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := d.Name()
		if d.IsDir() {
			if name != "." && (strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") || base == "testdata" || base == "bin") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(base, ".go") {
			return nil
		}
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, text, parser.ParseComments)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		list = append(list, source{name, path.Dir(name), strings.HasSuffix(base, "_test.go"), fset, f, strings.Count(string(text), "\n")})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(list) < 10 {
		t.Fatalf("only %d Go files found: not run in the module's root?", len(list))
	}
	return list
}

func imports(s source) []string {
	var list []string
	for _, i := range s.ast.Imports {
		p, _ := strconv.Unquote(i.Path.Value)
		list = append(list, p)
	}
	return list
}

func TestLayers(t *testing.T) {
	for _, s := range sources(t) {
		from, known := unit(s.dir)
		if !known && !fake(s.dir) && s.dir != "." {
			t.Errorf("%s: package %s has no layer: add it to the table", s.name, s.dir)
			continue
		}
		for _, p := range imports(s) {
			pkg, ours := strings.CutPrefix(p, module+"/")
			if !ours {
				continue
			}
			if why := mayImport(s, from, pkg); why != "" {
				t.Errorf("%s imports %s: %s", s.name, pkg, why)
			}
		}
	}
}

// mayImport returns "" or why a file of unit from must not import pkg.
func mayImport(s source, from, pkg string) string {
	if fake(pkg) {
		if s.test || fake(s.dir) {
			return ""
		}
		return "only tests may"
	}
	if s.dir == "internal/testutil" {
		return "every package's tests import it, so it imports none"
	}
	if s.dir == "." {
		return ""
	}
	to, ok := unit(pkg)
	switch {
	case !ok:
		return "it has no layer"
	case to == from:
		return ""
	case layers[to] > layers[from]:
		return "it is of a higher layer"
	case layers[to] == layers[from] && beside[[2]string{from, to}] == "" && (!s.test || besideInTests[[2]string{s.dir, to}] == ""):
		return "it is a sibling: lower both or hand it in"
	}
	if f, ok := forbidden[from]; ok && layers[to] == f.layer {
		return f.why
	}
	return ""
}

// The rule itself, on cases that must fail and must not.
func TestMayImport(t *testing.T) {
	for _, c := range []struct {
		from, to string
		test, ok bool
	}{
		{"page", "internal/sys", false, true},
		{"page", "wire", false, false},
		{"transport", "wire", false, true},
		{"wire", "transport", false, false},
		{"fault", "dirty", false, false},
		{"fault", "pagestore", false, true},
		{"transport/tcp", "transport", false, true},
		{"transport", "transport/tcp", false, false},
		{"checkpoint/store", "checkpoint/image", false, true},
		{"checkpoint", "checkpoint/image", false, true},
		{"migrate", "checkpoint/image", false, false},
		{"migrate", "transport/tcp", false, false},
		{"migrate", "transport", false, true},
		{"migrate/stream", "fault", false, false},
		{"appliance/pager", "fault", false, true},
		{"fault", "internal/testutil", false, false},
		{"fault", "internal/testutil", true, true},
		{"transport/tcp", "transport/transporttest", true, true},
		{"transport/tcp", "transport/transporttest", false, false},
		{"fault", "appliance", true, false},
		{"internal/testutil", "page", false, false},
	} {
		from, _ := unit(c.from)
		why := mayImport(source{dir: c.from, test: c.test}, from, c.to)
		if (why == "") != c.ok {
			t.Errorf("%s (test %v) imports %s: %q", c.from, c.test, c.to, why)
		}
	}
}

var unsafeName = regexp.MustCompile(`_unsafe(_[a-z0-9]+)*\.go$`)

// rawCall finds system calls past the packages that wrap them.
var rawCall = regexp.MustCompile(`^(unix|syscall)\.(Raw)?Syscall(6|NoError)?$`)

func TestWhatIsAllowedWhere(t *testing.T) {
	for _, s := range sources(t) {
		for _, p := range imports(s) {
			if p == "unsafe" && !unsafeName.MatchString(s.name) {
				t.Errorf("%s imports unsafe: only *_unsafe.go may", s.name)
			}
			if p == "C" && s.dir != "rdma" && !strings.HasPrefix(s.dir, "rdma/") {
				t.Errorf("%s uses cgo: only rdma may", s.name)
			}
		}
		ast.Inspect(s.ast, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			at := s.fset.Position(call.Pos())
			x, _ := sel.X.(*ast.Ident)
			if x == nil {
				return true
			}
			if s.dir != "internal/sys" && rawCall.MatchString(x.Name+"."+sel.Sel.Name) {
				t.Errorf("%s: raw system call: only internal/sys may", at)
			}
			if s.dir != "internal/testutil" && (s.test || fake(s.dir)) && slices.Contains([]string{"Skip", "Skipf", "SkipNow"}, sel.Sel.Name) {
				t.Errorf("%s: skips a test: only testutil.Require may", at)
			}
			return true
		})
	}
}

// Every package says in doc.go what it is for; a program may say it in main.go.
func TestDocs(t *testing.T) {
	docs, programs := map[string]bool{}, map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		if s.ast.Name.Name == "main" {
			programs[s.dir] = programs[s.dir] || s.ast.Doc != nil
			continue
		}
		docs[s.dir] = docs[s.dir] || path.Base(s.name) == "doc.go" && s.ast.Doc != nil
	}
	for dir, ok := range docs {
		if !ok {
			t.Errorf("%s has no doc.go with a package comment", dir)
		}
	}
	for dir, ok := range programs {
		if !ok {
			t.Errorf("the program in %s has no comment that says what it does", dir)
		}
	}
}

// A file has one subject, so it is short.
func TestFilesAreShort(t *testing.T) {
	const most = 400
	for _, s := range sources(t) {
		if !s.test && s.lines > most {
			t.Errorf("%s has %d lines: more than %d mean more than one subject", s.name, s.lines, most)
		}
	}
}
