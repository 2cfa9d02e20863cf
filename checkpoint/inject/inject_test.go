package inject

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/pageferry/pageferry/internal/sys"
	"github.com/pageferry/pageferry/internal/testutil"
	"github.com/pageferry/pageferry/proc"
	"golang.org/x/sys/unix"
)

// hold attaches to a thread and stops it.
func hold(t testing.TB, tr *proc.Tracer, tid int) {
	t.Helper()
	tr.Do(func() {
		if err := sys.PtraceSeize(tid, unix.PTRACE_O_TRACESYSGOOD); err != nil {
			t.Fatalf("seize %d: %v", tid, err)
		}
		if err := sys.PtraceInterrupt(tid); err != nil {
			t.Fatal(err)
		}
		ws, err := sys.Wait(tid)
		if err != nil || !ws.Stopped() {
			t.Fatalf("wait for %d: %#x %v", tid, ws, err)
		}
	})
}

func letGo(t testing.TB, tr *proc.Tracer, tid int) {
	t.Helper()
	tr.Do(func() {
		if err := sys.PtraceDetach(tid, 0); err != nil {
			t.Fatalf("detach %d: %v", tid, err)
		}
	})
}

// sleeper starts a program that does nothing for a long time.
func sleeper(t testing.TB) int {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for deadline := time.Now().Add(5 * time.Second); ; {
		b, _ := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/syscall")
		if bytes.HasPrefix(b, []byte(strconv.Itoa(unix.SYS_CLOCK_NANOSLEEP)+" ")) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("sleep does not sleep: %s", b)
		}
	}
	return cmd.Process.Pid
}

func begin(t testing.TB) (*proc.Tracer, *Target, int) {
	t.Helper()
	testutil.Require(t, testutil.Root, testutil.AMD64)
	pid := sleeper(t)
	tr := proc.NewTracer()
	t.Cleanup(tr.Close)
	hold(t, tr, pid)
	tg, err := Bootstrap(tr, pid, pid)
	if err != nil {
		t.Fatal(err)
	}
	return tr, tg, pid
}

func TestBatch(t *testing.T) {
	before := func(pid int) []byte {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/maps")
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	testutil.Require(t, testutil.Root, testutil.AMD64)
	pid := sleeper(t)
	maps := before(pid)
	tr := proc.NewTracer()
	defer tr.Close()
	hold(t, tr, pid)
	var was sys.Regs
	tr.Do(func() { _ = sys.PtraceGetRegs(pid, &was) })
	tg, err := Bootstrap(tr, pid, pid)
	if err != nil {
		t.Fatal(err)
	}

	wrong := tg.Batch()
	wrong.Call(unix.SYS_CLOSE).Arg(0, wrong.Call(unix.SYS_GETPID)) // which is evaluated after the call that takes it
	if err := wrong.Run(pid); err == nil {
		t.Error("a call took the result of one that comes after it")
	}
	b := tg.Batch()
	getpid := b.Call(unix.SYS_GETPID)
	fds := b.Space(8)
	b.Call(unix.SYS_PIPE2, fds.Addr(), unix.O_CLOEXEC)
	msg := b.String("hello")
	b.Call(unix.SYS_WRITE, 0, msg, 5).ArgAt32(0, fds.Addr()+4)
	got := b.Space(16)
	n := b.Call(unix.SYS_READ, 0, got.Addr(), 16).ArgAt32(0, fds.Addr())
	dup := b.Call(unix.SYS_FCNTL, 0, unix.F_DUPFD, 700).ArgAt32(0, fds.Addr())
	at := b.Space(16)
	dup.StoreAt(at.Addr()).StoreAt32(at.Addr() + 8)
	b.Call(unix.SYS_CLOSE).Arg(0, dup)
	bad := b.Call(unix.SYS_CLOSE, 9999).Optional()
	b.Call(unix.SYS_CLOSE).ArgAt32(0, fds.Addr())
	b.Call(unix.SYS_CLOSE).ArgAt32(0, fds.Addr()+4)
	big := b.Bytes(bytes.Repeat([]byte("x"), 3<<20))
	last := b.Call(unix.SYS_GETTID)
	if err := b.Run(pid); err != nil {
		t.Fatal(err)
	}
	if v, err := getpid.Ret(); err != nil || v != uint64(pid) {
		t.Errorf("getpid = %d, %v", v, err)
	}
	if v, _ := n.Ret(); v != 5 || string(got.Bytes()[:5]) != "hello" {
		t.Errorf("read %d bytes %q", v, got.Bytes())
	}
	if v, _ := dup.Ret(); v < 700 || binary.LittleEndian.Uint64(at.Bytes()) != v || binary.LittleEndian.Uint64(at.Bytes()[8:]) != v {
		t.Errorf("dup %d stored as %v", v, at.Bytes())
	}
	if _, err := bad.Ret(); !errors.Is(err, unix.EBADF) {
		t.Errorf("close of a bad descriptor: %v", err)
	}
	if v, err := last.Ret(); err != nil || v != uint64(pid) {
		t.Errorf("gettid = %d, %v", v, err)
	}
	if len(tg.Areas()) < 2 || big == 0 {
		t.Errorf("the arena did not grow: %v", tg.Areas())
	}

	b = tg.Batch()
	b.Call(unix.SYS_GETPID)
	b.Call(unix.SYS_CLOSE, 8888)
	after := b.Call(unix.SYS_GETPID)
	var ce *CallError
	if err := b.Run(pid); !errors.As(err, &ce) || ce.Index != 1 || ce.Name != "close" || !errors.Is(err, unix.EBADF) {
		t.Errorf("failing call: %v", err)
	}
	if _, err := after.Ret(); err == nil {
		t.Error("a call after the failing one was made")
	}

	b = tg.Batch()
	b.Call(unix.SYS_GETPID).StoreAt(0x10)
	var fe *FaultError
	if err := b.Run(pid); !errors.As(err, &fe) || fe.Addr != 0x10 || fe.Signal != unix.SIGSEGV {
		t.Errorf("storing at an unmapped address: %v", err)
	}

	if err := tg.Close(pid); err != nil {
		t.Fatal(err)
	}
	var is sys.Regs
	tr.Do(func() { _ = sys.PtraceGetRegs(pid, &is) })
	if is != was {
		t.Errorf("registers\n%+v\nbecame\n%+v", was, is)
	}
	letGo(t, tr, pid)
	if m := before(pid); !bytes.Equal(m, maps) {
		t.Errorf("mappings\n%s\nbecame\n%s", maps, m)
	}
}

func BenchmarkGetpid(b *testing.B) {
	tr, tg, pid := begin(b)
	for b.Loop() {
		bt := tg.Batch()
		for range 1000 {
			bt.Call(unix.SYS_GETPID)
		}
		if err := bt.Run(pid); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/call")
	if err := tg.Close(pid); err != nil {
		b.Fatal(err)
	}
	letGo(b, tr, pid)
}
