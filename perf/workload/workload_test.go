package workload

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/page"
	"golang.org/x/sys/unix"
)

// As a child this test binary is the program itself.
func TestMain(m *testing.M) {
	if os.Getenv("PAGEFERRY_WORKLOAD") == "1" {
		os.Exit(Main(os.Args[1:]))
	}
	testutil.Main(m)
}

var (
	patterns = []Pattern{Sequential, Uniform, Zipf, Edge}
	kinds    = []Data{Zero, Text, Random}
)

// each calls f for every kind of workload, small.
func each(t *testing.T, f func(t *testing.T, cfg Config)) {
	for _, p := range patterns {
		for _, d := range kinds {
			for _, whole := range []bool{false, true} {
				if p == Edge && whole {
					continue
				}
				cfg := Config{Size: 100 * page.Size, Threads: 3, Pattern: p, Data: d, Whole: whole, Seed: 7}
				cfg.EnsureDefaults()
				t.Run(fmt.Sprintf("%s/%s/whole=%v", p, d, whole), func(t *testing.T) { f(t, cfg) })
			}
		}
	}
}

// watcher is a buffer that shows each line to a function.
type watcher struct {
	bytes.Buffer
	seen func([]byte)
}

func (w *watcher) Write(b []byte) (int, error) {
	w.seen(b)
	return w.Buffer.Write(b)
}

func TestRun(t *testing.T) {
	testutil.NoLeaks(t)
	each(t, func(t *testing.T, cfg Config) {
		cfg.Rate, cfg.VerifyRate = 20<<20, 20<<20
		cfg.JSON, cfg.Interval = true, 5*time.Millisecond
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		// It ends when it has said that it wrote and verified.
		out := watcher{seen: func(b []byte) {
			var l Line
			if json.Unmarshal(b, &l) == nil && l.Writes > 0 && l.VerifiedRate > 0 {
				cancel()
			}
		}}
		if err := Run(ctx, cfg, &out); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(out.String()), "\n")
		var o Outcome
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &o); err != nil {
			t.Fatal(err)
		}
		if o.Outcome != "ok" || o.Writes == 0 || o.VerifiedBytes == 0 || o.GapUS == 0 {
			t.Errorf("%+v", o)
		}
	})
}

// made returns a filled runner after some writes, and not running.
func made(t *testing.T, cfg Config) *runner {
	t.Helper()
	r, err := newRunner(&cfg, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.free)
	for i, reg := range r.regions {
		reg.fill(func() bool { return false })
		o := newOrder(cfg.Pattern, reg.hot, uint64(i)+1)
		for range 50 {
			reg.write(o.next())
		}
	}
	return r
}

func verifyAll(reg *region) error {
	for i := range reg.pages() {
		if err := reg.verify(i); err != nil {
			return err
		}
	}
	return nil
}

// Whatever single byte of a page is changed is found, in its page.
// TestWorkingSet: what is written is as large as was asked for, at the beginning of
// each thread's part, and the rest stays as it was.
func TestWorkingSet(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		cfg.WorkingSet = 10 * page.Size
		r := made(t, cfg)
		hot := 0
		for _, reg := range r.regions {
			if err := verifyAll(reg); err != nil {
				t.Fatal(err)
			}
			for i := range reg.pages() {
				if s := reg.seq(i); s != 0 && i >= reg.hot {
					t.Fatalf("page %d was written %d times, the working set is %d pages", i, s, reg.hot)
				}
			}
			hot += reg.hot
		}
		if hot != 10 {
			t.Errorf("%d pages are written, not 10", hot)
		}
	})
	for _, c := range []Config{{Size: 1 << 20, WorkingSet: 2 << 20}, {Size: 1 << 20, WorkingSet: 1}, {Threads: 3, WorkingSet: 2 * page.Size}} {
		c.EnsureDefaults()
		if err := c.Validate(); !errors.Is(err, ErrConfig) {
			t.Errorf("%+v is accepted: %v", c, err)
		}
	}
}

