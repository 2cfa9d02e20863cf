package bench

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/appliance"
	"github.com/pageferry/pageferry/internal/testutil"
)

// book is what is printed after the last benchmark.
var book struct {
	table Table
	mu    sync.Mutex
	notes bytes.Buffer
	// medians of sub-benchmarks that others are compared with.
	medians map[string]float64
}

func TestMain(m *testing.M) {
	Main()
	// A pager that is killed leaves its keeper to us.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	book.medians = map[string]float64{}
	flag.Parse()
	benchmarks := flag.Lookup("test.bench").Value.String() != "" && flag.Lookup("test.list").Value.String() == ""
	if benchmarks {
		e := LookAround()
		e.Print(os.Stdout)
		testutil.AtEnd(func() {
			os.Stdout.Write(book.notes.Bytes())
			fmt.Println()
			book.table.Print(os.Stdout)
			if q := e.Quiet(); q != "" {
				fmt.Println("warning:", q)
			}
		})
	}
	testutil.AtEnd(func() {
		if built.dir != "" {
			_ = os.RemoveAll(built.dir)
		}
	})
	testutil.Main(m)
}

// note keeps a text for the end.
func note(format string, args ...any) {
	book.mu.Lock()
	defer book.mu.Unlock()
	fmt.Fprintf(&book.notes, format, args...)
}

var built struct {
	once      sync.Once
	dir, path string
	err       error
}

// pageferry is the path of the program: what PAGEFERRY_BIN names, or one built
// from the tree as it is.
func pageferry(tb testing.TB) string {
	tb.Helper()
	built.once.Do(func() {
		if p := os.Getenv("PAGEFERRY_BIN"); p != "" {
			built.path, built.err = filepath.Abs(p)
			return
		}
		if built.dir, built.err = os.MkdirTemp("", "bin"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "pageferry")
		out, err := exec.Command("go", "build", "-o", built.path, "github.com/pageferry/pageferry/cmd/pageferry").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("%w: %s", err, out)
		}
	})
	if built.err != nil {
		tb.Fatal(built.err)
	}
	return built.path
}

// scale is how large things are.
type scale struct {
	redis    []uint64 // of BenchmarkSwitch
	gap      uint64   // of the workload that watches its own gap
	threads  int
	stages   uint64
	touches  int    // single faults per turn
	load     uint64 // touched under load
	move     uint64 // of BenchmarkThroughput
	limits   int    // bytes per stage and turn
	memory   []uint64
	rates    []int    // MiB/s dirtied, in BenchmarkPrecopy
	track    uint64   // of BenchmarkTrack
	looks    int      // in each of its turns
	link     uint64   // of BenchmarkLink
	sizes    []uint64 // of BenchmarkSwitch, size
	shown    int      // bytes, of BenchmarkShown
	allModes bool
}

const mib = 1 << 20

var (
	full = scale{
		redis: []uint64{256 * mib, 1 * GiB, 2 * GiB, 4 * GiB}, gap: 2 * GiB, threads: 200, stages: 2 * GiB, touches: 1000,
		load: GiB, move: 4 * GiB, limits: 256 * mib, memory: []uint64{GiB, 4 * GiB}, rates: []int{390, 1560}, track: GiB, looks: 20, link: GiB, sizes: []uint64{GiB, 8 * GiB}, shown: 512 * mib, allModes: true,
	}
	short = scale{
		redis: []uint64{256 * mib, 1 * GiB}, gap: 256 * mib, threads: 200, stages: 256 * mib, touches: 500,
		load: 256 * mib, move: GiB, limits: 64 * mib, memory: []uint64{256 * mib, GiB}, rates: []int{390, 1560}, track: 512 * mib, looks: 20, link: 256 * mib, sizes: []uint64{256 * mib, 2 * GiB}, shown: 256 * mib, allModes: true,
	}
	tiny = scale{
		redis: []uint64{8 * mib}, gap: 4 * mib, threads: 20, stages: 4 * mib, touches: 50,
		load: 8 * mib, move: 8 * mib, limits: mib, memory: []uint64{8 * mib}, rates: []int{4}, track: 16 * mib, looks: 3, link: 8 * mib, sizes: []uint64{8 * mib}, shown: 8 * mib,
	}
)

// meter is a benchmark, or the small form of it in a test.
type meter struct {
	testing.TB
	scale
	ctx  context.Context
	loop func() bool
	// report is b.ReportMetric.
	report func(v float64, unit string)
	// judge puts a row into the table.
	judge func(Row)
}

