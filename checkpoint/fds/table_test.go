package fds

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pageferry/pageferry/checkpoint/image"
	"github.com/pageferry/pageferry/checkpoint/inject"
	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
)

func TestMain(m *testing.M) { testutil.Main(m) }

func tableProgram(t testing.TB) string {
	t.Helper()
	src, err := os.ReadFile("testdata/table.c")
	if err != nil {
		t.Fatal(err)
	}
	return testutil.CCText(t, "table", string(src))
}

// startTable runs the program and waits until it is ready.
func startTable(t testing.TB, mode, dir string) *testutil.Process {
	t.Helper()
	cmd := exec.Command(tableProgram(t), mode, dir)
	out, err := os.OpenFile(filepath.Join(dir, "output"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Adopted, because whoever waits for a child also gets to see its ptrace
	// stops, which are the tracer's.
	p := testutil.Adopt(t, cmd.Process.Pid)
	p.Output = out.Name()
	ready := filepath.Join(dir, map[string]string{"make": "ready1", "wait": "ready2"}[mode])
	testutil.Eventually(t, 10*time.Second, func() error {
		if !p.Alive() {
			t.Fatalf("the program ended: %s", p.Text())
		}
		_, err := os.Stat(ready)
		return err
	})
	return p
}

// checkTable lets the program check its descriptors.
func checkTable(t testing.TB, p *testutil.Process, file string) {
	t.Helper()
	p.Signal(unix.SIGUSR1)
	var b []byte
	testutil.Eventually(t, 20*time.Second, func() (err error) {
		if !p.Alive() {
			t.Fatalf("the program ended: %s", p.Text())
		}
		b, err = os.ReadFile(file)
		return err
	})
	if !strings.HasSuffix(string(b), "\n0 failures\n") && string(b) != "0 failures\n" {
		t.Errorf("the program found:\n%s", b)
	}
}

// stop stops a process as capture finds it.
func stop(t testing.TB, p *testutil.Process) {
	t.Helper()
	p.Signal(unix.SIGSTOP)
	testutil.Eventually(t, 5*time.Second, func() error {
		s, err := proc.ReadStat(p.Pid())
		if err != nil {
			return err
		}
		if s.State != 'T' {
			return fmt.Errorf("state %c", s.State)
		}
		return nil
	})
}

func capture(t testing.TB, pid int, tcpClose bool) (*image.Image, error) {
	t.Helper()
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	img := &image.Image{Processes: make([]image.Process, 1)}
	img.Processes[0].PID, img.Processes[0].HostPID = pid, pid
	err = Capture(context.Background(), &CaptureContext{
		HostPID: pid, PIDFD: pidfd, Image: img, Process: &img.Processes[0], TCPClose: tcpClose,
		Memories: map[FileKey]int{}, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	return img, err
}

// restoreInto gives the table of the image to a stopped process.
func restoreInto(t testing.TB, img *image.Image, pid int, change func(*RestoreContext)) error {
	t.Helper()
	tr := proc.NewTracer()
	defer tr.Close()
	tr.Do(func() {
		if err := sys.PtraceSeize(pid, unix.PTRACE_O_TRACESYSGOOD); err != nil {
			t.Fatal(err)
		}
		if err := sys.PtraceInterrupt(pid); err != nil {
			t.Fatal(err)
		}
		if ws, err := sys.Wait(pid); err != nil || !ws.Stopped() {
			t.Fatalf("wait: %#x %v", ws, err)
		}
	})
	target, err := inject.Bootstrap(tr, pid, pid)
	if err != nil {
		t.Fatal(err)
	}
	r := &RestoreContext{
		Target: target, TID: pid, PID: pid, Image: img, Process: &img.Processes[0],
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	if change != nil {
		change(r)
	}
	begin := time.Now()
	restored := Restore(context.Background(), r)
	t.Logf("restored %d descriptors in %v", len(img.Processes[0].FDs), time.Since(begin))
	if err := target.Close(pid); err != nil {
		t.Fatal(err)
	}
	tr.Do(func() {
		if err := sys.PtraceDetach(pid, 0); err != nil {
			t.Fatal(err)
		}
	})
	return restored
}

// TestTable moves a table with one of everything into another process, and lets
// both processes check theirs: the first one must not notice.
func TestTable(t *testing.T) {
	testutil.Require(t, testutil.Root, testutil.AMD64)
	testutil.NoLeaks(t)
	dir := t.TempDir()
	p := startTable(t, "make", dir)
	if _, err := capture(t, p.Pid(), false); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "--tcp close") {
		t.Fatalf("an established connection: %v", err)
	}
	stop(t, p)
	before := fdState(t, p.Pid())
	begin := time.Now()
	img, err := capture(t, p.Pid(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("captured %d descriptors, %d open files in %v", len(img.Processes[0].FDs), len(img.Files), time.Since(begin))
	if again := fdState(t, p.Pid()); again != before {
		t.Errorf("capture changed the table:\n%s\nto\n%s", before, again)
	}
	p.Signal(unix.SIGCONT)
	checkTable(t, p, filepath.Join(dir, "result1"))
	stop(t, p)
	if d, err := DestroyTCP(p.Pid()); err != nil || d.Listeners != 4 || d.Connections < 1 {
		t.Errorf("destroyed %+v: %v", d, err)
	}
	p.Kill()
	if err := os.WriteFile(filepath.Join(dir, "log"), []byte("one\n"), 0o644); err != nil {
		t.Fatal(err)
	}

	q := startTable(t, "wait", dir)
	for i := range img.Files {
		// In the test the process gets another pid.
		if o := img.Files[i].Owner; o != nil && o.PID != 0 {
			if o.PID != img.Processes[0].PID {
				t.Errorf("owner of file %d is %d", i, o.PID)
			}
			o.PID = q.Pid()
		}
	}
	if err := restoreInto(t, img, q.Pid(), nil); err != nil {
		t.Fatal(err)
	}
	compareTables(t, before, fdState(t, q.Pid()))
	checkTable(t, q, filepath.Join(dir, "result2"))
}

// fdState is what /proc says of a table, without what differs between two
// processes that have the same.
func fdState(t testing.TB, pid int) string {
	t.Helper()
	e := &examiner{pid: pid, content: true}
	if err := e.readTable(); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, en := range e.table {
		in := en.info
		in.Value, in.Mount, in.Ino = in.Value.Truncate(time.Hour/2), 0, 0
		for i := range in.Epoll {
			in.Epoll[i].Ino, in.Epoll[i].Dev = 0, 0
		}
		slices.SortFunc(in.Epoll, func(a, b epollInfo) int {
			return cmp.Or(cmp.Compare(a.FD, b.FD), cmp.Compare(a.Data, b.Data))
		})
		link, _, _ := strings.Cut(en.link, ":[")
		if strings.HasPrefix(link, "/proc/") {
			link = "/proc/self/status"
		}
		if strings.HasSuffix(link, " (deleted)") && !strings.HasPrefix(link, "/memfd") {
			link = "deleted"
		}
		fmt.Fprintf(&b, "%d %s %+v\n", en.num, link, in)
	}
	return b.String()
}

// compareTables reports lines that differ.
func compareTables(t testing.TB, want, got string) {
	t.Helper()
	w, g := strings.Split(want, "\n"), strings.Split(got, "\n")
	if len(w) != len(g) {
		t.Errorf("%d descriptors instead of %d:\n%s", len(g)-1, len(w)-1, got)
		return
	}
	for i := range w {
		if w[i] == g[i] {
			continue
		}
		t.Errorf("descriptor was\n%s\nand is\n%s", w[i], g[i])
	}
}