func TestDamageIsFound(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		r := made(t, cfg)
		reg := r.regions[1]
		if err := verifyAll(reg); err != nil {
			t.Fatal(err)
		}
		for _, i := range []int{0, 1, reg.pages() - 1} {
			for _, off := range []int{0, 1, 7, 8, 9, 16, 2000, 4087, 4088, 4095} {
				p := reg.page(i)
				p[off] ^= 0x10
				var d *Damage
				if err := verifyAll(reg); !errors.As(err, &d) {
					t.Errorf("page %d: byte %d changed, and verify says %v", i, off, err)
				} else if d.Page != reg.first+uint64(i) || off < d.Offset || off >= d.Offset+8 {
					t.Errorf("page %d: byte %d changed, and verify says %v", i, off, d)
				}
				p[off] ^= 0x10
			}
		}
		if err := verifyAll(reg); err != nil {
			t.Fatal(err)
		}
	})
}

// A page as it was one write ago, and a page in another's place, are found.
func TestStaleAndMisplacedPagesAreFound(t *testing.T) {
	each(t, func(t *testing.T, cfg Config) {
		if cfg.Data == Zero && cfg.Pattern != Edge {
			return // zeros are zeros
		}
		r := made(t, cfg)
		reg := r.regions[0]
		i := 5
		if cfg.Pattern == Edge {
			i = reg.pos
		}
		old := bytes.Clone(reg.page(i))
		reg.write(i)
		fresh := bytes.Clone(reg.page(i))
		if copy(reg.page(i), old); verifyAll(reg) == nil {
			t.Error("a stale page was not found")
		}
		copy(reg.page(i), fresh)
		if clear(reg.page(i)); verifyAll(reg) == nil && cfg.Data != Zero {
			t.Error("a zero page was not found")
		}
		copy(reg.page(i), fresh)
		if err := verifyAll(reg); err != nil {
			t.Fatal(err)
		}
		if cfg.Data != Zero {
			if copy(reg.page(i), reg.page((i+1)%reg.pages())); verifyAll(reg) == nil {
				t.Error("another page's content was not found")
			}
		}
	})
}

// QEMU's way to look at it: every page equals its neighbour but at one edge.
func TestEdgeHasOneEdge(t *testing.T) {
	cfg := Config{Size: 64 * page.Size, Threads: 1, Pattern: Edge, Data: Zero}
	cfg.EnsureDefaults()
	r := made(t, cfg)
	reg := r.regions[0]
	for range 1000 {
		reg.write(0)
		edges := 0
		for i := 1; i < reg.pages(); i++ {
			if reg.page(i)[0] != reg.page(i - 1)[0] {
				edges++
			}
		}
		if edges > 1 {
			t.Fatalf("%d edges", edges)
		}
	}
}

func TestOrders(t *testing.T) {
	for _, pages := range []int{1, 2, 7, 64, 1000, 4096} {
		for _, p := range patterns {
			o := newOrder(p, pages, 3)
			for range 1000 {
				if n := o.next(); n < 0 || n >= pages {
					t.Fatalf("%s over %d pages: %d", p, pages, n)
				}
			}
		}
		if o := newOrder(Zipf, pages, 3); gcd(o.stride, o.pages) != 1 {
			t.Errorf("%d pages: the stride %d does not meet them all", pages, o.stride)
		}
	}
	// Zipf has a working set: half of the writes go to few pages.
	o, count := newOrder(Zipf, 1000, 9), map[int]int{}
	for range 10000 {
		count[o.next()]++
	}
	hot := 0
	for _, n := range count {
		if n >= 100 {
			hot += n
		}
	}
	if hot < 3000 || len(count) < 100 {
		t.Errorf("zipf: %d of 10000 writes to hot pages, %d pages written at all", hot, len(count))
	}
}

func TestBudget(t *testing.T) {
	b := newBudget(100 << 20)
	n := 0
	for range 1000 {
		n += b.take(time.Millisecond)
	}
	if want := 100 << 20 / page.Size; n < want-1 || n > want {
		t.Errorf("%d pages in a second, not %d", n, want)
	}
	if n := b.take(time.Hour); n > 100<<20/page.Size/20+1 {
		t.Errorf("%d pages at once after an hour's gap", n)
	}
	if n := newBudget(Idle).take(time.Hour); n != 0 {
		t.Errorf("idle: %d pages", n)
	}
}

