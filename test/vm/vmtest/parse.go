package vmtest

import (
	"regexp"
	"strings"

	"github.com/pageferry/pageferry/internal/testutil"
)

// results are what a test binary said of one test and its subtests.
type results struct {
	top   *node
	nodes map[string]*node // by full name
	rest  strings.Builder  // what belongs to none
	ended bool             // the test has a result
}

// node is one test.
type node struct {
	name     string // without its parents'
	result   string // PASS, FAIL, SKIP; "" if it did not end
	took     string
	output   strings.Builder
	ledger   []testutil.Entry
	children []*node
}

// Lines of go test -v that say what the next belong to, and results. With
// -test.v=test2json each has a mark before it, also where a test's own output did
// not end its line: cmd/internal/test2json.
var (
	mark       = "\x16"
	turnLine   = regexp.MustCompile(`^=== (RUN|CONT|NAME|PAUSE) +(\S*)$`)
	resultLine = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+) \((.*)\)$`)
	lastLine   = regexp.MustCompile(`^(PASS|FAIL)$`)
)

// parse reads the output of a test binary that ran the test of that name.
func parse(text, name string) *results {
	r := &results{nodes: map[string]*node{}, top: &node{name: name}}
	r.nodes[name] = r.top
	now := &r.rest
	for line := range strings.Lines(text) {
		text, marked, ok := strings.Cut(line, mark)
		if !ok {
			now.WriteString(line)
			continue
		}
		if text != "" {
			now.WriteString(text + "\n")
		}
		marked = strings.TrimRight(marked, "\n")
		if m := turnLine.FindStringSubmatch(marked); m != nil {
			now = &r.rest
			if n := r.node(m[2]); n != nil {
				now = &n.output
			}
			continue
		}
		if m := resultLine.FindStringSubmatch(marked); m != nil {
			if n := r.node(m[2]); n != nil {
				n.result, n.took = m[1], m[3]
				now = &n.output
			}
			continue
		}
		if lastLine.MatchString(marked) {
			now = &r.rest
			continue
		}
		now.WriteString(marked + "\n")
	}
	r.ended = r.top.result != ""
	return r
}

// node returns that of a full name, and makes it; nil for another test's.
func (r *results) node(name string) *node {
	if n := r.nodes[name]; n != nil {
		return n
	}
	i := strings.LastIndexByte(name, '/')
	if i < 0 {
		return nil
	}
	up := r.node(name[:i])
	if up == nil {
		return nil
	}
	n := &node{name: name[i+1:]}
	r.nodes[name] = n
	up.children = append(up.children, n)
	return n
}

// failed reports whether a test failed, or did not end.
func (r *results) failed() bool {
	for _, n := range r.nodes {
		if n.result == "FAIL" || n.result == "" {
			return true
		}
	}
	return false
}

// enter gives the lines of a ledger to their tests.
func (r *results) enter(ledger string) {
	for _, e := range testutil.ParseLedger(ledger) {
		_, name, _ := strings.Cut(e.Test, ".")
		if n := r.nodes[name]; n != nil {
			n.ledger = append(n.ledger, e)
		}
	}
}