// benchmark is one sub-benchmark.
type benchmark struct {
	name string
	run  func(*meter)
}

func runAll(b *testing.B, list func(scale) []benchmark) {
	testutil.Require(b, testutil.Root, testutil.Namespaces, testutil.CgroupV2, testutil.Userfaultfd)
	s := full
	if testing.Short() {
		s = short
	}
	for _, one := range list(s) {
		b.Run(one.name, func(b *testing.B) {
			ctx, cancel := context.WithTimeout(b.Context(), 30*time.Minute)
			defer cancel()
			one.run(&meter{TB: b, scale: s, ctx: ctx, loop: b.Loop, report: b.ReportMetric, judge: book.table.Add})
			b.ReportMetric(0, "ns/op") // the time of a turn means nothing
		})
	}
}

// stage is a Stage for the length of the benchmark.
func (m *meter) stage(plain bool) *Stage {
	m.Helper()
	s, err := NewStage(m.ctx, StageConfig{Binary: pageferry(m), Dir: m.TempDir(), PlainPages: plain, Name: testutil.Name()})
	m.must(err)
	m.Cleanup(func() {
		if err := s.Close(); err != nil {
			m.Error(err)
		}
	})
	return s
}

func (m *meter) must(err error) {
	m.Helper()
	if err != nil {
		m.Fatal(err)
	}
}

// closing calls f at the end, before what was there earlier.
func (m *meter) closing(f func() error) {
	m.Cleanup(func() {
		if err := f(); err != nil {
			m.Error(err)
		}
	})
}

func (m *meter) touch() string {
	m.Helper()
	return testutil.CCText(m, "touch", TouchSource)
}

// move is Stage.Move that must work.
func (m *meter) move(s *Stage, g *Guest, mode string) Hop {
	m.Helper()
	return m.moveAs(s, g, appliance.MigrateRequest{Mode: mode})
}

// moveAs is Stage.MoveAs that must work.
func (m *meter) moveAs(s *Stage, g *Guest, req appliance.MigrateRequest) Hop {
	m.Helper()
	h, moved := m.tryMove(s, g, req)
	if !moved {
		m.Fatal(h.Report.Reason)
	}
	return h
}

// tryMove is Stage.MoveAs that may end with the guest where it was.
func (m *meter) tryMove(s *Stage, g *Guest, req appliance.MigrateRequest) (h Hop, moved bool) {
	m.Helper()
	b, err := g.Back()
	m.must(err)
	h, err = s.MoveAs(m.ctx, g, req)
	m.must(b.Release())
	if errors.Is(err, ErrNotMoved) {
		return h, false
	}
	m.must(err)
	return h, true
}

func sizeName(bytes uint64) string {
	if bytes >= GiB {
		return fmt.Sprintf("%dGiB", bytes/GiB)
	}
	return fmt.Sprintf("%dMiB", bytes/mib)
}

// TestBenchmarks runs every benchmark in its small form. It asserts no times.
func TestBenchmarks(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.Namespaces, testutil.CgroupV2, testutil.Userfaultfd,
		testutil.Program("redis-server"), testutil.Program("cc"), testutil.Program("go"), testutil.AMD64)
	pageferry(t)
	testutil.CCText(t, "touch", TouchSource)
	testutil.CC(t, "everything")
	for _, group := range []struct {
		name string
		list func(scale) []benchmark
	}{
		{"Switch", switches}, {"Stages", stagesList}, {"Fault", faults}, {"Throughput", throughputs}, {"Memory", memories},
		{"Precopy", precopies}, {"Track", tracks}, {"Link", links}, {"Shown", shownList}, {"Trap", traps},
	} {
		for _, one := range group.list(tiny) {
			t.Run(group.name+"/"+one.name, func(t *testing.T) {
				testutil.NoLeaks(t)
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
				t.Cleanup(cancel)
				turns, metrics := 0, 0
				m := &meter{TB: t, scale: tiny, ctx: ctx, judge: func(r Row) {
					if r.Got <= 0 && r.Unit != "MiB" {
						t.Errorf("%s: nothing was measured", r.What)
					}
				}}
				m.loop = func() bool { turns++; return turns <= 2 } // there and back
				m.report = func(v float64, unit string) {
					metrics++
					if v < 0 {
						t.Errorf("%v %s", v, unit)
					}
				}
				one.run(m)
				if metrics == 0 {
					t.Error("nothing was reported")
				}
			})
		}
	}
}