func TestFlagsAndValidate(t *testing.T) {
	for args, want := range map[string]string{
		"--size 3kB --threads 4":         "less than a page for each",
		"--pattern spiral":               "pattern",
		"--data noise":                   "data",
		"--rate 1.5furlongs":             "invalid value",
		"--heartbeat tcp:1":              "heartbeat",
		"--pattern edge --whole":         "edge",
		"--threads 0 --duration 1ms --x": "not defined",
		"--size 20TiB --threads -3":      "threads",
		"extra":                          "unexpected",
	} {
		var out bytes.Buffer
		if code := run(strings.Fields(args), &out, &out); code != 2 || !strings.Contains(out.String(), want) {
			t.Errorf("%s: exit status %d: %s", args, code, out.String())
		}
	}
	var out bytes.Buffer
	args := "--size 1MiB --threads 2 --rate 10MiB/s --verify-rate unlimited --verify=true --duration 20ms --pattern zipf --data text"
	if code := run(strings.Fields(args), &out, &out); code != 0 || !strings.Contains(out.String(), "ok: ") {
		t.Errorf("exit status %d: %s", code, out.String())
	}
}

// The program as a process: heartbeats, its end by SIGTERM, and what a byte
// changed from outside makes of it.
func TestProcess(t *testing.T) {
	testutil.Require(t, testutil.Root)
	testutil.NoLeaks(t)
	start := func(r *testutil.Recorder, id string, args ...string) *testutil.Process {
		args = append([]string{"--size", "8MiB", "--threads", "4", "--rate", "20MiB/s", "--interval", "20ms",
			"--heartbeat", r.Address, "--identity", id}, args...)
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(exe, args...)
		cmd.Env = append(os.Environ(), "PAGEFERRY_WORKLOAD=1")
		p := testutil.StartCmd(t, cmd, time.Minute)
		p.WaitText("ready", 20*time.Second)
		return p
	}
	r := testutil.NewRecorder(t)
	p := start(r, "good")
	if b := r.WaitBeats("good", 20, 20*time.Second); b.Gap == 0 {
		t.Error("no gap was reported")
	}
	p.Signal(unix.SIGSTOP)
	const pause = 200 * time.Millisecond
	time.Sleep(pause) // the length of the pause is what is tested
	p.Signal(unix.SIGCONT)
	testutil.Eventually(t, 10*time.Second, func() error {
		if b := r.Beats("good"); b.Gap < pause {
			return fmt.Errorf("a pause of %v is a gap of %v", pause, b.Gap)
		}
		return nil
	})
	p.Signal(unix.SIGTERM)
	if err := p.Wait(20 * time.Second); err != nil || !strings.Contains(p.Text(), "ok: ") {
		t.Errorf("%v: %s", err, p.Text())
	}
	r.OneOwner(0)

	p = start(r, "damaged", "--pattern", "sequential")
	var at int64
	if _, err := fmt.Sscanf(p.Text(), "ready: pid %d, 8.0 MiB at 0x%x", new(int), &at); err != nil {
		t.Fatalf("%v: %s", err, p.Text())
	}
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", p.Pid()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{0xee}, at+5*page.Size+1234); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(30 * time.Second); err == nil || !strings.Contains(p.Text(), "at offset 1232") {
		t.Errorf("damage: %v: %s", err, p.Text())
	}
	if b := r.Beats("damaged"); len(b.Bad) != 1 {
		t.Errorf("damage: %+v", b)
	}
}

func BenchmarkWrite(b *testing.B) {
	cfg := Config{Size: 64 << 20}
	cfg.EnsureDefaults()
	r, err := newRunner(&cfg, io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	defer r.free()
	reg := r.regions[0]
	reg.fill(func() bool { return false })
	o := newOrder(Uniform, reg.pages(), 1)
	b.SetBytes(page.Size)
	for b.Loop() {
		reg.write(o.next())
	}
}

func BenchmarkVerify(b *testing.B) {
	cfg := Config{Size: 64 << 20}
	cfg.EnsureDefaults()
	r, err := newRunner(&cfg, io.Discard)
	if err != nil {
		b.Fatal(err)
	}
	defer r.free()
	reg := r.regions[0]
	reg.fill(func() bool { return false })
	b.SetBytes(page.Size)
	for i := 0; b.Loop(); i++ {
		if err := reg.verify(i % reg.pages()); err != nil {
			b.Fatal(err)
		}
	}
}
